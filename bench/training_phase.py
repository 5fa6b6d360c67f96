"""The policy update of a training step: packed rows and the fused loss head beside padded rows with full logits.

    python -m bench.training_phase

One optimizer step (forward, backward and AdamW) on a rank's responses, on four paths that compute the same loss:

    padded, full logits         one batch, every prompt padded to the longest one, every response likewise, logits of
                                every position in float32: the way of Safe RLHF and most PPO trainers
    padded, ... in parts        the same, a few responses at a time, each part padded to its own longest
    ours                        what the trainer runs: packed rows of equal work, each sequence's attention by itself,
                                the fused loss head
    ours, prompts shared        with the option `update.share_prompts`: the responses of a prompt share it
    ours without ...            with one of these off: packing (the padded batch, the fused head at the response
                                tokens), the fused head (full logits of the response tokens), attention by itself (the
                                row under a block-diagonal mask), balance (rows filled in the order of the responses)

Lengths are evenly spaced, so the mean is half the longest. Model FLOPs are those of the matrix products and of causal
attention on real tokens, with a head at the response tokens only, three times the forward's: padding and recomputation
are not counted as work. A model too large for one device is measured at two depths, as deep as fits and half of that;
its full depth is their straight line and is called scaled.

transformers computes the layers, in all paths alike.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measuring.measure import Task, Timing, peak_scratch, time_interleaved
from bench.measuring.tables import at_least, render, render_targets
from repo_fast.learning.experience import Experience, MicroBatch
from repo_fast.models.attention import attention_candidates, run_packed
from repo_fast.ops import fused_rectified_policy_loss, prompt_violations, rectified_policy_loss
from repo_fast.packing.balance import micro_batches
from repo_fast.rollout import Rollout
from repo_fast.speed.flops import peak_flops

MULTIPLIER = 0.7
RESPONSES_PER_PROMPT = 4
BASELINE, OURS = "padded, full logits", "ours"
PART = 8  # responses of a padded part
IN_PARTS = f"{BASELINE}, in parts of {PART}"
# Weights and gradients in bfloat16; masters, their gradients and two moments in float32.
STATE_BYTES = 2 + 2 + 4 + 4 + 8
# What a Llama's layer keeps of a token for the backward in bfloat16, a unit of its widths: counted with
# torch.autograd.graph.saved_tensors_hooks.
WIDTH_BYTES, INTERMEDIATE_BYTES = 26, 8
# Of a device's free memory, for states and those; the rest is for logits and what a step holds for a moment.
FILLED_SHARE = 0.8


@dataclass(frozen=True)
class Geometry:
    """A Llama, and the responses of one optimizer step.

    Attributes:
        width, heads, intermediate, vocabulary, layers: Of the model.
        sequences: Responses in the step.
        prompts, responses: Shortest and longest, tokens.
        micro_batch_tokens: Of a packed row, at most.
    """

    width: int
    heads: int
    intermediate: int
    vocabulary: int
    layers: int
    sequences: int
    prompts: tuple[int, int]
    responses: tuple[int, int]
    micro_batch_tokens: int

    def config(self, layers: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            num_hidden_layers=layers,
            max_position_embeddings=self.prompts[1] + self.responses[1],
            attn_implementation="sdpa",
            use_cache=False,
        )

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        return 4 * self.width**2 + 3 * self.width * self.intermediate

    @property
    def layer_activation_bytes(self) -> int:
        """Of a token."""
        return WIDTH_BYTES * self.width + INTERMEDIATE_BYTES * self.intermediate

    def flop(self, layers: int, lengths: list[int], head_tokens: int) -> int:
        """Of forward and backward: matrix products and causal attention over sequences of `lengths` tokens."""
        body = 2 * layers * self.layer_parameters * sum(lengths)
        attention = 2 * layers * self.width * sum(length**2 for length in lengths)
        head = 2 * self.width * self.vocabulary * head_tokens
        return 3 * (body + attention + head)


GEOMETRIES = {
    # A rank's share of a step in repo_fast/configs/alpaca-7b.yaml.
    "alpaca-7b": Geometry(4096, 32, 11008, 32001, 32, 16, (1, 128), (1, 384), micro_batch_tokens=8192),
    # Its responses are 16,384 tokens with their prompts.
    "alpaca-7b, one row": Geometry(4096, 32, 11008, 32001, 32, 64, (1, 128), (1, 382), micro_batch_tokens=16384),
    # Large enough for a GPU's generation, small enough to be made and read in seconds.
    "half-billion": Geometry(2048, 16, 5504, 32001, 8, 32, (1, 128), (1, 384), micro_batch_tokens=8192),
    # Micro-batches of 512, 1024 and 8192 tokens were slower, by 15, 5 and 4 %.
    "cpu": Geometry(256, 4, 688, 32001, 4, 32, (16, 64), (1, 256), micro_batch_tokens=2048),
    "tiny": Geometry(64, 2, 160, 301, 2, 8, (1, 8), (1, 24), micro_batch_tokens=64),
}


@dataclass(frozen=True)
class Path:
    """How the loss is computed.

    Attributes:
        packed: Packed rows, else padded ones.
        fused: By the fused head, else from logits.
        masked: Attention of a packed row under a mask.
        balanced: Packed rows of equal work.
        shared: The responses of a prompt share it.
        part: Padded responses at once; 0: all.
    """

    packed: bool = True
    fused: bool = True
    masked: bool = False
    balanced: bool = True
    shared: bool = False
    part: int = 0


PATHS = {
    BASELINE: Path(packed=False, fused=False),
    IN_PARTS: Path(packed=False, fused=False, part=PART),
    OURS: Path(),
    f"{OURS}, prompts shared": Path(shared=True),
    f"{OURS} without packing": Path(packed=False),
    f"{OURS} without the fused head": Path(fused=False),
    f"{OURS} without attention by itself": Path(masked=True),
    f"{OURS} without balance": Path(balanced=False),
}
MAIN_PATHS = (BASELINE, IN_PARTS, OURS, f"{OURS}, prompts shared")


def make_experience(geometry: Geometry) -> Experience:
    """Random prompts and responses, with random values of all that the policy loss needs of them."""
    g = torch.Generator().manual_seed(0)
    S = geometry.sequences

    def draw(count: int, shortest: int, longest: int) -> list[Tensor]:
        lengths = torch.linspace(shortest, longest, count).round().long()[torch.randperm(count, generator=g)]
        return [torch.randint(geometry.vocabulary, (length,), generator=g) for length in lengths.tolist()]

    distinct = draw(S // RESPONSES_PER_PROMPT, *geometry.prompts)
    prompts = [prompt for prompt in distinct for _ in range(RESPONSES_PER_PROMPT)]
    responses = draw(S, *geometry.responses)
    cu_seqlens = torch.tensor([0, *map(len, responses)]).cumsum(0).int()
    T = int(cu_seqlens[-1])
    prompt_ids, costs = torch.arange(S) // RESPONSES_PER_PROMPT, torch.randn(S, generator=g)
    return Experience(
        rollout=Rollout(
            prompt_ids=prompt_ids,
            prompts=[""] * S,
            responses=[""] * S,
            prompt_tokens=prompts,
            response_tokens=responses,
            finished=torch.ones(S, dtype=torch.bool),
            sampler_log_probs=[],
        ),
        cu_seqlens=cu_seqlens,
        costs=costs,
        violations=prompt_violations(costs, prompt_ids),
        # Near those of a fresh model.
        old_log_probs=0.2 * torch.randn(T, generator=g) - math.log(geometry.vocabulary),
        reward_advantages=torch.randn(T, generator=g),
        cost_advantages=torch.randn(T, generator=g),
    )


@dataclass(frozen=True)
class Padded:
    """An experience's responses as a rectangle, prompts padded on their left and responses on their right.

    Attributes:
        input_ids, attention_mask: int64 [S, W].
        response_mask: bool [S, longest response], which of the last columns hold a response token.
        targets: int64 [T], the response tokens in order.
        old_log_probs, reward_advantages, cost_advantages: float32 [T], the response tokens in order.
        sequence_ids: int64 [T].
        violations: float32 [S].
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    targets: Tensor
    old_log_probs: Tensor
    reward_advantages: Tensor
    cost_advantages: Tensor
    sequence_ids: Tensor
    violations: Tensor

    @classmethod
    def of(cls, experience: Experience, indices: Sequence[int], device: torch.device) -> "Padded":
        """Of some of its responses."""
        prompts = [experience.rollout.prompt_tokens[i] for i in indices]
        responses = [experience.rollout.response_tokens[i] for i in indices]
        starts = experience.cu_seqlens.tolist()
        tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices])
        start = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), start + max(map(len, responses)), dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            own = slice(start - len(prompt), start + len(response))
            input_ids[row, own] = torch.cat([prompt, response])
            mask[row, own] = 1
        response_mask = mask[:, start:].bool()
        fields = (
            input_ids,
            mask,
            response_mask,
            torch.cat(responses),
            experience.old_log_probs[tokens],
            experience.reward_advantages[tokens],
            experience.cost_advantages[tokens],
            response_mask.nonzero()[:, 0],
            experience.violations[list(indices)],
        )
        return cls(*(field.to(device) for field in fields))


