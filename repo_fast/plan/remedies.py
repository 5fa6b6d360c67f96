"""Whether a run fits its devices, the largest micro-batch that does, and what to switch on where nothing does.

What helps is tried, not assumed: a change that spares one model's weights may part them from a base that others share,
and what one phase needs less of, another may hold already.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from repo_fast.config import RolloutVllmConfig, TrainConfig
from repo_fast.errors import InputError
from repo_fast.plan.memory import Memory, longest_row, memory, vllm_bytes, vllm_cache_tokens
from repo_fast.plan.networks import Network, networks
from repo_fast.plan.speed import Device
from repo_fast.scoring import load_scorer_spec

# Left for what is not counted: CUDA's context, NCCL's buffers, the allocator's fragments.
USABLE = 0.9
CUDA = torch.device("cuda")
# With fewer at once, a device mostly waits while it draws: the fewest that are advised while something else helps.
_DRAWN_AT_ONCE = 16
_FEWEST_DRAWN = 4
# Bytes: what spares less would read as no change.
_FELT = 0.1e9
_LARGEST_SEARCHED = 2**24
_MICRO_BATCH_STEP = 256

Section = TypeVar("Section")
Change = Mapping[str, Any]
"""Options by their dotted names, and their values."""


@dataclass(frozen=True)
class Plan:
    """A run on devices of a kind.

    Attributes:
        config: Of the run.
        gpus: Ranks, one on each.
        device: What kind.
        dtype: Of weights and activations.
    """

    config: TrainConfig
    gpus: int
    device: Device
    dtype: torch.dtype
    # By what they depend on: a large one takes seconds, and many changes leave all as they are.
    _built: dict[str, list[Network]] = field(default_factory=dict, compare=False)

    @cached_property
    def models(self) -> list[Network]:
        """Those of the run; raises `InputError` where one cannot be read."""
        config = self.config
        key = repr((config.policy, config.critics, config.all_scorers))
        if key not in self._built:
            self._built[key] = networks(config, self.dtype)
        return self._built[key]

    @cached_property
    def held(self) -> Memory:
        """On each rank."""
        return memory(self.config, self.models, self.gpus, self.dtype, CUDA, self.device.memory)

    @property
    def room(self) -> float:
        """Bytes of a device that can be used."""
        return USABLE * self.device.memory

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens

    @property
    def draws_by_vllm(self) -> bool:
        return self.config.rollout.engine == "vllm"

    @property
    def vllm_tokens(self) -> float:
        """How many tokens vLLM's cache has room for; below 0, its copy of the weights does not fit its share."""
        return vllm_cache_tokens(self.config, self.models[0], self.dtype, self.device.memory)

    @property
    def holds_vllm(self) -> bool:
        """Whether vLLM's share holds its copy of the policy and one sequence, where it draws."""
        return not self.draws_by_vllm or self.vllm_tokens >= self.longest

    @property
    def fits(self) -> bool:
        return self.held.peak <= self.room and self.holds_vllm

    def vllm_share(self, sequences: int) -> float:
        """The least `rollout.vllm.memory_share`, in hundredths, that holds its copy and so many sequences."""
        needed = vllm_bytes(self.config, self.models[0], self.dtype, sequences * self.longest)
        return math.ceil(100 * needed / self.device.memory) / 100

    def changed(self, options: Change) -> "Plan":
        """The same with other values of some options."""
        if options.get("rollout.engine") == "hf":
            # What is set for vLLM would be refused.
            options = {"rollout.vllm": RolloutVllmConfig(), **options}
        return replace(self, config=_with(self.config, options))


