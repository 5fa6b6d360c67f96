"""The constraints of a run: their violations and multipliers, and what the loss is told of them.

One alone is handled in the plain form, [S] and [T], as everywhere; several have a leading dimension, [K, S] and [K, T].
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from repo_fast.config import ONLY, ConstraintConfig, PidConfig, TrainConfig
from repo_fast.errors import InputError
from repo_fast.objective.algorithm import ALGORITHMS, Multiplier, Violation
from repo_fast.objective.constraints import Constraint, Controller, FixedMultiplier, PidMultiplier
from repo_fast.ops import prompt_violations

# Where a multiplier starts at least that ascends in its logarithm.
LEAST = 1e-3


class Constraints:
    """K constraints in their order, by name. A cost of -inf says that one does not apply to a response.

    Args:
        by_name: At least one; none is called `reward`, as the other stream is.
    """

    def __init__(self, by_name: Mapping[str, Constraint]) -> None:
        self._by_name = dict(by_name)
        if not self._by_name or "reward" in self._by_name:
            raise ValueError(f"constraints must be one or more, none called 'reward', got {list(self._by_name)}")
        self.names = list(self._by_name)

    @classmethod
    def of(cls, config: TrainConfig) -> "Constraints":
        """Those of a configuration, whose scores have their names."""
        return cls({name: _constraint(own, config) for name, own in config.costs.items()})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Constraint:
        return self._by_name[name]

    @property
    def multipliers(self) -> list[float]:
        return [constraint.controller.value for constraint in self._by_name.values()]

    @property
    def rectify(self) -> list[bool]:
        return [constraint.rectify for constraint in self._by_name.values()]

    def violations(
        self, costs: torch.Tensor, prompt_ids: torch.Tensor, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """Step 3, of this rank's costs [K, S], with means over those of all ranks: float32 [K, S]."""
        return prompt_violations(
            costs,
            prompt_ids,
            scope=[constraint.scope for constraint in self._by_name.values()],
            threshold=[constraint.threshold for constraint in self._by_name.values()],
            group=group,
        )

    def update_multipliers(
        self, costs: torch.Tensor, violations: torch.Tensor, prompt_ids: torch.Tensor
    ) -> dict[str, float]:
        """Step 9, from costs and violations [K, S] of all ranks.

        Returns:
            Of each: `multiplier`, and where it applies to some response J, `constraint`, and `unsafe_fraction`; of
            several behind their names.
        """
        metrics: dict[str, float] = {}
        for (name, constraint), own_costs, own in zip(self._by_name.items(), costs, violations, strict=True):
            measured = constraint.controller.update(own_costs, own, prompt_ids)
            found = {"multiplier": constraint.controller.value}
            if measured is not None:
                found["constraint"] = measured
                found["unsafe_fraction"] = float((own[own != -torch.inf] > 0).double().mean())
            prefix = "" if len(self) == 1 else f"{name}_"
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
        return metrics

    def plain(self, streams: torch.Tensor) -> torch.Tensor:
        """[K, ...] as it is, but [...] of the only one."""
        return streams[0] if len(self) == 1 else streams

    @property
    def loss_options(self) -> dict[str, Any]:
        """`multiplier` and `rectify` of the policy losses."""
        if len(self) == 1:
            return {"multiplier": self.multipliers[0], "rectify": self.rectify[0]}
        return {"multiplier": self.multipliers, "rectify": self.rectify}

    def begin(self, name: str, multiplier: float) -> None:
        """Start from a multiplier that was computed, before the first update.

        One that ascends in its logarithm would never leave 0, and starts from 1e-3 at least.
        """
        controller = self[name].controller
        controller.begin(max(multiplier, LEAST) if isinstance(controller, Multiplier) else multiplier)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: of one, `multiplier`, as checkpoints always had it; of several, by name."""
        states = {name: constraint.controller.state_dict() for name, constraint in self._by_name.items()}
        return {"multiplier": states[ONLY]} if self.names == [ONLY] else {"multipliers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `InputError` for the state of other constraints."""
        states = state["multipliers"] if "multipliers" in state else {ONLY: state["multiplier"]}
        if states.keys() != self._by_name.keys():
            raise InputError(f"the checkpoint has multipliers of {sorted(states)}, expected those of {self.names}")
        for name, constraint in self._by_name.items():
            if states[name].keys() != constraint.controller.state_dict().keys():
                raise InputError(f"the checkpoint's multiplier of {name} is of another controller than the run's")
            constraint.controller.load_state_dict(states[name])


def _constraint(own: ConstraintConfig, config: TrainConfig) -> Constraint:
    """From a section whose values are all given."""
    row, threshold, values = ALGORITHMS[config.algorithm.name], own.threshold - own.margin, vars(own)
    kind = row.constraint
    if kind == "rectified" and own.scope == "batch":
        kind = "mean"
    measured = {
        "threshold": threshold,
        "window": values["cost_window"],
        "confidence_z": values["confidence_z"],
        "student": own.confidence == "t",
    }
    # What is computed from the reference's samples is not known yet.
    init, maximum = 1.0 if own.multiplier_init == "dual" else values["multiplier_init"], values["multiplier_max"]
    controller: Controller
    if own.controller == "dual" or kind is None:
        eta = values["multiplier_learning_rate"]
        controller = Multiplier(kind, init=init, learning_rate=eta, maximum=maximum, **measured)
    elif own.controller == "fixed":
        controller = FixedMultiplier(init, Violation(kind, **measured))
    else:
        assert own.controller == "pid"
        controller = PidMultiplier(init, maximum, Violation(kind, **measured), **vars(own.pid or PidConfig()))
    return Constraint(values["scope"], row.rectify and own.scope != "batch", threshold, controller)
