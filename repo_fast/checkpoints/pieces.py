"""Flat tensors in pieces: each rank of a run writes those it has, and each of another reads the slices it needs."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from repo_fast.errors import InputError, first_line


@dataclass
class Pieces:
    """Where the elements of one tensor lie.

    Attributes:
        shape: Of the whole tensor.
        parts: (file, first element, number of elements) of each piece.
    """

    shape: list[int]
    parts: list[Sequence[Any]] = field(default_factory=list)


class PieceReader:
    """Reads slices of tensors from the files of a folder, which it holds open. Use as a context.

    A file that is no safetensors raises `InputError`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read_into(self, target: torch.Tensor, key: str, parts: Sequence[Sequence[Any]], start: int) -> None:
        """Fill a tensor with elements of one that lies in pieces.

        Args:
            target: [n], on any device.
            key: The name that all pieces have in their files.
            parts: As `Pieces.parts`.
            start: Which element of the whole is the target's first.

        Raises:
            ValueError: The pieces do not have all of them.
        """
        end, filled = start + target.numel(), 0
        for file, first, count in parts:
            low, high = max(start, first), min(end, first + count)
            if low < high:
                piece = self._file(file).get_slice(key)[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            raise ValueError(f"{key}: {filled} of {target.numel()} elements from {start} on are in {self._folder}")

    def whole(self, key: str, pieces: Pieces) -> torch.Tensor:
        """All of a tensor, on the CPU, float32. Raises `ValueError` as `read_into`."""
        flat = torch.empty(torch.Size(pieces.shape).numel())
        self.read_into(flat, key, pieces.parts, 0)
        return flat.view(pieces.shape)

    def tensor(self, file: str, key: str) -> torch.Tensor:
        """One that a file has as it is."""
        return self._file(file).get_tensor(key)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = self._open.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read: {first_line(error)}") from error
        return self._files[name]
