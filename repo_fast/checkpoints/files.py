"""Files that are on disk when their writer returns, and whose sum was taken of what was meant, not of what was read."""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from repo_fast.errors import InputError

# As safetensors names them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileSum:
    """What a file is known by: its size in bytes, and the sha256 of its content in hexadecimal."""

    bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str] | None = None) -> FileSum:
    """Write a safetensors file, one tensor after the other: no more than one of them is copied to the host at a time.

    Args:
        path: Of the file; it is replaced.
        tensors: By name, on any device.
        about: The file's own metadata.

    Raises:
        OSError: It cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    # The form asks for data that begin at a multiple of 8.
    head += b" " * (-len(head) % 8)

    def parts() -> Iterator[Any]:
        yield struct.pack("<Q", len(head)) + head
        for tensor in tensors.values():
            on_host = tensor.detach().cpu().contiguous().reshape(-1)
            if on_host.numel():
                yield memoryview(on_host.view(torch.uint8).numpy())

    return _write(path, parts())


def write_json(path: Path, content: Any) -> FileSum:
    """Write a JSON file; it is replaced. Raises `OSError`."""
    return write_bytes(path, as_json(content))


def write_bytes(path: Path, content: bytes) -> FileSum:
    """Write a file; it is replaced. Raises `OSError`."""
    return _write(path, [content])


def as_json(content: Any) -> bytes:
    """As `write_json` writes it."""
    return json.dumps(content, indent=1).encode()


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise an `OSError` inside as an `InputError` that says what cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what} cannot be written: {error.strerror}; what was written before it is as it was"
        ) from error


def sum_of(path: Path) -> FileSum:
    """Of a file that is there. Raises `OSError`."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileSum(file.tell(), digest.hexdigest())


def _write(path: Path, parts: Any) -> FileSum:
    digest, size = hashlib.sha256(), 0
    # A sum takes longer than writing does, and neither holds the interpreter: where a core is free, it is beside it.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as beside:
        for part in parts:
            summed = beside.submit(digest.update, part)
            file.write(part)
            summed.result()
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(size, digest.hexdigest())
