"""A whole checkpoint of before, which DeepSpeed wrote, made into one of the project's own."""

import os
import shutil
from pathlib import Path

from repo_fast.checkpoints.files import FileSum, sum_of
from repo_fast.engine.conversion import convert_engine
from repo_fast.jobs.checkpoint import CONVERTED, begin, complete, is_checkpoint, is_deepspeeds, partial


def to_convert(folder: Path) -> Path | None:
    """The name that a folder among checkpoints will have when it is converted; None: there is nothing to convert."""
    if is_checkpoint(folder):
        return folder if is_deepspeeds(folder) else None
    # Of one that was killed while it was converted.
    final = folder.with_suffix("")
    return final if folder.suffix == CONVERTED and not final.exists() else None


def convert(folder: Path, final: Path) -> Path:
    """Write a checkpoint anew. What DeepSpeed wrote stays, under another name.

    Args:
        folder: It.
        final: From `to_convert`.

    Returns:
        The other name.

    Raises:
        InputError: It cannot be read.
        OSError: A file cannot be written.
    """
    before = final.with_name(f"{final.name}{CONVERTED}")
    begin(final)
    sums: dict[str, FileSum] = {}
    for state in sorted(folder.glob("*/state")):
        engine = state.parent.name
        written = convert_engine(state, partial(final) / engine)
        sums |= {f"{engine}/{file}": known for file, known in written.items()}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        shutil.copyfile(file, partial(final) / file.name)
        sums[file.name] = sum_of(file)
    # Not before: one that cannot be converted keeps its name.
    if folder != before:
        os.rename(folder, before)
    complete(final, sums)
    return before
