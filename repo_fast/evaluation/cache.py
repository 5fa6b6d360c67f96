"""What an evaluation keeps on disk, so that a policy, a prompt's sample, a score is paid for once.

    cache/lock                      held by the evaluation that uses the cache
    cache/KEY/about.json            what the key stands for; prompts.json: its prompts, by hashes
    cache/KEY/samples.jsonl         the responses of one policy, as drawn for one set of prompts and settings
    cache/KEY/reward-KEY.jsonl      their scores by one scorer, in the order of the responses

Rows are appended in *units* (`repo_fast/report/unit_file.py`), each of which is drawn or scored at once.
A key is a hash of everything that the rows depend on, so another setting is another file, and nothing is overwritten.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_fast.models.model_config import folder_of, load_config
from repo_fast.scoring import ScorerSpec, function_texts


def key_of(what: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that differ where `what`, plain JSON values, differs."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(path: str) -> list:
    """What tells a model from another of the same name: its files' names, sizes and times, or its commit on the hub.

    Texts about it, as the model card is, are no part of it.
    """
    folder = folder_of(path)
    if folder is None:
        return [path, getattr(load_config(path), "_commit_hash", None)]
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix.lower() != ".md"]
    stats = [(file.name, file.stat()) for file in files]
    return [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def describe(folder: Path, about: Mapping[str, Any], hashes: Sequence[str]) -> None:
    """Write down what a folder of the cache stands for, and the hashes of the texts of its prompts."""
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    (folder / "prompts.json").write_text(json.dumps(sorted(set(hashes))), encoding="utf-8")


def drawn_before(cache_dir: Path, hashes: Sequence[str], reference: str | None) -> dict[str, str]:
    """The folders of a cache that have responses to any of some prompts, and of which policy's folder or name.

    Args:
        cache_dir: The cache.
        hashes: Of the texts of the prompts.
        reference: Path of a policy that does not count; None where every one does.
    """
    found = {}
    left_out = None if reference is None else fingerprint(reference)
    for samples in sorted(cache_dir.glob("*/samples.jsonl")):
        try:
            about = json.loads((samples.parent / "about.json").read_text(encoding="utf-8"))
            asked = json.loads((samples.parent / "prompts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Of a version that did not write it, or not a folder of ours.
            continue
        if samples.stat().st_size and about["policy"] != left_out and not set(hashes).isdisjoint(asked):
            found[samples.parent.name] = str(about["policy"][0])
    return found


def scorer_fingerprint(spec: ScorerSpec) -> list:
    """What tells a scorer from another; of a function, its texts."""
    return [spec.path, sorted(function_texts(spec.path).items())] if spec.kind == "function" else fingerprint(spec.path)
