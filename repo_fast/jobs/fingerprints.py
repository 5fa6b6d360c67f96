"""What a run starts from, in a few words: whether a file has changed since is then known where the run goes on, and
whether all ranks read the same.

All files are read whole: a model's that changed in one number would go on to other numbers, and nobody would know.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from repo_fast.config import RunConfig, TrainConfig
from repo_fast.config.sections import GUARD
from repo_fast.config.supervised import SupervisedConfig
from repo_fast.data.sources import NO_DATA, WORLD, may_be_on_the_hub
from repo_fast.errors import InputError, readable
from repo_fast.models.model_config import folder_of, load_config
from repo_fast.speed.host import host_cores
from repo_fast.world import EMBEDDED

log = logging.getLogger(__name__)

# A file's name, or that of a data set or model on the hub, and what tells it from another of the same name.
Fingerprint = dict[str, str]

# What a run is evaluated on while it trains.
_HELD_OUT = ("data.eval_prompts",)
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
# Of larger files of a model, runs of before read this many pieces of this size alone.
_PIECE, _PIECES = 64 * 1024, 64


def fingerprints(config: RunConfig) -> dict[str, Fingerprint]:
    """Of everything that a run reads, by the option that names it. What is not there is left to what reads it.

    Raises:
        InputError: Something is there, and cannot be read.
    """
    found = {key: of_data(source, split) for key, (source, split) in data_sources(config).items()}
    paths = model_paths(config)
    models = {path: of_model(path) for path in {*paths.values()}}
    found |= {key: models[path] for key, path in paths.items()}
    return {key: fingerprint for key, fingerprint in found.items() if fingerprint}


def of_data(source: str, split: str) -> Fingerprint:
    """Of a source of data (`repo_fast.data.sources`): its files' contents, or what `datasets` tells a revision by."""
    if source.startswith(WORLD):
        # It comes with the package.
        return {}
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError):
        # No such user, or a name that is too long: told where the data are read.
        return {}
    if is_file:
        return {path.name: _digest(path)}
    if is_folder:
        files = sorted(file for file in path.rglob("*") if file.is_file() and not NO_DATA.fullmatch(file.name))
        return {str(file.relative_to(path)): _digest(file) for file in files}
    if not may_be_on_the_hub(source):
        # Looking for it there takes half a minute without a network.
        return {}
    try:
        import datasets

        return {f"{source} [{split}]": str(datasets.load_dataset(source, split=split)._fingerprint)}
    except Exception:  # the loader's errors share no type, and are told where the data are read
        return {}


def of_model(path: str, *, whole: bool = True) -> Fingerprint:
    """Of a model's folder: its weights, configurations and tokenizer; of a name on the hub, its commit.

    Args:
        path: As options name it.
        whole: Whether all of its files is read, rather than pieces of the large ones, which tell another training.
    """
    path = path.removeprefix(GUARD)
    if path in EMBEDDED:
        from repo_fast.world.policy import embedded_folder

        # Trained on first use, by whatever versions there are then. That is told by what it computes with.
        return _of_files(embedded_folder(path), (".safetensors", "tokenizer.json"), whole)
    folder = folder_of(path)
    if folder is not None:
        return _of_files(folder, _MODEL_SUFFIXES, whole)
    if ":" in path:
        # A function, or a scorer of the embedded world, which comes with the package.
        return {}
    try:
        commit = getattr(load_config(path), "_commit_hash", None)
    except InputError:
        return {}
    return {} if commit is None else {path: commit}


