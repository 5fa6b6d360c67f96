"""What an engine leaves in a checkpoint: a file of tensors from each rank, and one that says what these are."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from repo_fast.checkpoints.files import FileSum, write_json, write_tensors
from repo_fast.checkpoints.manifest import is_inside
from repo_fast.checkpoints.pieces import Pieces
from repo_fast.errors import InputError, first_line

STATE_FILE = "engine.json"
BUFFER = "buffer"
# What a learning rate's schedule knows, of which its functions are the run's own.
SCHEDULE = ("last_epoch", "_step_count", "_last_lr", "base_lrs")


def shard_file(rank: int, ranks: int) -> str:
    """Of a rank's tensors: `NAME/weight`, `NAME/exp_avg` and `NAME/exp_avg_sq`, float32 [n], and `NAME/buffer`."""
    return f"shard-{rank:05d}-of-{ranks:05d}.safetensors"


@dataclass(frozen=True)
class Saved:
    """What the tensors are.

    Attributes:
        adam_step: AdamW's count of steps.
        dtype: That the model computes in, as torch names it.
        schedule: The `SCHEDULE` of a `LambdaLR`.
        frozen: What the frozen weights are known by, in that dtype.
        parameters: Where the elements of each trained parameter are.
        buffers: The file of each buffer.
        frozen_rounded: What the frozen weights are known by in another dtype. Empty in checkpoints of before.
    """

    adam_step: float
    dtype: str
    schedule: dict[str, Any]
    frozen: str
    parameters: Mapping[str, Pieces]
    buffers: Mapping[str, str]
    frozen_rounded: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Saved":
        """From the folder of an engine. Raises `InputError` where it is not what `write` wrote."""
        path = folder / STATE_FILE
        try:
            content = json.loads(path.read_bytes())
            parameters = {name: Pieces(**pieces) for name, pieces in content.pop("parameters").items()}
            read = cls(**content, parameters=parameters)
            files = [part[0] for pieces in parameters.values() for part in pieces.parts] + [*read.buffers.values()]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}") from error
        for file in files:
            if not is_inside(file):
                raise InputError(f"{path} has tensors in {file!r}, expected a file beside it")
        return read

    def write(self, folder: Path) -> FileSum:
        """Into the folder of an engine. Raises `OSError`."""
        return write_json(folder / STATE_FILE, asdict(self))


@dataclass(frozen=True)
class Unsaved:
    """A rank's part of an engine's state, which it can write without the other ranks.

    Attributes:
        file: Of its tensors.
        tensors: By their names in the file; those that training goes on with, unless they are `copied`.
        saved: What the tensors of all ranks are, on the first rank.
    """

    file: str
    tensors: Mapping[str, torch.Tensor]
    saved: Saved | None

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def copied(self) -> "Unsaved":
        """The same in host memory of its own."""
        return replace(self, tensors={name: value.to("cpu", copy=True) for name, value in self.tensors.items()})

    def write(self, folder: Path) -> dict[str, FileSum]:
        """Write it into the folder of an engine, which is made if it is not there.

        Returns:
            Of each file, what it is known by; by name.

        Raises:
            OSError: A file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        sums = {self.file: write_tensors(folder / self.file, self.tensors)}
        if self.saved is not None:
            sums[STATE_FILE] = self.saved.write(folder)
        return sums
