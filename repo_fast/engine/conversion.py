"""DeepSpeed's own checkpoints, which runs wrote before they had a form of their own, made into that.

They are pickles. They are read with `weights_only`, which builds tensors and plain containers alone; the three classes
of DeepSpeed that are in them are read as what holds their fields. So nothing of DeepSpeed is imported, and nothing of
the files is executed.
"""

import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from repo_fast.checkpoints.files import FileSum, write_tensors
from repo_fast.checkpoints.pieces import Pieces
from repo_fast.engine.fragments import MOMENTS, WEIGHT, digest, sum_of_bits
from repo_fast.engine.saved import BUFFER, SCHEDULE, STATE_FILE, Saved, shard_file
from repo_fast.errors import InputError, first_line


class _Fields:
    """Whatever is set on it."""


class _Number(int):
    """An enumeration's value."""


_READ_AS: list[Any] = [
    (_Fields, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Fields, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
# In a zip's external attributes, as MS-DOS had them.
_SAYS_FOLDER = 0x10


def convert_engine(source: Path, folder: Path) -> dict[str, FileSum]:
    """Write what DeepSpeed saved of an engine as `Engine.save` would have.

    Args:
        source: DeepSpeed's folder, `state/`.
        folder: A new one.

    Returns:
        Of each file, what it is known by; by name.

    Raises:
        InputError: A file cannot be read, or is not as DeepSpeed 0.19 wrote it for these runs.
        OSError: A file cannot be written.
    """
    try:
        return _convert(source, folder)
    except (KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"{str(source)!r} is not what DeepSpeed 0.19 writes: {first_line(error)}") from error


def _convert(source: Path, folder: Path) -> dict[str, FileSum]:
    ranks = len(list(source.glob("*zero_pp_rank_*_optim_states.pt")))
    optimizers = [_read(source, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(ranks)]
    in_stage_3 = any(source.glob("zero_pp_rank_*_model_states.pt"))
    names = [f"zero_pp_rank_{rank}_" for rank in range(ranks)] if in_stage_3 else [""]
    models = [_read(source, f"{name}mp_rank_00_model_states.pt") for name in names]
    first = models[0]
    shapes = {name: list(shape) for group in first["param_shapes"] for name, shape in group.items()}
    pieces = {name: Pieces(shape) for name, shape in sorted(shapes.items())}
    buffers = {name: first["module"][name] for name in first["buffer_names"] if first["module"].get(name) is not None}
    folder.mkdir(parents=True)
    sums = {}
    for rank, optimizer in enumerate(optimizers):
        file, tensors = shard_file(rank, ranks), {}
        owned = _of_stage_3(optimizer, shapes, rank, ranks) if in_stage_3 else _of_stages_1_and_2(optimizer)
        for name, start, views in owned:
            # In the other stages a rank's part begins where those before it end.
            begin = sum(count for _, _, count in pieces[name].parts) if start is None else start
            pieces[name].parts.append((file, begin, views[WEIGHT].numel()))
            tensors |= {f"{name}/{key}": view for key, view in views.items()}
        if rank == 0:
            tensors |= {f"{name}/{BUFFER}": value for name, value in buffers.items()}
        sums[file] = write_tensors(folder / file, tensors)
    scales = {name: value for name, value in first["module"].items() if name.endswith("_extra_state")}
    frozen, rounded = (digest(_frozen_sums(models, in_stage_3, rounded=rounded), scales) for rounded in (False, True))
    saved = Saved(
        float(_moments(optimizers[0])[0]["step"]),
        str(first["module"][next(iter(shapes))].dtype).removeprefix("torch."),
        {key: first["lr_scheduler"][key] for key in SCHEDULE},
        frozen,
        pieces,
        dict.fromkeys(buffers, shard_file(0, ranks)),
        rounded,
    )
    sums[STATE_FILE] = saved.write(folder)
    return sums


def _read(folder: Path, pattern: str) -> dict[str, Any]:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise InputError(f"{str(folder)!r} has {len(found)} files {pattern}, expected one")
    _check_sums(found[0])
    try:
        with torch.serialization.safe_globals(_READ_AS):
            return torch.load(found[0], map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{str(found[0])!r} cannot be read: {first_line(error)}") from error


def _check_sums(path: Path) -> None:
    """Raise `InputError` where a file is not what `torch.save` wrote, which `torch.load` does not look at.

    Those of before 2020 have no sums.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            # torch would take a record that is said to be a folder for one without content.
            folder = next((part.filename for part in file.infolist() if part.external_attr & _SAYS_FOLDER), None)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{str(path)!r} is damaged ({first_line(error)}), expected what was written") from error
    problem = (
        f"the sum of its record {damaged!r} differs" if damaged is not None else f"its record {folder!r} is no file"
    )
    if damaged is not None or folder is not None:
        raise InputError(f"{str(path)!r} is damaged: {problem}, expected what was written")


def _moments(optimizer: dict[str, Any]) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's state of each flat tensor."""
    state = optimizer["optimizer_state_dict"]
    return state["base_optimizer_state" if "base_optimizer_state" in state else "optimizer_state_dict"]["state"]


def _of_stages_1_and_2(optimizer: dict[str, Any]) -> Iterator[tuple[str, int | None, dict[str, torch.Tensor]]]:
    """A rank's part of each parameter that it has one of: name, None, views."""
    state, moments = optimizer["optimizer_state_dict"], _moments(optimizer)
    for group, flat in enumerate(state["single_partition_of_fp32_groups"]):
        owned = {WEIGHT: flat, **{key: moments[group][key] for key in MOMENTS}}
        for name, place in state["param_slice_mappings"][group].items():
            yield name, None, {key: value.narrow(0, place.start, place.numel) for key, value in owned.items()}


def _of_stage_3(
    optimizer: dict[str, Any], shapes: dict[str, list[int]], rank: int, ranks: int
) -> Iterator[tuple[str, int | None, dict[str, torch.Tensor]]]:
    """A rank's part of each parameter: name, its first element, views. All have as much, and the last is filled up."""
    flats, moments = optimizer["optimizer_state_dict"]["fp32_flat_groups"], _moments(optimizer)
    owned = {WEIGHT: torch.cat(flats)}
    owned |= {key: torch.cat([moments[group][key] for group in range(len(flats))]) for key in MOMENTS}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        most = -(-size // ranks)
        count = max(0, min(most, size - most * rank))
        if count:
            yield name, most * rank, {key: value.narrow(0, offset, count) for key, value in owned.items()}
        offset += most


def _frozen_sums(models: list[dict[str, Any]], in_stage_3: bool, *, rounded: bool) -> dict[str, int]:
    found: dict[str, int] = {}
    for rank, model in enumerate(models):
        for name, shape in (model["frozen_param_shapes"] or {}).items():
            part = model["frozen_param_fragments" if in_stage_3 else "module"][name].reshape(-1)
            start = part.numel() * rank
            part = part[: max(0, torch.Size(shape).numel() - start)]
            found[name] = (found.get(name, 0) + sum_of_bits(part, start, rounded=rounded)) % 2**64
    return found