def _of_files(folder: Path, endings: tuple[str, ...], whole: bool) -> Fingerprint:
    with readable(folder):
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(endings))
    # Some weigh gigabytes, and their sums take longer than reading them. Ranks share the host.
    at_once = max(1, host_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPoolExecutor(at_once) as pool:
        digests = list(pool.map(lambda file: _digest(file, None if whole else _PIECES), files))
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def check_unchanged(folder: Path, run: dict, config: RunConfig, now: dict[str, Fingerprint]) -> None:
    """Compare what a checkpoint's run started from with what is there now.

    Args:
        folder: The checkpoint, for messages.
        run: Its `run.json`.
        config: Of the run that goes on from it. Where it allows changes, they are said.
        now: Its `fingerprints`.

    Raises:
        InputError: Something changed, and that is not allowed.
    """
    allowed = config.resume_changed_data
    before = run.get("inputs")
    if before is None:
        log.warning("checkpoint %s is from before data were fingerprinted: whether they changed is not known", folder)
        return
    if not were_whole(run):
        now = now | {key: of_model(path, whole=False) for key, path in model_paths(config).items() if key in now}
    if allowed:
        _check_held_out(folder, before, now)
    changed = [" ".join(change) for change in changes(before, now)]
    if changed and not allowed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"checkpoint {folder} is of other inputs: {changed[0]} since the run started{more}; expected the same, or "
            "--resume_changed_data true to go on"
        )
    if changed:
        log.warning("going on with inputs that are not those of checkpoint %s: %s", folder, "; ".join(changed))
    models = {key: before[key] for key in model_paths(config) if key in before}
    if next(changes(models, now), None) is not None:
        log.warning("a model is another: what was measured before does not compare with what is measured from here on")


def _check_held_out(folder: Path, before: dict[str, Fingerprint], now: dict[str, Fingerprint]) -> None:
    """Raise `InputError` where a run would measure itself on other prompts than before, and take the difference for its
    own doing."""
    for change in changes({key: before[key] for key in _HELD_OUT if key in before}, now):
        raise InputError(
            f"checkpoint {folder} is of other inputs: {' '.join(change)} since the run started; expected the same: a "
            "run's evaluations compare on the same prompts alone, also with --resume_changed_data true"
        )


def were_whole(run: dict) -> bool:
    """Whether the run of a checkpoint read its models' files whole to tell them from others, as told by `run.json`."""
    return run.get("inputs_whole", False)


def changes(before: dict[str, Fingerprint], now: dict[str, Fingerprint]) -> Iterator[tuple[str, str]]:
    """What is not as it was, of the options that both have, and how: ("a.jsonl of data.prompts", "has changed")."""
    for key, then in before.items():
        for name in sorted(then.keys() | now.get(key, then).keys()):
            ours = now.get(key, then)
            if then.get(name) != ours.get(name):
                how = "is new" if name not in then else "is gone" if name not in ours else "has changed"
                yield f"{name} of {key}", how


def data_sources(config: RunConfig) -> dict[str, tuple[str, str]]:
    """The data that a run reads, each with its split, by the option that names it."""
    if isinstance(config, TrainConfig):
        data = config.data
        sources = {
            "data.prompts": (data.prompts, data.prompts_split),
            "data.eval_prompts": (data.eval_prompts, data.eval_split),
            "data.ptx": (data.ptx, data.ptx_split),
        }
    else:
        assert isinstance(config, SupervisedConfig)
        sources = {
            "data.train": (config.data.train, config.data.train_split),
            "data.eval": (config.data.eval, config.data.eval_split),
        }
    return {key: (source, split) for key, (source, split) in sources.items() if source is not None}


def model_paths(config: RunConfig) -> dict[str, str]:
    """The models that a run starts from or is scored by, by the option that names them; functions and judges too."""
    if isinstance(config, TrainConfig):
        return {"policy.path": config.policy.path} | {
            f"{config.section_of(name)}.path": scorer.path for name, scorer in config.all_scorers.items()
        }
    assert isinstance(config, SupervisedConfig)
    return {"model.path": config.model.path}


def _digest(path: Path, pieces: int | None = None) -> str:
    digest = hashlib.sha256()
    with readable(path), open(path, "rb") as file:
        for piece in _read(file, path.stat().st_size, pieces):
            digest.update(piece)
    return digest.hexdigest()


def _read(file: IO[bytes], size: int, pieces: int | None) -> Iterator[bytes]:
    if pieces is None or size <= pieces * _PIECE:
        while piece := file.read(2**20):
            yield piece
        return
    yield str(size).encode()
    for i in range(pieces):
        file.seek((size - _PIECE) * i // (pieces - 1))
        yield file.read(_PIECE)
