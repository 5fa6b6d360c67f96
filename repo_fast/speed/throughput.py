"""What a training step achieves, phase by phase: tokens and operations a second, memory, padding.

A step's phases are `generate`, `score`, `experience` (log-probabilities and values of what was generated) and `update`.
Tokens are real ones, prompts included, once for each model that reads them (also where responses share a prompt); in
`generate`, those of the responses.
Operations are those of `repo_fast.speed.flops`, without scorers and PTX, for what these run is the user's.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import UpdateConfig
from repo_fast.report.jsonl import Value
from repo_fast.report.tables import grid
from repo_fast.rollout import Rollout
from repo_fast.speed.flops import Shape, peak_flops

PHASES = ("generate", "score", "experience", "update")


@dataclass
class Measured:
    """A phase on this rank, once it is over.

    Attributes:
        started: By `time.perf_counter`.
        seconds: Its duration.
        peak_memory: The most that was held during it: on CUDA bytes of torch's allocator, else of the process.
    """

    started: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0


def reset_peak_memory(device: torch.device) -> None:
    """From here on, `peak_memory` is measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux sets the process's high-water mark back.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """The most bytes held since `reset_peak_memory`; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


@dataclass(frozen=True)
class Throughput:
    """Turns the phases of steps into metrics.

    Attributes:
        policy: None where its operations cannot be counted.
        critics: Likewise.
        epochs: Passes of the update over a rollout.
        log_probs: Forwards of the policy or its reference that an experience takes.
        ranks: This process among all.
        peak: FLOP/s of a rank's device at most; None where it is not known.
    """

    policy: Shape | None
    critics: Sequence[Shape | None]
    epochs: int
    ranks: Ranks
    peak: float | None = None
    log_probs: int = 2

    @classmethod
    def of(
        cls, policy: torch.nn.Module, critics: Sequence[torch.nn.Module], update: UpdateConfig, ranks: Ranks
    ) -> "Throughput":
        """For models of transformers' that are trained."""
        shapes = [Shape.of(trunk) for trunk in critics]
        log_probs = 1 if update.old_log_probs == "sampler" else 2
        return cls(Shape.of(policy), shapes, update.epochs, ranks, peak_flops(ranks.device), log_probs)

    def metrics(self, rollout: Rollout, phases: Mapping[str, Measured]) -> dict[str, float]:
        """A step's metrics over all ranks; all ranks must call it.

        Args:
            rollout: This rank's.
            phases: By name, as measured on this rank.

        Returns:
            For each phase `PHASE_seconds` (of the first rank), `PHASE_tokens`, `PHASE_tokens_per_second` and
            `PHASE_peak_gb` (of the rank with most, 10⁹ bytes); `PHASE_tflops` a rank and second where the operations
            are counted, and `PHASE_mfu`, their share of the device's peak where that is known; `padding_share`, of the
            positions that generation computed.
        """
        ranks = self.ranks
        prompts, responses = (
            ranks.gather(torch.tensor([tokens.numel() for tokens in parts], dtype=torch.int64)).tolist()
            for parts in (rollout.prompt_tokens, rollout.response_tokens)
        )
        computed = float(ranks.sum(torch.tensor([rollout.computed_positions]))[0])
        lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        all_tokens, drawn, critics = sum(lengths), sum(responses), len(self.critics)
        tokens = {
            "generate": drawn,
            "score": 2 * all_tokens,
            "experience": (self.log_probs + critics) * all_tokens,
            "update": self.epochs * (1 + critics) * all_tokens,
        }
        operations = self._operations(lengths, drawn)
        peaks = [ranks.max(phases[phase].peak_memory) for phase in PHASES]
        record: dict[str, float] = {}
        for phase, peak in zip(PHASES, peaks, strict=True):
            seconds = phases[phase].seconds
            record[f"{phase}_seconds"] = seconds
            record[f"{phase}_tokens"] = tokens[phase]
            record[f"{phase}_tokens_per_second"] = tokens[phase] / seconds
            record[f"{phase}_peak_gb"] = peak / 1e9
            if phase in operations:
                each = operations[phase] / ranks.size / seconds
                record[f"{phase}_tflops"] = each / 1e12
                if self.peak is not None:
                    record[f"{phase}_mfu"] = each / self.peak
        record["padding_share"] = 1 - all_tokens / computed if computed else 0.0
        return record

    def _operations(self, lengths: list[int], drawn: int) -> dict[str, int]:
        """By phase, on all ranks."""
        if self.policy is None or any(critic is None for critic in self.critics):
            return {}
        critics = [critic for critic in self.critics if critic is not None]
        update = self.policy.forward_and_backward(lengths, drawn)
        update += sum(critic.forward_and_backward(lengths, 0) for critic in critics)
        return {
            # A cache spares the same products that a forward of the whole would do once.
            "generate": self.policy.forward(lengths, drawn),
            "experience": self.log_probs * self.policy.forward(lengths, drawn)
            + sum(c.forward(lengths, 0) for c in critics),
            "update": self.epochs * update,
        }


def speed_table(steps: Sequence[Mapping[str, Value]], ranks: int) -> str:
    """Where the time of a run went: medians over its steps.

    Args:
        steps: Their metrics.
        ranks: How many took part, a GPU each where there are GPUs.
    """

    def median(key: str, shown: Callable[[float], str]) -> str:
        values = [value for row in steps if isinstance(value := row.get(key), int | float)]
        return shown(statistics.median(values)) if values else "-"

    rows = [
        [
            phase,
            median(f"{phase}_seconds", "{:.2f}".format),
            median(f"{phase}_tokens", "{:,.0f}".format),
            median(f"{phase}_tokens_per_second", "{:,.0f}".format),
            median(f"{phase}_tokens_per_second", lambda value: f"{value / ranks:,.0f}"),
            median(f"{phase}_tflops", "{:.3g}".format),
            median(f"{phase}_mfu", "{:.1%}".format),
            median(f"{phase}_peak_gb", "{:.2f}".format),
        ]
        for phase in PHASES
    ]
    heads = ["", "seconds", "tokens", "tokens/s", "... a rank", "TFLOP/s a rank", "MFU", "peak GB a rank"]
    padding = median("padding_share", "{:.1%}".format)
    # An encoder that scores is padded too; what it computes is not counted.
    note = f"Medians of {len(steps)} steps. Padding: {padding} of generation; packed rows have none."
    return f"{grid(heads, rows)}\n{note}"
