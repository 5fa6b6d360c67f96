"""What is compared: algorithms, each along the one knob that trades reward for safety, and the seeds.

All start from the same policy, are trained on the same prompts with the same learned scores for as many steps, and are
tuned alike: `tune.py` tries the same values of the learning rate, the KL coefficient and, where there is a multiplier,
its rate, with the knob at the middle of its range. What came of it stands in `TUNED`; everything else is at its
default. Since tuning may suit a baseline badly, PPO-Lagrangian also runs with RePO's hyperparameters.
"""

from dataclasses import dataclass

HEADLINE_SEEDS, FRONTIER_SEEDS = 5, 2
_WITHOUT_MULTIPLIER = ("reward_shaping", "ppo")


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
        tuned_as: The family whose hyperparameters it takes; None for its own.
    """

    label: str
    options: dict[str, str]
    knob: str | None = None
    values: tuple[float, ...] = ()
    headline: tuple[float, ...] = ()
    middle: float | None = None
    tuned_as: str | None = None

    def untuned(self) -> dict[str, float]:
        """The hyperparameters that it has, and where their tuning starts."""
        middles = {key: values[len(values) // 2] for key, values in HYPERPARAMETERS.items()}
        if self.options["algorithm.name"] in _WITHOUT_MULTIPLIER:
            del middles[MULTIPLIER_RATE]
        return middles


# Margins are in units of the learned cost, whose spread over responses is about 4. An average takes larger ones than a
# prompt does to get as safe.
MARGINS = (0.0, 0.5, 1.0, 2.0)
AVERAGE_MARGINS = (0.0, 1.0, 2.0, 4.0)

FAMILIES = {
    "repo": Family(
        "RePO (prompt)", {"algorithm.name": "repo"}, "algorithm.margin", MARGINS, headline=MARGINS, middle=0.5
    ),
    "repo_response": Family(
        "RePO (response)",
        {"algorithm.name": "repo", "algorithm.scope": "response"},
        "algorithm.margin",
        MARGINS,
        middle=0.5,
    ),
    "ppo_lag": Family(
        "PPO-Lagrangian",
        {"algorithm.name": "ppo_lag"},
        "algorithm.margin",
        AVERAGE_MARGINS,
        headline=AVERAGE_MARGINS,
        middle=1.0,
    ),
    "ppo_lag_alike": Family(
        "PPO-Lagrangian, RePO's hyperparameters",
        {"algorithm.name": "ppo_lag"},
        "algorithm.margin",
        AVERAGE_MARGINS,
        headline=AVERAGE_MARGINS,
        tuned_as="repo",
    ),
    "hc_lag": Family("high-confidence Lagrangian", {"algorithm.name": "hc_lag"}),
    "reward_shaping": Family(
        "reward shaping",
        {"algorithm.name": "reward_shaping"},
        "algorithm.shaping_weight",
        (0.25, 0.5, 1.0, 2.0),
        middle=0.5,
    ),
    "ppo": Family("PPO (reward only)", {"algorithm.name": "ppo"}),
}

RATE, KL = "policy_optimizer.learning_rate", "algorithm.kl_coefficient"
MULTIPLIER_RATE = "algorithm.multiplier_learning_rate"

# Tried one after the other, each at the best of those before; it starts from the middle ones (of four, the third).
HYPERPARAMETERS = {
    RATE: (3e-5, 1e-4, 3e-4, 1e-3),
    KL: (0.03, 0.1, 0.3),
    MULTIPLIER_RATE: (0.03, 0.1, 0.3),
}

# The best of them, as `tune.py` printed it.
TUNED: dict[str, dict[str, float]] = {
    "repo": {RATE: 1e-4, KL: 0.03, MULTIPLIER_RATE: 0.3},
    "repo_response": {RATE: 3e-4, KL: 0.1, MULTIPLIER_RATE: 0.03},
    "ppo_lag": {RATE: 3e-5, KL: 0.03, MULTIPLIER_RATE: 0.03},
    "hc_lag": {RATE: 3e-5, KL: 0.3, MULTIPLIER_RATE: 0.03},
    "reward_shaping": {RATE: 1e-4, KL: 0.1},
    "ppo": {RATE: 3e-5, KL: 0.03},
}


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


def hyperparameters(family: str) -> dict[str, float]:
    """What a family runs with."""
    return TUNED[FAMILIES[family].tuned_as or family]


def headline(grid: list[Setting]) -> list[Setting]:
    """The settings with the most seeds."""
    most = max(setting.seeds for setting in grid)
    return [setting for setting in grid if setting.seeds == most]
