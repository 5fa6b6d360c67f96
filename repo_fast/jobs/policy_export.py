"""The policy of a checkpoint as a Hugging Face folder, without DeepSpeed, a GPU, or the ranks that wrote it."""

import logging
from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, LoraConfig, ModelConfig
from repo_fast.engine import Engine, read_weights
from repo_fast.engine.saved import Saved
from repo_fast.errors import InputError, readable
from repo_fast.jobs.assembly import load_policy
from repo_fast.jobs.checkpoint import partial, read_run
from repo_fast.jobs.fingerprints import changes, of_model, were_whole
from repo_fast.jobs.inputs import find_model
from repo_fast.jobs.training_prompts import FILE, copy_record
from repo_fast.models.policy import save_policy
from repo_fast.report.folders import publish, remove

log = logging.getLogger(__name__)


def export_policy(checkpoint: Path, folder: Path) -> None:
    """Write what the end of the run would have written at that step; inside it, what it has seen in training.

    Args:
        checkpoint: A sound one of `repo_fast.train` or `repo_fast.sft`.
        folder: Written whole; it must not exist.

    Raises:
        InputError: The checkpoint is of a score model; the model that the run started from is not there, or has other
            frozen weights, or other files than it had; the folder exists, or cannot be written.
    """
    _check_new(folder)
    aside = partial(folder)
    _check_new(aside)
    run = read_run(checkpoint)
    if "kind" in run["config"]:
        raise InputError(f"{str(checkpoint)!r} is of a score model, expected one of repo_fast.train or repo_fast.sft")
    engine, settings = _model_of(checkpoint, run)
    key, now = f"{engine}.path", of_model(settings.path, whole=were_whole(run))
    # Of what cannot be told now nothing is said.
    for change in changes({key: run.get("inputs", {}).get(key, {})}, {key: now} if now else {}):
        raise InputError(
            f"checkpoint {checkpoint} is of another model: {' '.join(change)} since the run started, expected as it was"
        )
    dtype = Saved.read(checkpoint / engine).dtype
    ranks = Ranks(0, 1, torch.device("cpu"))
    whole = EngineConfig(zero_stage=1, dtype=dtype)
    path, tokenizer = find_model(settings.path)
    policy = load_policy(path, tokenizer, settings, whole, ranks)
    read_weights(policy, checkpoint / engine, ranks)
    state = Engine(policy, whole, ranks).whole_state()
    try:
        save_policy(aside, policy, state, tokenizer, path)
        if not copy_record(checkpoint.resolve().parent.parent, aside):
            log.warning("there is no %s beside the checkpoints: what %s has seen is not known", FILE, folder)
        publish(aside, folder)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error
    finally:
        remove(aside)


def _check_new(folder: Path) -> None:
    with readable(folder):
        exists = folder.exists() or folder.is_symlink()
    if exists:
        raise InputError(f"{str(folder)!r} exists, expected a new folder")


def _model_of(checkpoint: Path, run: dict) -> tuple[str, ModelConfig]:
    """The engine that has the policy, and what the run was told of it."""
    engine = "policy" if "policy" in run["config"] else "model"
    try:
        section = run["config"][engine]
        lora = LoraConfig(**section["lora"] | {"targets": tuple(section["lora"]["targets"])})
        return engine, ModelConfig(**section | {"lora": lora})
    except (LookupError, TypeError) as error:
        raise InputError(
            f"checkpoint {checkpoint} is of no run of this repo_fast: its configuration has no {engine!r} as expected"
        ) from error
