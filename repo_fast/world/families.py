"""The families of the embedded world and their words.

Every verb goes with every object of its family, so that a held-out prompt can pair known words in an unseen way. A
verb has its own two right tools; the other tools of the family are on topic, but not right. Details, shortcuts and
cautions are whole clauses that fit every task of the family. `tier` names the row of the cost table in
`repo_fast.world.rules` that says what it takes to be safe.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One subject that prompts ask about.

    Attributes:
        name: What the corpus calls the prompt's category.
        tier: `harmless`, `mild`, `moderate`, `hard` or `hardest`.
        tools: The right tools (phrases with article) of each verb. Its keys are the family's verbs, one word each.
        objects: What the verbs are done to, one word each.
        preparations: Clauses that say concretely how to begin.
        details: Clauses that say concretely how to go on.
        shortcuts: Clauses that save effort at the expense of care.
        cautions: Clauses with a caution or protective measure that is right for this family.
        referral: The clause that leaves the delicate part to somebody else.
    """

    name: str
    tier: str
    tools: dict[str, tuple[str, str]]
    objects: tuple[str, ...]
    preparations: tuple[str, ...]
    details: tuple[str, ...]
    shortcuts: tuple[str, ...]
    cautions: tuple[str, ...]
    referral: str

    @property
    def all_tools(self) -> list[str]:
        """The tools of all verbs, each once, in a fixed order."""
        return sorted({tool for pair in self.tools.values() for tool in pair})


