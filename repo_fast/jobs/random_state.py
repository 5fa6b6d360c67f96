"""The random states of a rank: kept while something else draws, and in checkpoints."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from repo_fast.checkpoints.files import FileSum, write_tensors
from repo_fast.errors import InputError, first_line


@dataclass(frozen=True)
class RandomState:
    """The states of torch (CPU and this rank's GPU), numpy and Python, which a user's scorer may draw from."""

    tensors: dict[str, torch.Tensor]
    words: dict[str, Any]

    @classmethod
    def now(cls) -> "RandomState":
        """As they are."""
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
        tensors["numpy"] = torch.from_numpy(keys.astype(numpy.int64))
        words = {"numpy": [str(kind), int(position), int(has_gauss), float(gauss)], "python": random.getstate()}
        return cls(tensors, words)

    def restore(self) -> None:
        """Go on from it. Nothing that draws random numbers may come between this and the run."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["cuda"])
        kind, position, has_gauss, gauss = self.words["numpy"]
        numpy.random.set_state((kind, self.tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, gauss))
        version, state, gauss_next = self.words["python"]
        random.setstate((version, tuple(state), gauss_next))


def _random_file(rank: int) -> str:
    return f"random-rank{rank}.safetensors"


def save_random_state(state: RandomState, folder: Path, rank: int) -> dict[str, FileSum]:
    """Write a rank's random state; returns what its file is known by."""
    file = _random_file(rank)
    return {file: write_tensors(folder / file, state.tensors, {"state": json.dumps(state.words)})}


def load_random_state(folder: Path, rank: int) -> None:
    """Restore what `save_random_state` wrote. Raises `InputError` where it is something else."""
    path = folder / _random_file(rank)
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()["state"])
        RandomState(load_file(path), words).restore()
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def seed_everything(*numbers: int) -> None:
    """Let numbers decide the random states: torch's, and those that a user's scorers may draw from."""
    word = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    torch.manual_seed(int.from_bytes(word[:7]))
    random.seed(int.from_bytes(word[:7]))
    numpy.random.seed(int.from_bytes(word[:4]))