class MasterAdamW:
    """AdamW on float32 masters of bfloat16 parameters, as DeepSpeed's bf16 engine keeps them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.masters = [p.detach().float() for p in parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=1e-6, fused=True)

    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
        self.adam.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.detach().copy_(master)
            master.grad = None


class Update:
    """A freshly initialised policy, and optimizer steps on the same responses.

    Args:
        geometry: Of the model and the responses.
        layers: How deep the model is built.
        device: float32 on a CPU, bfloat16 elsewhere.
        checkpointing: Recompute a layer's activations in the backward.
    """

    def __init__(self, geometry: Geometry, layers: int, device: torch.device, checkpointing: bool) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model = LlamaForCausalLM(geometry.config(layers))
        parameters = list(self.model.parameters())
        if device.type == "cpu":
            self.optimizer: Any = torch.optim.AdamW(parameters, lr=1e-6)
        else:
            self.model.to(torch.bfloat16)
            self.optimizer = MasterAdamW(parameters)
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.experience = make_experience(geometry)
        self._device = device
        rollout, S, budget = self.experience.rollout, self.experience.responses, geometry.micro_batch_tokens
        prompts, responses = (list(map(len, parts)) for parts in (rollout.prompt_tokens, rollout.response_tokens))

        def pack(balanced: bool, shared: bool) -> list[MicroBatch]:
            rows = _in_order(self.experience.lengths(), budget)
            if balanced:
                prompt_ids = rollout.prompt_ids.tolist() if shared else None
                rows = micro_batches(
                    prompts, responses, budget, lambda length: geometry.flop(layers, [length], 0), prompt_ids
                )
            return [self.experience.select(row, device, shared) for row in rows]

        packed = {(path.balanced, path.shared) for path in PATHS.values() if path.packed}
        self.rows = {(balanced, shared): pack(balanced, shared) for balanced, shared in packed}
        self.padded = {
            part: [Padded.of(self.experience, range(S)[i : i + part], device) for i in range(0, S, part)]
            for part in (S, PART)
        }

    def losses(self, path: Path) -> Iterator[Tensor]:
        """RePO's policy loss, a scalar for each micro-batch; they add up to that of the step."""
        if not path.packed:
            self.model.set_attn_implementation("sdpa")
            yield from (self._padded_loss(part, path) for part in self.padded[path.part or self.experience.responses])
            return
        # As the trainer chooses it; prompts can be shared in its own implementation alone.
        own = attention_candidates("packed" if path.shared else "auto", self._device, self.model.dtype)[0]
        self.model.set_attn_implementation("sdpa" if path.masked else own)
        for micro_batch in self.rows[path.balanced, path.shared]:
            row = micro_batch.batch
            hidden = run_packed(self.model.base_model, row.input_ids, row.position_ids, row.bounds)
            hidden = hidden[0, row.predictors]
            yield self._loss(hidden, micro_batch, row.targets, row.sequence_ids, path.fused)

    def backward(self, path: Path) -> Tensor:
        """Forward and backward of all micro-batches, into gradients that are there already; the loss."""
        total = torch.zeros((), device=self._device)
        for loss in self.losses(path):
            loss.backward()
            total += loss.detach()
        return total

    def step(self, path: Path) -> None:
        """Forward, backward and the optimizer's step."""
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        self.backward(path)
        self.optimizer.step()

    def _padded_loss(self, padded: Padded, path: Path) -> Tensor:
        own = padded.response_mask
        if path.fused:
            outputs = self.model.base_model(input_ids=padded.input_ids, attention_mask=padded.attention_mask)
            # The states that predict the response tokens.
            hidden = outputs.last_hidden_state[:, -own.shape[1] - 1 : -1][own]
            return self._loss(hidden, padded, padded.targets, padded.sequence_ids, fused=True)
        logits = self.model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        log_probs = _gather_log_probs(logits[:, :-1], padded.input_ids[:, 1:])
        return self._loss_of(log_probs[:, -own.shape[1] :][own], padded, padded.sequence_ids)

    def _loss(
        self, hidden: Tensor, tokens: MicroBatch | Padded, targets: Tensor, sequence_ids: Tensor, fused: bool
    ) -> Tensor:
        """From the states [T, D] that predict the targets."""
        if not fused:
            return self._loss_of(_gather_log_probs(self.model.lm_head(hidden), targets), tokens, sequence_ids)
        return fused_rectified_policy_loss(
            hidden,
            self.model.lm_head.weight,
            targets,
            tokens.old_log_probs,
            tokens.reward_advantages,
            tokens.cost_advantages,
            sequence_ids,
            costs=None,
            prompt_ids=None,
            violations=tokens.violations,
            multiplier=MULTIPLIER,
            denominator=self.experience.responses,
        ).loss

    def _loss_of(self, log_probs: Tensor, tokens: MicroBatch | Padded, sequence_ids: Tensor) -> Tensor:
        return rectified_policy_loss(
            log_probs,
            tokens.old_log_probs,
            tokens.reward_advantages,
            tokens.cost_advantages,
            sequence_ids,
            tokens.violations,
            multiplier=MULTIPLIER,
            denominator=self.experience.responses,
        ).loss