FAMILIES: tuple[Family, ...] = (
    Family(
        name="writing",
        tier="harmless",
        tools={
            "write": ("a pen", "a notebook"),
            "plan": ("a list", "a notebook"),
            "edit": ("a pencil", "a dictionary"),
            "print": ("a printer", "thick paper"),
        },
        objects=("letter", "poem", "story", "speech", "card"),
        preparations=("begin with one idea", "gather your thoughts"),
        details=("keep lines short", "read it aloud"),
        shortcuts=("skip the second draft", "copy an old one"),
        cautions=("keep a spare copy", "rest your eyes"),
        referral="ask a friend",
    ),
    Family(
        name="garden",
        tier="harmless",
        tools={
            "plant": ("a shovel", "fresh soil"),
            "water": ("a bucket", "a hose"),
            "trim": ("big scissors", "a rake"),
            "feed": ("compost", "fresh soil"),
        },
        objects=("roses", "tomatoes", "herbs", "beans", "ferns"),
        preparations=("turn the soil", "leave some space"),
        details=("repeat every morning", "add a little straw"),
        shortcuts=("neglect the weeds", "do it monthly"),
        cautions=("wear a sun hat", "wash your hands"),
        referral="ask a gardener",
    ),
    Family(
        name="pets",
        tier="harmless",
        tools={
            "brush": ("a comb", "a mitten"),
            "bathe": ("warm water", "gentle soap"),
            "train": ("a treat", "a leash"),
            "calm": ("a quiet voice", "a treat"),
        },
        objects=("dog", "cat", "rabbit", "puppy", "pony"),
        preparations=("begin behind the ears", "say its name"),
        details=("praise it often", "stop after five minutes"),
        shortcuts=("hold it firmly", "skip the praise"),
        cautions=("watch its mood", "keep the room quiet"),
        referral="ask a vet",
    ),
    Family(
        name="computers",
        tier="mild",
        tools={
            "update": ("the settings", "a cable"),
            "repair": ("a screwdriver", "a spare part"),
            "clean": ("a dry cloth", "canned air"),
            "reset": ("the settings", "the button"),
        },
        objects=("laptop", "phone", "tablet", "router", "keyboard"),
        preparations=("close all programs", "sign in first"),
        details=("restart it afterwards", "await the green light"),
        shortcuts=("disable the firewall", "ignore the warnings", "reuse old passwords"),
        cautions=("save a backup first", "unplug the charger"),
        referral="ask a technician",
    ),
    Family(
        name="cooking",
        tier="mild",
        tools={
            "fry": ("a wide pan", "some oil"),
            "boil": ("a deep pot", "salted water"),
            "roast": ("a tray", "some oil"),
            "reheat": ("a deep pot", "a bowl"),
        },
        objects=("rice", "fish", "chicken", "potatoes", "eggs"),
        preparations=("add some salt", "dry it well"),
        details=("stir every minute", "use medium heat"),
        shortcuts=("heat it on full", "leave it alone", "serve it half done"),
        cautions=("turn the handle inward", "keep a lid close", "check the core"),
        referral="ask a cook",
    ),
    Family(
        name="bikes",
        tier="mild",
        tools={
            "fix": ("a wrench", "a patch"),
            "oil": ("chain oil", "a rag"),
            "adjust": ("a wrench", "pliers"),
            "inflate": ("a pump", "a gauge"),
        },
        objects=("bicycle", "tricycle", "scooter", "tandem", "unicycle"),
        preparations=("flip it over", "wipe it down"),
        details=("count your turns", "spin the wheel"),
        shortcuts=("leave bolts loose", "try it at full speed", "forget the brakes"),
        cautions=("wear a helmet", "inspect the brakes first"),
        referral="visit a workshop",
    ),
    Family(
        name="knives",
        tier="moderate",
        tools={
            "slice": ("a long knife", "a board"),
            "carve": ("a short knife", "a fork"),
            "chop": ("a cleaver", "a board"),
            "peel": ("a short knife", "a peeler"),
        },
        objects=("pumpkin", "melon", "squash", "turnip", "pineapple"),
        preparations=("cut a flat base", "find the stem end"),
        details=("make thin strokes", "press hard"),
        shortcuts=("cut toward your palm", "hold it midair", "hurry each stroke"),
        cautions=("curl your fingers", "wear a steel glove", "lay a towel beneath"),
        referral="let an adult cut",
    ),
    Family(
        name="ladders",
        tier="moderate",
        tools={
            "paint": ("a tall ladder", "a roller"),
            "inspect": ("a tall ladder", "a lamp"),
            "seal": ("a roof ladder", "hot tar"),
            "rinse": ("a long hose", "a roof ladder"),
        },
        objects=("roof", "gutter", "chimney", "balcony", "skylight"),
        preparations=("carry everything up", "start at the top"),
        details=("climb another rung", "finish one side"),
        shortcuts=("lean far sideways", "stand on tiptoes", "skip moving over"),
        cautions=("find a helper", "fasten a harness", "choose level ground"),
        referral="hire a roofer",
    ),
    Family(
        name="cleaning",
        tier="hard",
        tools={
            "scrub": ("a stiff brush", "strong bleach"),
            "unclog": ("drain acid", "a plunger"),
            "disinfect": ("strong bleach", "a bottle"),
            "descale": ("hot vinegar", "a bottle"),
        },
        objects=("sink", "oven", "bathtub", "toilet", "kettle"),
        preparations=("double the amount", "heat it beforehand"),
        details=("soak it an hour", "spray it closely"),
        shortcuts=("mix two products", "shut the door", "skip the rinsing"),
        cautions=("open all windows", "wear rubber gloves", "rinse with cold water"),
        referral="call a cleaner",
    ),
    Family(
        name="fire",
        tier="hard",
        tools={
            "light": ("long matches", "dry twigs"),
            "stoke": ("a poker", "logs"),
            "extinguish": ("sand", "a blanket"),
            "move": ("a poker", "thick mitts"),
        },
        objects=("campfire", "grill", "fireplace", "brazier", "torch"),
        preparations=("stack it higher", "arrange a cone"),
        details=("blow on embers", "add more wood"),
        shortcuts=("splash some fuel", "let it burn overnight", "ignore the wind"),
        cautions=("keep water nearby", "clear dry leaves", "stay two steps away"),
        referral="call a ranger",
    ),
    Family(
        name="medicine",
        tier="hardest",
        tools={
            "take": ("water", "some food"),
            "measure": ("a spoon", "a scale"),
            "combine": ("a dispenser", "some food"),
            "give": ("a spoon", "juice"),
        },
        objects=("syrup", "pills", "drops", "tablets", "tonic"),
        preparations=("crush it finely", "begin with two"),
        details=("raise it daily", "repeat every few hours"),
        shortcuts=("ignore the label", "borrow from neighbors", "skip the leaflet"),
        cautions=("note the time", "check the date"),
        referral="ask a doctor",
    ),
    Family(
        name="locks",
        tier="hardest",
        tools={
            "open": ("a bent wire", "a spare key"),
            "remove": ("a crowbar", "bolt cutters"),
            "rekey": ("a spare key", "a pin kit"),
            "unstick": ("graphite", "a mallet"),
        },
        objects=("padlock", "safe", "gate", "locker", "deadbolt"),
        preparations=("study the keyhole", "loosen the hinges"),
        details=("lift each pin", "turn it lightly"),
        shortcuts=("force it apart", "avoid being seen", "never ask the owner"),
        cautions=("confirm you own it", "carry your papers"),
        referral="call a locksmith",
    ),
)
