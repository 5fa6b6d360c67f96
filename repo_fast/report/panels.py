"""Which columns of a run's logs are drawn, and what they are called: in `plots/*.png` and on the run's page alike."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# Metric, and axis label with the unit.
Panel = tuple[str, str]
# Those of a constraint come for each of several, behind its name.
OF_CONSTRAINTS = {
    "cost": "mean cost (score)",
    "strict_violation": "strict violation (cost score)",
    "safety_rate": "safety rate (share of responses)",
    "multiplier": "multiplier λ (no unit)",
}
# Of training: file name -> its panels from top to bottom.
PICTURES: Mapping[str, Sequence[Panel]] = {
    "reward_and_cost": [("reward", "mean reward (score)"), ("cost", OF_CONSTRAINTS["cost"])],
    "safety": [(key, OF_CONSTRAINTS[key]) for key in ("strict_violation", "safety_rate")],
    "multiplier": [("multiplier", OF_CONSTRAINTS["multiplier"])],
    "kl_and_entropy": [("kl", "KL to the reference (nats/response)"), ("entropy", "entropy (nats/token)")],
    "response_length": [("response_length", "response length (tokens)")],
    "loss": [("loss", "policy loss (no unit)"), ("clip_fraction", "clip fraction (share of tokens)")],
}
# Of the evaluations while training; under several constraints those of costs come for each.
EVALUATED: Sequence[Panel] = [
    ("mean_reward", "mean reward (score)"),
    ("mean_second_reward", "mean second reward (score)"),
    *PICTURES["safety"],
    ("kl", "KL to the reference (nats/response)"),
    ("well_formed", "well-formed (share of responses)"),
    ("response_length", "response length (tokens)"),
]
SPEED: Sequence[Panel] = [("tokens_per_second", "throughput (tokens/s)")]
_OPTIMIZER: Sequence[Panel] = [
    ("gradient_norm", "gradient norm (no unit)"),
    ("learning_rate", "learning rate (no unit)"),
]
# Of supervised fine-tuning, and of score models.
FINE_TUNING: Mapping[str, Sequence[Panel]] = {
    "loss": [("loss", "training loss (nats/token)"), ("eval_loss", "held-out loss (nats/token)")],
    "optimizer": _OPTIMIZER,
    "speed": SPEED,
}
SCORES: Mapping[str, Sequence[Panel]] = {
    "loss": [("loss", "training loss (no unit)"), ("eval_loss", "held-out loss (no unit)")],
    "accuracy": [
        ("ranking_accuracy", "held-out ranking accuracy (share of pairs)"),
        ("safety_accuracy", "held-out safety accuracy (share of responses)"),
        ("ranking_calibration_error", "held-out calibration error (share)"),
    ],
    "optimizer": _OPTIMIZER,
    "speed": SPEED,
}
# Steps from which a running mean is drawn over them, since those of RL are noisy.
SMOOTH_FROM = 30


def panels_of(panels: Sequence[Panel], constraints: Sequence[str]) -> Iterator[Panel]:
    """The panels of a picture, with those of a constraint for each of them; '' is the only one."""
    for key, label in panels:
        if key not in OF_CONSTRAINTS or list(constraints) == [""]:
            yield key, label
            continue
        if key == "safety_rate":
            yield key, f"{label} of all"
        yield from ((column(name, key), f"{name}: {label}") for name in constraints)


def column(constraint: str, metric: str) -> str:
    """The column of a metric of a constraint; '' is the only one."""
    return f"{constraint}_{metric}" if constraint else metric


def is_sparse(values: np.ndarray) -> bool:
    """Whether it was measured now and then: a point each then, since the gaps between would hide lone ones."""
    return bool(2 * np.isfinite(values).sum() < len(values))