def _in_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows filled one after the other."""
    rows: list[list[int]] = [[]]
    for index, length in enumerate(lengths):
        if rows[-1] and sum(lengths[i] for i in rows[-1]) + length > budget:
            rows.append([])
        rows[-1].append(index)
    return rows


def _gather_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax in float32 of logits [..., V], at targets [...]."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def layers_that_fit(geometry: Geometry, device: torch.device) -> int:
    """Layers whose states, with those of embedding and head, and whose activations of the tokens that are computed at
    once take `FILLED_SHARE` of the free device memory; all on a CPU."""
    if device.type == "cpu":
        return geometry.layers
    free, _ = torch.cuda.mem_get_info(device)
    ends = 2 * geometry.width * geometry.vocabulary * STATE_BYTES
    layer = geometry.layer_parameters * STATE_BYTES + geometry.micro_batch_tokens * geometry.layer_activation_bytes
    return max(2, min(geometry.layers, int((FILLED_SHARE * free - ends) // layer)))


def measure(
    geometry: Geometry,
    layers: int,
    device: torch.device,
    checkpointing: bool,
    budget_s: float,
    names: Sequence[str] = tuple(PATHS),
) -> dict[str, Any]:
    """Times the named paths beside the baseline, the first of them, and takes their memory.

    Returns:
        What was measured, with `paths` by name: `loss`; `ms` a step, the median, and `spread_ms`; `tokens_per_s`, real
        tokens, prompts included; `speedup` on the baseline; `model_tflops` (TFLOP/s) and `mfu`, their share of the
        data sheet's (None where it is not known); `scratch_mib`, activations and logits at the peak of forward and
        backward, and its `scratch_share` of the baseline's.
    """
    update = Update(geometry, layers, device, checkpointing)
    experience = update.experience
    S, W = update.padded[experience.responses][0].input_ids.shape
    lengths, response_tokens = experience.lengths(), int(experience.cu_seqlens[-1])
    # Before the first step, which moves the weights.
    losses = {name: update.backward(PATHS[name]).item() for name in names}
    scratch = {name: peak_scratch(Task(partial(update.backward, PATHS[name])), device) for name in names}
    tasks = {name: Task(partial(update.step, PATHS[name])) for name in names}
    baseline = tasks.pop(BASELINE)
    timings = time_interleaved(tasks, baseline, device, budget_s)
    own = [ms for timing in timings.values() for ms in timing.floor_milliseconds]
    timings = {BASELINE: Timing(own, own)} | timings

    flop = geometry.flop(layers, lengths, response_tokens)
    ids, prompts = experience.rollout.prompt_ids.tolist(), experience.rollout.prompt_tokens
    # Where it is shared, a prompt is work once.
    repeated = [len(prompt) for i, prompt in enumerate(prompts) if ids[i] in ids[:i]]
    spared = geometry.flop(layers, repeated, 0)
    peak = peak_flops(device)
    rows = {}
    for name, timing in timings.items():
        seconds = 1e-3 * timing.median_ms
        work = flop - spared if PATHS[name].shared else flop
        rows[name] = {
            "loss": losses[name],
            "ms": timing.median_ms,
            "spread_ms": timing.spread_ms,
            "tokens_per_s": sum(lengths) / seconds,
            "speedup": timing.share_of_floor,
            "model_tflops": 1e-12 * work / seconds,
            "mfu": None if peak is None else work / seconds / peak,
            "scratch_mib": scratch[name],
            "scratch_share": scratch[name] / scratch[BASELINE],
        }
    return {
        "geometry": asdict(geometry),
        "layers": layers,
        "parameters": sum(p.numel() for p in update.model.parameters()),
        "dtype": str(update.model.dtype).removeprefix("torch."),
        "activation_checkpointing": checkpointing,
        "tokens": sum(lengths),
        "response_tokens": response_tokens,
        "padded_tokens": S * W,
        "speedup_by_flop": geometry.flop(layers, [W] * S, S * W) / flop,
        "paths": rows,
    }


def scale(geometry: Geometry, deep: dict[str, Any], shallow: dict[str, Any]) -> dict[str, Any]:
    """A step of the full depth, in ms and tokens/s, on the straight line through two depths that were measured."""
    scaled = {}
    for name, other in shallow["paths"].items():
        ms = deep["paths"][name]["ms"]
        slope = (ms - other["ms"]) / (deep["layers"] - shallow["layers"])
        ms += slope * (geometry.layers - deep["layers"])
        scaled[name] = {"scaled_ms": ms, "scaled_tokens_per_s": 1e3 * deep["tokens"] / ms}
    baseline = scaled[BASELINE]["scaled_ms"]
    for row in scaled.values():
        row["scaled_speedup"] = baseline / row["scaled_ms"]
    return {"layers": geometry.layers, "measured_layers": [shallow["layers"], deep["layers"]], "paths": scaled}


def units(device: torch.device, tiny: bool, budget_s: float) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The measurements one after the other: their names, and functions that make them and return what they found.

    Args:
        device: Where to measure.
        tiny: A geometry of no interest, for a test.
        budget_s: Seconds for all rounds of all of them.
    """
    name = "tiny" if tiny else "alpaca-7b" if device.type == "cuda" else "cpu"
    geometry = GEOMETRIES[name]
    layers = layers_that_fit(geometry, device)
    depths = [layers] if layers == geometry.layers else [layers, layers // 2]
    found: dict[int, dict[str, Any]] = {}
    share = budget_s / (1 + len(depths))

    def paths(depth: int, checkpointing: bool, names: Sequence[str]) -> dict[str, Any]:
        result = measure(geometry, depth, device, checkpointing, share, names)
        if not checkpointing:
            found[depth] = result
        return result

    for depth in depths:
        yield f"{name}, {depth} layers", partial(paths, depth, False, tuple(PATHS) if depth == layers else MAIN_PATHS)
    if len(depths) == 2 and all(depth in found for depth in depths):
        yield f"{name}, scaled to {geometry.layers} layers", lambda: scale(geometry, *(found[d] for d in depths))
    if name != "cpu":  # where it is memory that limits a step
        yield f"{name}, {layers} layers, activations recomputed", partial(paths, layers, True, MAIN_PATHS)


def judge(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The targets of the update phase against what `units` found, by name: `value`, `target` and whether `met`."""
    targets: dict[str, Any] = {}
    for name, result in results.items():
        if "speedup_by_flop" not in result or result["geometry"] == asdict(GEOMETRIES["tiny"]):
            continue
        row = result["paths"][OURS]
        large = result["geometry"] == asdict(GEOMETRIES["alpaca-7b"])
        targets[f"tokens/s, ours / padded, {name}"] = at_least(row["speedup"], 1.8 if large else 2.2)
        if large:
            targets[f"scratch, padded / ours, {name}"] = at_least(1 / row["scratch_share"], 4.0)
        else:
            share = row["speedup"] / result["speedup_by_flop"]
            targets[f"speed-up / speed-up by FLOP, {name}"] = at_least(share, 0.9)
    return targets


def table(results: dict[str, dict[str, Any]]) -> str:
    """What `units` found, as text."""
    header = [
        "",
        "ms a step",
        "tokens/s",
        "x padded",
        "x by FLOP",
        "MFU",
        "scratch MiB",
        "of padded's",
        "loss - padded's",
    ]
    rows = []
    for name, result in results.items():
        rows.append([name, *[""] * (len(header) - 1)])
        for path, row in result["paths"].items():
            if "scaled_ms" in row:
                cells = [f"{row['scaled_ms']:.1f}", f"{row['scaled_tokens_per_s']:.0f}", f"{row['scaled_speedup']:.2f}"]
                cells += [""] * 5
            else:
                allowed = f"{result['speedup_by_flop']:.2f}" if path != BASELINE else ""
                mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
                cells = [f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f}", allowed, mfu]
                cells += [f"{row['scratch_mib']:.0f}", f"{row['scratch_share']:.2f}"]
                cells.append(f"{row['loss'] - result['paths'][BASELINE]['loss']:.0e}")
            rows.append([f"  {path}", *cells])
    return render(header, rows)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {name: run() for name, run in units(device, tiny=False, budget_s=120)}
    print(table(results), render_targets(judge(results)), sep="\n\n")
