"""Triton's interpreter, made faster for the tests.

A launch replaces the functions of `triton.language` by ones for NumPy, and so does each call of a jitted function in
it, with a look at every name in these modules: two thirds of a kernel's time. Once a launch is enough.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_the_language_once_a_launch() -> None:
    """From now on, in this process."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    def patch_once(fn: Any) -> Any:
        # What is replaced depends on which of the two a function sees.
        sees = tuple(any(value is module for value in fn.__globals__.values()) for module in (tl, tl.core))
        if sees in patched:
            return _NothingToRestore()
        patched.add(sees)
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
