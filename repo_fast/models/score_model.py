"""A transformer trunk with a scalar head: reward models, cost models, and the critics that start from them.

Two layouts of checkpoint are read: Safe RLHF's (Beaver: `LlamaForScore`, earlier `LlamaModelForScore`; trunk in
`model.*`, head in `score_head.*`) and that of Hugging Face's decoder-only `...ForSequenceClassification` with one
output (head in `score.weight`). transformers loads the trunk, so that ZeRO-3 shards it on the way in; the head is read
from the file here, because transformers would only warn about one it does not find, and draw a fresh one.

Sequences are scored packed, several in a row whose `position_ids` start anew at each: no compute goes to padding, and
"the last token" needs no mask. transformers then keeps the sequences apart only without a cache and without an
attention mask, and only for trunks that attend by position (not, say, ALiBi or recurrent ones): `check_packing`.
"""

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from repo_fast.errors import InputError, first_line
from repo_fast.models.trunk import disable_dropout, load_config

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
BEAVER_HEAD, CLASSIFIER_HEAD = "score_head", "score"
# Safe RLHF's normalizer, by its `score_type`: (subtract the mean, divide by the standard deviation).
NORMALIZERS = {"reward": (True, True), "cost": (False, True), "critic": (False, False)}


class ScoreHead(nn.Linear):
    """A linear layer that computes in float32, whatever type its weights are kept in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)


class ScoreModel(nn.Module):
    """A trunk and a head with one output.

    Args:
        trunk: A decoder without its language-model head, as `AutoModel` loads it.
        weight: float [1, D], the head.
        bias: float [1], or None for a head without.
        mean: Subtracted from the score, in its units.
        std: Divides what remains.
    """

    def __init__(
        self,
        trunk: nn.Module,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.score_head = ScoreHead(weight.shape[1], 1, bias=bias is not None)
        with torch.no_grad():
            self.score_head.weight.copy_(weight)
            if bias is not None:
                self.score_head.bias.copy_(bias)
        # Numbers, not buffers: a cast of the module to bfloat16 must not round them.
        self.mean, self.std = mean, std
        disable_dropout(trunk)

    @classmethod
    def from_pretrained(cls, path: str, *, dtype: torch.dtype, attention: str = "sdpa") -> "ScoreModel":
        """Loads a reward or cost model; under ZeRO-3 loading, straight into shards.

        Args:
            path: Folder or hub name.
            dtype: Of the trunk's weights and activations. The score is float32 in any case.
            attention: Name of a transformers attention implementation.

        Raises:
            InputError: The folder cannot be read, is not a score model of a known layout, has not exactly one output,
                or lacks a weight.
        """
        config = load_config(path)
        prefix = _head_prefix(path, config)
        checkpoint = Checkpoint(path)
        if f"{prefix}.weight" not in checkpoint.files:
            raise InputError(f"{path!r} has no score head: there is no {prefix}.weight among its weights")
        weight = checkpoint.read(f"{prefix}.weight")
        if weight.shape != (1, config.hidden_size):
            raise InputError(
                f"{path!r} has {prefix}.weight of shape {list(weight.shape)}, expected [1, {config.hidden_size}]: "
                "one score a response"
            )
        has_bias = f"{prefix}.bias" in checkpoint.files
        if prefix == BEAVER_HEAD and getattr(config, "score_bias", getattr(config, "bias", False)) and not has_bias:
            raise InputError(f"{path!r} says that its score head has a bias, but there is no {prefix}.bias")
        return cls(
            _load_trunk(path, config, dtype, attention),
            weight,
            checkpoint.read(f"{prefix}.bias") if has_bias else None,
            **_normalizer(path, config, checkpoint),
        )

    @classmethod
    def from_policy(cls, path: str, *, dtype: torch.dtype, attention: str = "sdpa") -> "ScoreModel":
        """The trunk of a causal language model with a zero head: where a critic starts without a score model.

        Args:
            path: Folder or hub name.
            dtype: Of the trunk's weights and activations.
            attention: Name of a transformers attention implementation.

        Raises:
            InputError: The folder cannot be read, or lacks a weight.
        """
        config = load_config(path)
        return cls(_load_trunk(path, config, dtype, attention), torch.zeros(1, config.hidden_size))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores some positions of packed sequences.

        Args:
            input_ids: int64 [1, N].
            position_ids: int64 [1, N], from 0 in each sequence.
            positions: int64 [M], where in the row to read.

        Returns:
            float32 [M].
        """
        outputs = self.trunk(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
        scores = self.score_head(outputs.last_hidden_state[0, positions])[:, 0]
        return (scores - self.mean) / self.std


class Checkpoint:
    """The weight files of a folder or hub name, safetensors or PyTorch's (without unpickling code).

    Args:
        path: Folder or hub name.

    Attributes:
        files: The file of each tensor, by name.

    Raises:
        InputError: There are no weights, or they cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with self._readable():
            for name in WEIGHT_FILES:
                if index := self._find(f"{name}.index.json"):
                    self.files: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
                    return
                if file := self._find(name):
                    self.files = dict.fromkeys(_names(file), name)
                    return
        raise InputError(f"{path!r} has no weights, expected {' or '.join(WEIGHT_FILES)} (or sharded ones)")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        with self._readable():
            file = self._find(self.files[name])
            if file is None:
                raise FileNotFoundError(f"{self.files[name]} is missing")
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    return tensors.get_tensor(name)
            return _load(file)[name]

    def _find(self, file: str) -> str | None:
        return cached_file(self.path, file, _raise_exceptions_for_missing_entries=False)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise InputError(f"the weights of {self.path!r} cannot be read: {first_line(error)}") from error


def _names(file: str) -> list[str]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(_load(file))


def _load(file: str) -> dict[str, torch.Tensor]:
    # PyTorch's older files are no zip archives, and cannot be mapped.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _head_prefix(path: str, config: PretrainedConfig) -> str:
    architecture = (config.architectures or ["none"])[0]
    if architecture.endswith("ForScore"):
        score_dim = getattr(config, "score_dim", 1)
        if score_dim != 1:
            raise InputError(f"{path!r} has score_dim {score_dim}, expected 1")
        return BEAVER_HEAD
    if architecture.endswith("ForSequenceClassification"):
        if config.num_labels != 1:
            raise InputError(f"{path!r} has num_labels {config.num_labels}, expected 1: one score a response")
        return CLASSIFIER_HEAD
    raise InputError(
        f"{path!r} has the architecture {architecture!r}, expected a score model: LlamaForScore or LlamaModelForScore "
        "(Safe RLHF), or a ...ForSequenceClassification with one output"
    )


def _load_trunk(path: str, config: PretrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    verbosity = transformers_logging.get_verbosity()
    # transformers reports the head as left over, and only warns of what is missing; that is an error here.
    transformers_logging.set_verbosity_error()
    try:
        trunk, loading = AutoModel.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path!r} cannot be loaded as a transformer trunk: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"{path!r} lacks {len(missing)} weights of its architecture, {missing[0]} for one")
    return trunk


def _normalizer(path: str, config: PretrainedConfig, checkpoint: Checkpoint) -> dict[str, float]:
    if not getattr(config, "do_normalize", False):
        return {}
    score_type = getattr(config, "score_type", None)
    if score_type not in NORMALIZERS:
        raise InputError(f"{path!r} has score_type {score_type!r}, expected one of {', '.join(NORMALIZERS)}")
    if not {"normalizer.mean", "normalizer.var"} <= checkpoint.files.keys():
        raise InputError(f"{path!r} has do_normalize, but no normalizer.mean and normalizer.var among its weights")
    centre, scale = NORMALIZERS[score_type]
    return {
        "mean": checkpoint.read("normalizer.mean").item() if centre else 0.0,
        "std": checkpoint.read("normalizer.var").sqrt().item() + 1e-8 if scale else 1.0,
    }
