"""A model folder's configuration: what is taken out of it while the model is used, and put back where it is written."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, PretrainedConfig

from repo_fast.errors import InputError, first_line, readable
from repo_fast.models.weight_files import find_file


def folder_of(path: str) -> Path | None:
    """The folder that a model's path names, `~` for the user's own; None where it names none, and may be on the hub."""
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):
        # A name that is too long, or of no user.
        return None


def may_be_on_the_hub(path: str) -> bool:
    """Whether what is no folder here may be the name of a model on the hub, `owner/model` or, of the oldest, `model`.

    Where the first part is a folder here, it is a mistyped path rather than something to download.
    """
    try:
        validate_repo_id(path)
        return "/" not in path or not Path(path).parent.is_dir()
    except (HFValidationError, OSError):
        return False


def load_config(path: str) -> PretrainedConfig:
    """A model folder's configuration, without its pad token: under ZeRO-3 an embedding with one cannot be built.

    Raises:
        InputError: There is no readable model configuration at `path`.
    """
    config = _read_config(path)
    config.pad_token_id = None
    return config


def _read_config(path: str) -> PretrainedConfig:
    config = _read(path)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            raise InputError(f"{path!r} has a config.json with {name} {size}, expected a whole number of at least 1")
    return config


def _read(path: str) -> PretrainedConfig:
    if folder_of(path) is None and not may_be_on_the_hub(path):
        raise InputError(f"{path!r} is neither the folder of a model nor a hub name, expected one of them")
    try:
        # Said, or transformers would ask on standard input whether to run a folder's own code.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except StrictDataclassError as error:
        raise InputError(f"{path!r} has a config.json that cannot be: {' '.join(str(error).split())}") from error
    except Exception as error:  # its files are the user's, and may hold anything
        if (folder := folder_of(path)) is not None:
            # Of a file that may not be read transformers says that it lacks something.
            with readable(folder), contextlib.suppress(FileNotFoundError):
                open(folder / "config.json").close()
        if _has_only_adapters(path):
            raise InputError(
                f"{path!r} holds adapters without a config.json, as policies', those of earlier versions and of other "
                "programs do: expected the folder of the merged model, or the adapter/ of a score model with all of it"
            ) from error
        raise InputError(f"{path!r} is not a Hugging Face model folder or hub name: {first_line(error)}") from error


def _has_only_adapters(path: str) -> bool:
    try:
        return find_file(path, "config.json") is None and find_file(path, "adapter_config.json") is not None
    except OSError:
        return False


def set_aside(path: str) -> dict[str, Any]:
    """What a model folder's configuration says of its pad token and of dropout, by name.

    `load_config` and `trunk.disable_dropout` take it out of the configuration that a model is trained with, and
    `restored` puts it back where the model is written.

    Raises:
        InputError: There is no readable model configuration at `path`.
    """
    settings = vars(_read_config(path))
    return {name: value for name, value in settings.items() if name == "pad_token_id" or is_dropout(name, value)}


@contextlib.contextmanager
def restored(config: PretrainedConfig, aside: Mapping[str, Any]) -> Iterator[None]:
    """While this is open, a model's configuration has what was set aside of it: it is what is written."""
    neutral = {name: getattr(config, name, None) for name in aside}
    for name, value in aside.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in neutral.items():
            setattr(config, name, value)


def is_dropout(name: str, value: Any) -> bool:
    """Whether a setting is a probability of dropout, and not 0."""
    return "drop" in name and type(value) is float and value != 0.0
