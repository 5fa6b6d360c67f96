"""The policy of a checkpoint as a Hugging Face folder, without DeepSpeed, a GPU, or the ranks that wrote it."""

from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, LoraConfig, ModelConfig
from repo_fast.engine import Engine, read_weights
from repo_fast.engine.saved import Saved
from repo_fast.errors import InputError, readable
from repo_fast.jobs.assembly import load_policy
from repo_fast.jobs.checkpoint import partial, read_run
from repo_fast.jobs.fingerprints import changes, of_model
from repo_fast.jobs.inputs import find_model
from repo_fast.models.policy import save_policy
from repo_fast.report.folders import publish, remove


def export_policy(checkpoint: Path, folder: Path) -> None:
    """Write what the end of the run would have written at that step.

    Args:
        checkpoint: A sound one of `repo_fast.train` or `repo_fast.sft`.
        folder: Written whole; it must not exist.

    Raises:
        InputError: The checkpoint is of a score model; the model that the run started from is not there, or has other
            frozen weights, or other files than it had; the folder exists, or cannot be written.
    """
    aside = partial(folder)
    for path in (folder, aside):
        with readable(path):
            exists = path.exists() or path.is_symlink()
        if exists:
            raise InputError(f"{str(path)!r} exists, expected a new folder")
    run = read_run(checkpoint)
    config = run["config"]
    if "kind" in config:
        raise InputError(f"{str(checkpoint)!r} is of a score model, expected one of repo_fast.train or repo_fast.sft")
    engine = "policy" if "policy" in config else "model"
    section = config[engine]
    lora = LoraConfig(**section["lora"] | {"targets": tuple(section["lora"]["targets"])})
    settings = ModelConfig(**section | {"lora": lora})
    key, now = f"{engine}.path", of_model(settings.path)
    # Of what cannot be told now nothing is said.
    for change in changes({key: run.get("inputs", {}).get(key, {})}, {key: now} if now else {}):
        raise InputError(
            f"checkpoint {checkpoint} is of another model: {change} since the run started, expected as it was"
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
        publish(aside, folder)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be written: {error.strerror}") from error
    finally:
        remove(aside)
