"""Weights handed over to another engine: in the form that it knows, and verified.

Another engine knows a model by its files. In memory, transformers gives some of it other names and shapes: it stacks
the experts of a layer, which the files list one by one. `as_in_files` undoes that.

Whether the engine then computes with what it was given is not left to trust: what it packs for its kernels, shares
between layers or keeps from before need not follow. `Verification` compares log-probabilities of fixed tokens.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from repo_fast.collectives import Ranks
from repo_fast.errors import InputError
from repo_fast.models.loss_head import Projection
from repo_fast.ops import linear_log_probs
from repo_fast.packing.rows import PackedBatch, pack

if TYPE_CHECKING:
    from repo_fast.engine import Engine

# Mean absolute gap of log-probabilities (nats) that the rounding of two sets of kernels may make.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# What is compared. A model that expects what it reads is far less sensitive to rounding: in bfloat16 on a CPU,
# SmolLM2-135M differs from the same in vLLM by 0.04 nats a token of this, and by 0.07 to 0.11 of random tokens.
_TEXT = (
    "There are seven days in a week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday. There are "
    "twelve months in a year: January, February, March, April, May, June, July, August, September, October, "
    "November and December. To make a cup of tea, first boil some water in a kettle. While the water is heating, "
    "put a tea bag into a cup. Pour the hot water over the tea bag, and let it steep for three to five minutes. "
    "Then take the tea bag out, and add milk or sugar if you like. I can count from one to twenty: one, two, three, "
    "four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, "
    "eighteen, nineteen, twenty. The first letters of the alphabet are a, b, c, d, e, f, g, h, i, j, k, l, m, n, o "
    "and p."
)
_TOKENS = 128
# What has fewer is not a text to the tokenizer.
_LEAST_DISTINCT = 16
# Once the policy has moved by so many tolerances, a part of the engine that stayed behind would have shown.
_DECISIVE = 10

LogProbs = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def as_in_files(
    model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a transformers model with the names and shapes of its files, a block of layers at a time.

    Args:
        model: Whose they are; its own parameters may be shards.
        weights: Name and value of each, in the order of the model. A value must last until its block is over.
    """
    for _, block in itertools.groupby(weights, key=lambda weight: _block(weight[0])):
        yield from revert_weight_conversion(model, dict(block)).items()


def _block(name: str) -> str:
    """Where a weight stands: `model.layers.3` of `model.layers.3.mlp.gate.weight`."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return name if found is None else found[0]


class Verification:
    """Makes sure that an engine which weights were handed over to computes what the policy does.

    Once after the first hand-over; and since a part that the engine had already, or takes over only once, shows when
    the policy has moved, after each hand-over until it has moved far enough: its own log-probabilities by ten times
    the tolerance.

    Args:
        engine: What it is called, for the message.
        path: The policy's folder or hub name, for the message.
        tokens: That the rows are cut from, as `fixed_tokens` gives them.
        start: What each row starts with; None: nothing.
        longest: Tokens of a row at most; at least 2.
        dtype: Of weights and activations.
        ranks: This process among all.
        instead: What to do where it does not, for the message.
    """

    def __init__(
        self,
        engine: str,
        path: str,
        tokens: Sequence[int],
        *,
        start: int | None,
        longest: int,
        dtype: torch.dtype,
        ranks: Ranks,
        instead: str,
    ) -> None:
        self._engine, self._path, self._ranks, self._dtype, self._instead = engine, path, ranks, dtype, instead
        self.rows = fixed_rows(tokens, start, longest)
        self._first: torch.Tensor | None = None
        self.is_over = False

    def __call__(self, policy: "Engine", log_probs: LogProbs) -> None:
        """Compare, unless it is over. All ranks must call it, after a hand-over.

        Args:
            policy: Whose weights were handed over.
            log_probs: The engine's log-probabilities (nats) of all tokens of rows but each one's first, one after the
                other: float32 [T], CPU.

        Raises:
            InputError: On every rank, where the engine of one is off by more than the tolerance of its dtype.
        """
        if self.is_over:
            return
        ours = policy_log_probs(policy, self.rows, self._ranks.device)
        self.check(ours, log_probs)
        if self._first is None:
            self._first = ours
        moved = float((ours - self._first).abs().mean())
        self.is_over = self._ranks.any(moved >= _DECISIVE * TOLERANCE[self._dtype])

    def check(self, ours: torch.Tensor | None, log_probs: LogProbs) -> None:
        """Compare with what the policy computed of `rows` (`policy_log_probs`); None on a rank that did not.

        Raises:
            InputError: As above.
        """
        tolerance = TOLERANCE[self._dtype]
        with self._ranks.together(f"the verification of {self._engine}"):
            theirs = log_probs(self.rows)
            if ours is None:
                return
            gap = float((theirs - ours).abs().mean())
            # A NaN is not within it.
            if not gap <= tolerance:
                raise InputError(
                    f"{self._engine} does not compute what the policy {self._path!r} does: log-probabilities of "
                    f"{ours.numel()} tokens differ by {gap:.3g} nats on average, expected at most {tolerance:g} in "
                    f"{str(self._dtype).removeprefix('torch.')}; {self._instead}"
                )


def fixed_tokens(tokenizer: PreTrainedTokenizerBase, ordinary: Sequence[int]) -> list[int]:
    """Tokens that are always the same: of a text, or where the tokenizer does not know its words, drawn at random.

    Moves no random state.

    Args:
        tokenizer: The policy's.
        ordinary: The ids that may be among them.
    """
    known = set(ordinary)
    tokens = [token for token in tokenizer(_TEXT, add_special_tokens=False).input_ids if token in known][:_TOKENS]
    if len(tokens) == _TOKENS and len(set(tokens)) >= _LEAST_DISTINCT:
        return tokens
    places = torch.randint(len(ordinary), (_TOKENS,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ordinary)[places].tolist()


def fixed_rows(tokens: Sequence[int], start: int | None, longest: int) -> list[torch.Tensor]:
    """Cut tokens into rows (int64, CPU). Each begins with `start`, or without it with the last token of another."""
    length = longest - 1
    if start is None:
        cuts = [tokens[place : place + length + 1] for place in range(0, len(tokens) - 1, length)]
    else:
        cuts = [[start, *tokens[place : place + length]] for place in range(0, len(tokens), length)]
    return [torch.tensor(cut) for cut in cuts]


@torch.no_grad()
def policy_log_probs(policy: "Engine", rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The policy's own, at temperature 1, as `Verification` takes them of an engine. All ranks must call it."""

    def at_head(hidden: torch.Tensor, projection: Projection, batch: PackedBatch) -> torch.Tensor:
        return linear_log_probs(hidden, projection.weight, batch.targets, **projection.options)

    parts = [policy(pack([row[:1]], [row[1:]], device), at_head) for row in rows]
    return torch.cat(parts).float().cpu()