def largest_micro_batch(plan: Plan) -> tuple[int, bool]:
    """The largest `update.micro_batch_tokens` that fits, to some hundred tokens, where that of the plan does.

    Returns:
        Tokens, at least as many as the plan has; and whether larger ones were tried, and do not fit.
    """

    def fits(tokens: int) -> bool:
        return plan.changed({"update.micro_batch_tokens": tokens}).fits

    low = plan.config.update.micro_batch_tokens
    high = 2 * low
    while fits(high):
        low, high = high, 2 * high
        if low > _LARGEST_SEARCHED:
            return low, False
    while low < (middle := (low + high) // 2 // _MICRO_BATCH_STEP * _MICRO_BATCH_STEP):
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, True


def remedies(plan: Plan) -> list[tuple[Change, Plan]]:
    """What to change where a plan does not fit, one after the other, cheapest first.

    Returns:
        Each change, and the plan with it and all before: it makes vLLM fit, or is smaller than the one before. The last
        fits, and would not without any of the changes; or nothing that is known here helps further.

    Raises:
        InputError: A model cannot be read.
    """
    found = _found(plan)
    return _needed(plan, found) if found and found[-1][1].fits else found


def _needed(plan: Plan, found: Sequence[tuple[Change, Plan]]) -> list[tuple[Change, Plan]]:
    """Those of some changes, with which a plan fits, that it needs for that; the dearest are left out first."""
    needed = [change for change, _ in found]
    for change in needed[::-1]:
        others = [other for other in needed if other is not change]
        try:
            if _all(plan, others).fits:
                needed = others
        except InputError:  # of one that asks for another
            continue
    steps: list[tuple[Change, Plan]] = []
    together: Change = {}
    for number, change in enumerate(needed, 1):
        before, changed = steps[-1][1] if steps else plan, _all(plan, needed[:number])
        together = {**together, **change}
        # One that helps only beside the next is told with it.
        if changed.fits or _helps(changed, before):
            steps.append((together, changed))
            together = {}
    return steps


def _all(plan: Plan, changes: Sequence[Change]) -> Plan:
    return plan.changed({option: value for change in changes for option, value in change.items()})


def _helps(changed: Plan, plan: Plan) -> bool:
    if not plan.holds_vllm:
        return changed.holds_vllm
    return changed.holds_vllm and changed.held.peak < plan.held.peak - _FELT


def _found(plan: Plan) -> list[tuple[Change, Plan]]:
    if plan.holds_vllm:
        return _smaller_and_smaller(plan)
    share = plan.vllm_share(_DRAWN_AT_ONCE)
    if share < 1:
        found = _beginning_with({"rollout.vllm.memory_share": share}, plan)
        if found[-1][1].fits and found[-1][1].draws_by_vllm:
            return found
    return _beginning_with(_drawn_by_hf(plan.config), plan)


def _beginning_with(change: Change, plan: Plan) -> list[tuple[Change, Plan]]:
    changed = plan.changed(change)
    return [(change, changed), *_smaller_and_smaller(changed)]


def _smaller_and_smaller(plan: Plan) -> list[tuple[Change, Plan]]:
    """The first of the options that helps, again and again until the plan fits."""
    found: list[tuple[Change, Plan]] = []
    while not plan.fits:
        for change in _options(plan):
            changed = plan.changed(change)
            if _helps(changed, plan):
                break
        else:
            return found
        found.append((change, changed))
        plan = changed
    return found


def _options(plan: Plan) -> Iterator[Change]:
    """What may be changed next, cheapest first."""
    config, engine, rollout = plan.config, plan.config.engine, plan.config.rollout
    # Weights are shared in stages 1 and 2 alone.
    may_shard = engine.share_base is not True
    if may_shard and engine.zero_stage != 3:
        yield {"engine.zero_stage": 3}
    if not engine.activation_checkpointing:
        yield {"engine.activation_checkpointing": True}
    if config.update.micro_batch_tokens > longest_row(config):
        yield {"update.micro_batch_tokens": longest_row(config)}
    if plan.draws_by_vllm:
        if (share := plan.vllm_share(_DRAWN_AT_ONCE)) < rollout.vllm.memory_share:
            yield {"rollout.vllm.memory_share": share}
    elif rollout.batch_size > _DRAWN_AT_ONCE:
        yield {"rollout.batch_size": _DRAWN_AT_ONCE}
    if len(config.critic_streams) > 1:
        yield {"critics.shared_trunk": True}
    yield from _in_4_bits(config)
    if plan.draws_by_vllm:
        yield _drawn_by_hf(config)
    elif rollout.batch_size > _FEWEST_DRAWN:
        yield {"rollout.batch_size": _FEWEST_DRAWN}
    if not engine.offload_optimizer:
        yield {"engine.offload_optimizer": True}
    for name in ("offload_frozen", "offload_parameters"):
        applies = name == "offload_parameters" or any(not model.trained for model in plan.models)
        if may_shard and applies and not getattr(engine, name):
            yield ({} if engine.zero_stage == 3 else {"engine.zero_stage": 3}) | {f"engine.{name}": True}


def _drawn_by_hf(config: TrainConfig) -> Change:
    return {"rollout.engine": "hf", "rollout.batch_size": min(_DRAWN_AT_ONCE, config.rollout.batch_size)}


def _in_4_bits(config: TrainConfig) -> Iterator[Change]:
    """Of the policy alone, which leaves scores as they are; then of all models, so that they go on to share a base."""
    trained = {"policy": config.policy, "critics": config.critics}
    adapted = [name for name, own in trained.items() if own.lora.rank and own.quantize is None]
    read = [
        config.section_of(name)
        for name, own in config.all_scorers.items()
        if own.quantize is None and load_scorer_spec(own.path, name).kind in ("model", "guard")
    ]
    for sections in (["policy"] if "policy" in adapted else [], [*adapted, *read]):
        if sections:
            yield {f"{name}.quantize": "nf4" for name in sections}


def _with(section: Section, options: Change) -> Section:
    """A section, or a mapping of sections, with other values of some options."""
    values: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        name, _, rest = key.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    for name, own in below.items():
        values[name] = _with(section[name] if isinstance(section, dict) else getattr(section, name), own)
    if isinstance(section, dict):
        return section | values
    return replace(section, **values)
