"""The weight files of a model's folder or hub name, read tensor by tensor."""

import contextlib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from repo_fast.errors import InputError, first_line

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """The weight files of a folder or hub name, safetensors or PyTorch's (without unpickling code).

    Args:
        path: Folder or hub name.
        names: Of the file, the first that is there.

    Attributes:
        files: The file of each tensor, by name.
        index: The `...index.json` of a sharded checkpoint; None of a single file.

    Raises:
        InputError: There are no weights, or they cannot be read.
    """

    def __init__(self, path: str, names: Sequence[str] = WEIGHT_FILES) -> None:
        self.path = path
        with self._readable():
            for name in names:
                if index := find_file(path, f"{name}.index.json"):
                    self.index: dict | None = json.loads(Path(index).read_text())
                    self.files: dict[str, str] = self.index["weight_map"]
                    for file in self.files.values():
                        # It becomes part of a path, also of one that is written.
                        if Path(file).name != file:
                            raise ValueError(f"{name}.index.json names {file!r}, expected a file of the same folder")
                    return
                if found := find_file(path, name):
                    self.index = None
                    with _open(found) as tensors:
                        self.files = dict.fromkeys(tensors, name)
                    return
        raise InputError(f"{path!r} has no weights, expected {' or '.join(names)} (or sharded ones)")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return next(tensor for _, tensor in self.read_file(self.files[name], [name]))

    def read_file(self, file: str, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Some tensors of a file with their names, one after the other, on the CPU."""
        with self._readable():
            found = find_file(self.path, file)
            if found is None:
                raise FileNotFoundError(f"{file} is missing")
            with _open(found) as tensors:
                for name in names:
                    yield name, tensors[name]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Of each tensor, by name, the shape, and whether its numbers are of a floating-point type; no tensor is read
        from a safetensors file."""
        found: dict[str, tuple[tuple[int, ...], bool]] = {}
        for file in sorted(set(self.files.values())):
            with self._readable():
                if (path := find_file(self.path, file)) is None:
                    raise FileNotFoundError(f"{file} is missing")
                with _open(path) as tensors:
                    for name in tensors:
                        if isinstance(tensors, _Lazy):
                            found[name] = tensors.shape(name)
                        else:
                            found[name] = tuple(tensors[name].shape), tensors[name].is_floating_point()
        return found

    def fingerprint(self) -> str:
        """64 hexadecimal digits (SHA-256) of all weights: names, dtypes, shapes and every bit, however they are
        distributed over files.

        It reads them whole, so that no change of any passes; a process does so once for each file.
        """
        digests: dict[str, str] = {}
        for file in sorted(set(self.files.values())):
            with self._readable():
                if (path := find_file(self.path, file)) is None:
                    raise FileNotFoundError(f"{file} is missing")
                status = Path(path).stat()
                of_file = _digests(path, status.st_size, status.st_mtime_ns)
                digests |= {name: digest for name, digest in of_file.items() if self.files.get(name) == file}
        whole = hashlib.sha256()
        for name in sorted(digests):
            whole.update(f"{name} {digests[name]}\n".encode())
        return whole.hexdigest()

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise InputError(f"the weights of {self.path!r} cannot be read: {first_line(error)}") from error


def find_file(path: str, name: str) -> str | None:
    """A file of a folder or hub name, downloaded where need be; None where it has none of that name."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


@lru_cache
def _digests(file: str, size: int, changed: int) -> dict[str, str]:
    """Of each tensor in a file; its size and the time of its last change tell it from another of the same name."""

    def digest(name: str) -> tuple[str, str]:
        tensor = tensors[name]
        seen = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        seen.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return name, seen.hexdigest()

    # Hashing leaves the interpreter to others.
    with _open(file) as tensors, ThreadPoolExecutor() as pool:
        return dict(pool.map(digest, tensors))


class _Lazy(Mapping):
    """A safetensors file as a mapping that reads a tensor when asked for it."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def shape(self, name: str) -> tuple[tuple[int, ...], bool]:
        part = self._file.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def _open(file: str) -> Iterator[Mapping[str, torch.Tensor]]:
    if file.endswith(".safetensors"):
        # safetensors says of a file that may not be read that there is none.
        open(file, "rb").close()
        with safe_open(file, framework="pt") as opened:
            yield _Lazy(opened)
    else:
        # PyTorch's older files are no zip archives, and cannot be mapped.
        yield torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
