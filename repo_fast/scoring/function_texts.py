"""What a scoring function is known by: the texts that it is made of."""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def function_texts(path: str) -> dict[str, str]:
    """The sha256 of a function's module, which is loaded, and of the modules that this imports from its own package or
    folder, by their names. Data that it reads is not part of it.

    Args:
        path: `package.module:function`.
    """
    name = path.partition(":")[0]
    roots = [Path(folder) for folder in getattr(sys.modules[name.partition(".")[0]], "__path__", ())]
    # A module by itself: those beside it.
    roots = roots or [Path(getattr(sys.modules[name], "__file__", None) or "/").parent]
    texts: dict[str, str] = {}
    waiting = [sys.modules[name]]
    while waiting:
        module = waiting.pop()
        file = Path(getattr(module, "__file__", None) or "/")
        inside = file.suffix == ".py" and any(file.is_relative_to(root) for root in roots)
        if module.__name__ in texts or not inside:
            continue
        text = file.read_bytes()
        texts[module.__name__] = hashlib.sha256(text).hexdigest()
        waiting.extend(sys.modules[name] for name in _imported(text, module) if name in sys.modules)
    return texts


def _imported(text: bytes, module: ModuleType) -> Iterator[str]:
    """Names that a module's text imports: of modules, and of what may be one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (entry.name for entry in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            try:
                origin = importlib.util.resolve_name(relative, module.__package__)
            except ImportError:
                # Guarded by the module itself: relative, where there is no package.
                continue
            yield origin
            yield from (f"{origin}.{entry.name}" for entry in node.names)
