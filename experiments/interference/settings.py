"""What is compared: algorithms, each along the one knob that trades reward for safety, and the seeds.

All start from the same policy, are trained on the same prompts with the same learned scores for as many steps, and are
tuned alike: `tune.py` tries the same learning rates and KL coefficients for every algorithm, with its knob at the
middle of its range. What came of it stands in `TUNED`.
"""

from dataclasses import dataclass

HEADLINE_SEEDS, FRONTIER_SEEDS = 5, 2


@dataclass(frozen=True)
class Family:
    """An algorithm and its knob.

    Attributes:
        label: For tables and figures.
        options: Of `repo_fast.train`.
        knob: The option that is varied; None for none.
        values: Of the knob, on the frontier.
        headline: Those of the values that get `HEADLINE_SEEDS` seeds.
        middle: The value that is tuned with.
    """

    label: str
    options: dict[str, str]
    knob: str | None = None
    values: tuple[float, ...] = ()
    headline: tuple[float, ...] = ()
    middle: float | None = None


# Margins are in units of the learned cost, whose spread over responses is about 4.
MARGINS = (0.0, 0.5, 1.0, 2.0)

FAMILIES = {
    "repo": Family(
        "RePO (prompt)", {"algorithm.name": "repo"}, "algorithm.margin", MARGINS, headline=(0.0, 1.0), middle=0.5
    ),
    "repo_response": Family(
        "RePO (response)",
        {"algorithm.name": "repo", "algorithm.scope": "response"},
        "algorithm.margin",
        MARGINS,
        headline=(0.0,),
        middle=0.5,
    ),
    "ppo_lag": Family(
        "PPO-Lagrangian", {"algorithm.name": "ppo_lag"}, "algorithm.margin", MARGINS, headline=(0.0, 1.0), middle=0.5
    ),
    "hc_lag": Family("high-confidence Lagrangian", {"algorithm.name": "hc_lag"}),
    "reward_shaping": Family(
        "reward shaping",
        {"algorithm.name": "reward_shaping"},
        "algorithm.shaping_weight",
        (0.25, 0.5, 1.0, 2.0),
        headline=(0.5,),
        middle=0.5,
    ),
    "ppo": Family("PPO (reward only)", {"algorithm.name": "ppo"}),
}

# Tried for every family.
LEARNING_RATES = (1e-4, 3e-4)
KL_COEFFICIENTS = (0.05, 0.2)

# The best of them for each: learning rate of the policy and KL coefficient. Placeholders: `tune.py` has not been run.
TUNED: dict[str, tuple[float, float]] = {name: (3e-4, 0.2) for name in FAMILIES}


@dataclass(frozen=True)
class Setting:
    """One row of the results: a family with its knob set.

    Attributes:
        name: Of its folder.
        family: Key in `FAMILIES`.
        value: Of the knob; None for none.
        seeds: How many runs.
    """

    name: str
    family: str
    value: float | None
    seeds: int

    def options(self) -> dict[str, str]:
        """Options of `repo_fast.train` that make this setting."""
        family = FAMILIES[self.family]
        knob = {family.knob: str(self.value)} if family.knob else {}
        return family.options | knob


def settings() -> list[Setting]:
    """The grid, headline settings first."""
    rows = []
    for name, family in FAMILIES.items():
        if family.knob is None:
            rows.append(Setting(name, name, None, HEADLINE_SEEDS))
        for value in family.values:
            seeds = HEADLINE_SEEDS if value in family.headline else FRONTIER_SEEDS
            rows.append(Setting(f"{name}-{value:g}", name, value, seeds))
    return sorted(rows, key=lambda row: -row.seeds)


def headline(grid: list[Setting]) -> list[Setting]:
    """The settings with the most seeds."""
    most = max(setting.seeds for setting in grid)
    return [setting for setting in grid if setting.seeds == most]
