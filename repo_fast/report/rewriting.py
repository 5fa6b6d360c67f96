"""Files that are whole or as they were: written aside, and renamed once they are on disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[TextIO]:
    """A file to write to, which takes the place of one of that name when the block ends, and not where it raises.

    UTF-8; a lone surrogate, which JSON may hold, is written as its escape. Raises `OSError`.
    """
    aside = path.with_name(f"{path.name}.tmp")
    # Of a writer that was killed; or a link, which would lead out of the folder, or a pipe.
    aside.unlink(missing_ok=True)
    try:
        with open(aside, "x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
