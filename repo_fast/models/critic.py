"""Critics: what the rest of a response is worth, for each stream of scores, before each of its tokens."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from repo_fast.models.attention import run_packed
from repo_fast.models.score_model import ScoreHead, ScoreModel
from repo_fast.packing.bounds import Bounds


class Critic(nn.Module):
    """A trunk with a head for each stream that it values: one stream, or all of them on a shared trunk.

    Args:
        model: The score model that it starts from: the trunk, and heads of streams.
        streams: `reward`, the names of constraints, or all of them.
        dtype: Of the heads. DeepSpeed trains parameters of one dtype; it keeps float32 masters, and heads compute in
            float32 anyway.
        outputs: By stream, the output of the model that its head starts from; others start at zero. None: the first
            stream's from the first.
    """

    def __init__(
        self,
        model: ScoreModel,
        streams: tuple[str, ...],
        dtype: torch.dtype,
        outputs: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.streams = model.trunk, streams
        outputs = {streams[0]: 0} if outputs is None else outputs
        started: dict[str, ScoreHead] = {}
        for stream, output in outputs.items():
            own = _row(model.score_head, output)
            # A single output may start several streams, which must not share what they learn.
            started[stream] = copy.deepcopy(own) if own in started.values() else own
        heads: dict[str, nn.Module] = {}
        for stream in streams:
            heads[_key(stream)] = started[stream] if stream in started else _zero(model.score_head.in_features)
        self.heads = nn.ModuleDict(heads).to(dtype)
        self._normalizers = {stream: model.normalization[output] for stream, output in outputs.items()}

    def head(self, stream: str) -> nn.Module:
        """That of a stream."""
        return self.heads[_key(stream)]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        bounds: Bounds | None = None,
    ) -> torch.Tensor:
        """Values some positions of packed sequences.

        Args:
            input_ids: int64 [1, N].
            position_ids: int64 [1, N], from 0 in each sequence.
            positions: int64 [M], where in the row to read.
            bounds: As for `run_packed`.

        Returns:
            float32 [C, M], a row for each of the C streams.
        """
        hidden = run_packed(self.trunk, input_ids, position_ids, bounds)[0, positions]
        values = []
        for stream in self.streams:
            mean, std = self._normalizers.get(stream, (0.0, 1.0))
            values.append((self.head(stream)(hidden)[:, 0] - mean) / std)
        return torch.stack(values)


def _row(head: ScoreHead, output: int) -> ScoreHead:
    """One output of a head, as a head of its own."""
    if head.out_features == 1:
        return head
    own = ScoreHead(head.in_features, 1, bias=head.bias is not None, dtype=head.weight.dtype)
    with torch.no_grad():
        own.weight.copy_(head.weight[output : output + 1])
        if head.bias is not None:
            own.bias.copy_(head.bias[output : output + 1])
    return own


def _zero(width: int) -> ScoreHead:
    head = ScoreHead(width, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head


def _key(stream: str) -> str:
    """Of a head: a constraint may have the name of a module's attribute, `type` for one, which torch refuses."""
    return stream if stream in ("reward", "cost") else f"{stream}_head"
