"""A transformer trunk with a head of one or several scores: reward models, cost models, and the critics that start from
them.

How folders of them look is `score_checkpoint`'s. transformers loads the trunk, so that ZeRO-3 shards it on the way in;
the head is read from the file here, because transformers would only warn about one it does not find, and draw a fresh
one.

Sequences are scored packed, several in a row whose `position_ids` start anew at each: no compute goes to padding, and
"the last token" needs no mask. Whether the architecture keeps the sequences apart is found out by `settle_packing`.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig

from repo_fast.errors import InputError
from repo_fast.models.adapters import Adapter, merge_adapter, put_adapter
from repo_fast.models.attention import run_packed
from repo_fast.models.model_config import load_config, set_aside
from repo_fast.models.score_checkpoint import ScoreCheckpoint, ScoreFormat, identity_normalizer
from repo_fast.models.trunk import disable_dropout, load_transformer
from repo_fast.packing.bounds import Bounds


class ScoreHead(nn.Linear):
    """A linear layer that computes in float32, whatever type its weights are kept in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)


class ScoreModel(nn.Module):
    """A trunk and a head with K outputs.

    Args:
        trunk: A decoder without its language-model head, as `AutoModel` loads it.
        weight: float [K, D], the head.
        bias: float [K], or None for a head without.
        format: What its folder said: how scores are normalised, and what is written back.
    """

    def __init__(
        self,
        trunk: nn.Module,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        format: ScoreFormat | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        # In the file's dtype, so that it is written back as it was: the head computes in float32 anyway.
        self.score_head = ScoreHead(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        with torch.no_grad():
            self.score_head.weight.copy_(weight)
            if bias is not None:
                self.score_head.bias.copy_(bias)
        # Numbers, not buffers: a cast of the module to bfloat16 must not round them.
        self.format = format or ScoreFormat()
        self.normalization = self.format.normalization
        disable_dropout(trunk)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        attention: str | Sequence[str] = "sdpa",
        quantize: str | None = None,
        merge: bool = True,
    ) -> "ScoreModel":
        """Loads a reward or cost model; under ZeRO-3 loading, straight into shards.

        Of a folder of adapters, their base is read from where it says that it is.

        Args:
            path: Folder or hub name.
            dtype: Of the trunk's weights and activations. The head keeps its file's; the score is float32 in any case.
            attention: Name of a transformers attention implementation, or several: the first that can run.
            quantize: Of the trunk, as for `load_transformer`.
            merge: Whether adapters are merged into the weights of their base, unless these are quantised, rather than
                kept beside them, all frozen.

        Raises:
            InputError: The folder cannot be read, is not a score model of a known layout, or lacks a weight; the base
                of its adapters is not there, has other weights than they were trained on, or was quantised.
        """
        checkpoint = ScoreCheckpoint(path)
        weight, bias = checkpoint.head()
        form = checkpoint.format()
        if checkpoint.adapter is None:
            trunk = _load_trunk(path, checkpoint.config, dtype, attention, quantize)
        else:
            trunk = _load_adapted(checkpoint.adapter, checkpoint.config, dtype, attention, quantize, merge)
        return cls(trunk, weight, bias, format=form)

    @classmethod
    def from_policy(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        attention: str | Sequence[str] = "sdpa",
        quantize: str | None = None,
        names: tuple[str, ...] = (),
    ) -> "ScoreModel":
        """The trunk of a causal language model with a zero head: where a critic starts without a score model.

        Args:
            path: Folder or hub name.
            dtype: Of the trunk's weights and activations.
            attention: Name of a transformers attention implementation, or several: the first that can run.
            quantize: As for `load_transformer`.
            names: Of its outputs; empty: one without a name.

        Raises:
            InputError: The folder cannot be read, or lacks a weight.
        """
        config, outputs = load_config(path), max(1, len(names))
        form = ScoreFormat(normalizer=identity_normalizer(outputs), aside=set_aside(path), names=names)
        trunk = _load_trunk(path, config, dtype, attention, quantize)
        return cls(trunk, torch.zeros(outputs, config.hidden_size), format=form)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        bounds: Bounds | None = None,
    ) -> torch.Tensor:
        """Scores some positions of packed sequences.

        Args:
            input_ids: int64 [1, N].
            position_ids: int64 [1, N], from 0 in each sequence.
            positions: int64 [M], where in the row to read.
            bounds: As for `run_packed`.

        Returns:
            float32 [M]; of a model with several outputs [M, K].
        """
        outputs = self.score_head(run_packed(self.trunk, input_ids, position_ids, bounds)[0, positions])
        scores = [(outputs[:, k] - mean) / std for k, (mean, std) in enumerate(self.normalization)]
        return scores[0] if len(scores) == 1 else torch.stack(scores, dim=1)


def _load_trunk(
    path: str, config: PretrainedConfig, dtype: torch.dtype, attention: str | Sequence[str], quantize: str | None
) -> nn.Module:
    options = {"config": config, "dtype": dtype, "attention": attention, "quantize": quantize}
    return load_transformer(AutoModel, path, "a transformer trunk", **options)


def _load_adapted(
    adapter: Adapter,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | Sequence[str],
    quantize: str | None,
    merge: bool,
) -> nn.Module:
    """The base's weights under the configuration that the adapters came with, as the merged folder has it."""
    if adapter.quantize not in (None, quantize):
        raise InputError(
            f"{adapter.path!r} was trained beside its base in 4 bits, and quantize is {quantize!r}, expected "
            f"{adapter.quantize!r}, or the folder of the merged model"
        )
    adapter.check_base()
    base, rows = adapter.base.path, config.get_text_config().vocab_size
    own = load_config(base).get_text_config().vocab_size
    if own > rows:
        raise InputError(f"{adapter.path!r} has vocab_size {rows}, expected at least the {own} of its base {base!r}")
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = own
    trunk = _load_trunk(base, config, dtype, attention, quantize)
    (merge_adapter if merge and quantize is None else put_adapter)(trunk, adapter)
    if own < rows:
        # Here, so that scoring by other models does not load DeepSpeed.
        from repo_fast.models.vocabulary import append_rows

        # As when they were trained: those rows are frozen.
        append_rows(trunk, rows)
    return trunk
