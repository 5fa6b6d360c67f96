"""Files of checkpoints: what safetensors reads of them, and what their sums and manifests notice."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from repo_fast.checkpoints import files
from repo_fast.checkpoints.files import FileSum, sum_of, write_json, write_tensors
from repo_fast.checkpoints.manifest import MANIFEST, Damaged, check_sizes, check_sums, read_manifest, seal
from repo_fast.checkpoints.pieces import PieceReader, Pieces
from repo_fast.engine.saved import Saved
from repo_fast.errors import InputError

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "the first bit": lambda content: bytes([content[0] ^ 128]) + content[1:],
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b" ",
    "zeroes": lambda content: bytes(len(content)),
    "missing": lambda content: None,
}


def damage(path: Path, how: str) -> None:
    content = DAMAGES[how](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on no shard of the checkpoint of that name can be written."""
    write = files._write

    def full(path: Path, parts) -> files.FileSum:
        if name in str(path) and path.name.startswith("shard"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, parts)

    monkeypatch.setattr(files, "_write", full)


def check(folder: Path) -> None:
    written = read_manifest(folder)
    check_sizes(folder, written)
    check_sums(folder, written, written)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "policy").mkdir()
    sums = {
        "run.json": write_json(tmp_path / "run.json", {"step": 3}),
        "policy/a.safetensors": write_tensors(tmp_path / "policy" / "a.safetensors", {"a": torch.randn(40)}),
    }
    seal(tmp_path, sums)
    return tmp_path


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "float32": torch.randn(3, 5),
        "bfloat16": torch.randn(7).bfloat16(),
        "float64": torch.randn(2, dtype=torch.float64),
        "a number": torch.tensor(3),
        "nothing": torch.zeros(0),
        "bytes": torch.randint(256, (5,), dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "turned": torch.randn(4, 6).T,
    }
    known = write_tensors(tmp_path / "a.safetensors", tensors, {"about": "it"})
    assert known == sum_of(tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"about": "it"}
    assert write_tensors(tmp_path / "b.safetensors", tensors, {"about": "it"}) == known


def test_the_sum_of_many_large_tensors_is_that_of_the_file(tmp_path: Path) -> None:
    """It is taken beside writing."""
    tensors = {f"{number}": torch.randn(20_000 + number) for number in range(40)}
    assert write_tensors(tmp_path / "a.safetensors", tensors) == sum_of(tmp_path / "a.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_in_the_middle_is_said() -> None:
    threads = threading.active_count()
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(Path("/dev/full"), {"a": torch.randn(100_000), "b": torch.randn(100_000)})
    assert threading.active_count() == threads


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
@settings(max_examples=30, deadline=None)
def test_slices_are_found_in_pieces(sizes: list[int], data: st.DataObject) -> None:
    import tempfile

    whole = torch.randn(sum(sizes))
    with tempfile.TemporaryDirectory() as name:
        folder, start, pieces = Path(name), 0, Pieces([sum(sizes)])
        for number, (size, piece) in enumerate(zip(sizes, whole.split(sizes), strict=True)):
            write_tensors(folder / f"{number}", {"w/weight": piece})
            pieces.parts.append((f"{number}", start, size))
            start += size
        low = data.draw(st.integers(0, len(whole) - 1))
        high = data.draw(st.integers(low + 1, len(whole)))
        with PieceReader(folder) as reader:
            target = torch.zeros(high - low)
            reader.read_into(target, "w/weight", data.draw(st.permutations(pieces.parts)), low)
            assert torch.equal(target, whole[low:high])
            assert torch.equal(reader.whole("w/weight", pieces), whole)
            with pytest.raises(ValueError, match=rf"w/weight: {sum(sizes[1:])} of {sum(sizes)} elements from 0 on"):
                reader.read_into(torch.zeros(sum(sizes)), "w/weight", pieces.parts[1:], 0)


@pytest.mark.parametrize("how", list(DAMAGES))
@pytest.mark.parametrize("file", ["run.json", "policy/a.safetensors", MANIFEST])
def test_damage_is_noticed(sealed: Path, file: str, how: str) -> None:
    check(sealed)
    damage(sealed / file, how)
    with pytest.raises(Damaged) as noticed:
        check(sealed)
    assert noticed.value.file == file


def test_every_bit_of_a_manifest_counts(sealed: Path) -> None:
    content = (sealed / MANIFEST).read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            (sealed / MANIFEST).write_bytes(
                content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
            )
            with pytest.raises(Damaged):
                read_manifest(sealed)


def test_a_manifest_of_a_later_form_is_not_damage(sealed: Path) -> None:
    from repo_fast.checkpoints import manifest

    content = json.loads((sealed / MANIFEST).read_text())
    del content["sha256"]
    content["format"] = 2
    write_json(sealed / MANIFEST, content | {"sha256": manifest._sum(content)})
    with pytest.raises(
        InputError, match=r"manifest.json has the form 2, expected at most 1: it is of a later repo_fast"
    ):
        read_manifest(sealed)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", ""])
def test_a_manifest_names_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    seal(folder, {name: FileSum(0, "")})
    with pytest.raises(Damaged, match="names .*, which is not in the checkpoint"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_tensors_are_in_files_beside_what_names_them(tmp_path: Path, name: str) -> None:
    Saved(1.0, "float32", {}, "", {"weight": Pieces([1], [(name, 0, 1)])}, {}).write(tmp_path)
    with pytest.raises(InputError, match=r"engine\.json has tensors in .*, expected a file beside it"):
        Saved.read(tmp_path)
    (tmp_path / "engine.json").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=r"engine\.json cannot be read"):
        Saved.read(tmp_path)


def test_a_file_that_holds_no_tensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"\x80\x04 a pickle, say, of some length")
    with PieceReader(tmp_path) as reader, pytest.raises(InputError, match="shard cannot be read"):
        reader.tensor("shard", "weight")
