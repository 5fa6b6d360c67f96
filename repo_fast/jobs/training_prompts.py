"""Which prompts a model has seen in training or tuning: what it is not to be certified on.

Every training job leaves `training_prompts.json` in its output folder, beside the model that it makes, before its first
step:

    {"format": 1, "model": "policy", "sources": [
      {"option": "data.prompts", "source": "world:train", "of": null, "hashes": ["00a1…", …]},
      {"option": "data.train", "source": "sft.jsonl", "of": "outputs/sft/policy", "hashes": […]},
      {"option": "model.path", "source": "owner/model", "of": "outputs/sft/policy", "hashes": null}]}

It has what the run reads, prompts to evaluate on included, for a run is tuned by those, and what the records beside the
models say that it starts from or is scored by. A model without a record, as one from the hub, a judge or a guard is,
has been trained on something too: it is there with `null`. Of a Python function there is nothing to say. No text is
kept, only hashes: 100,000 prompts are 2 MB. A model's folder may also have its record inside, about the model ".".

All prompts that a source's reader returns are there, also those that are then dropped as too long: a prompt that is
excluded in excess costs a certificate one prompt, one that is missed costs it its meaning. Of a dialogue each turn of
the user's is there by itself, and the dialogue up to it: answers within it are learned too. System texts are left out.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from repo_fast.config import RunConfig
from repo_fast.config.sections import GUARD, JUDGE, is_called
from repo_fast.data import Dialogue, Prompt
from repo_fast.errors import InputError, first_line
from repo_fast.jobs.fingerprints import data_sources, model_paths
from repo_fast.models.model_config import folder_of
from repo_fast.report.rewriting import rewriting
from repo_fast.world import EMBEDDED

FILE = "training_prompts.json"
# The model that a record in its own folder is about.
INSIDE = "."
_FORMAT = 1
_HASH = re.compile(r"[0-9a-f]{16}")
_KEYS = {"option", "source", "of", "hashes"}


@dataclass(frozen=True)
class Source:
    """Prompts that a model has seen.

    Attributes:
        option: Of the run, that names where they are from; of an embedded model the stage of its training.
        source: What it names: data, or a model of which nothing is known.
        of: The model whose run that was, as it was named; None for the model itself.
        hashes: Of the prompts, each once, in order; None where they are not known.
    """

    option: str
    source: str
    of: str | None
    hashes: tuple[str, ...] | None

    @property
    def name(self) -> str:
        """For people: `data.prompts (world:train)`, or the same `of outputs/sft/policy`."""
        return f"{self.option} ({self.source})" + (f" of {self.of}" if self.of is not None else "")


Record = tuple[Source, ...]


def normalized(text: str) -> str:
    """A text such that those who ask the same thing, written otherwise, are equal.

    Unicode's compatible forms are one (NFKC: full-width letters, ligatures), case is ignored (casefold), what has no
    width is left out, white space of any kind and length is one space and at the ends none. Punctuation at the ends
    goes too: with a question mark or without, in quotation marks or not, it is the same request, and lists of prompts
    differ in just that. Inside, it stays, for it may say what is meant; so does a text of nothing else.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        for character in set(text):
            if unicodedata.category(character) == "Cf":
                text = text.replace(character, "")
        text = unicodedata.normalize("NFKC", text.casefold())
    words = " ".join(text.casefold().split())
    first, end = 0, len(words)
    while first < end and _is_outer(words[first]):
        first += 1
    while first < end and _is_outer(words[end - 1]):
        end -= 1
    return words[first:end] or words


def _is_outer(character: str) -> bool:
    return character == " " or unicodedata.category(character).startswith("P")


def prompt_hash(asked: Dialogue) -> str:
    """What a prompt is found by: 16 hexadecimal digits of its turns as one text (`Dialogue.text`), normalised."""
    return _hash(Dialogue(asked.turns).text)


def _hash(text: str) -> str:
    return hashlib.sha256(normalized(text).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_hashes(asked: Iterable[Dialogue]) -> tuple[str, ...]:
    """Of all that was asked in the dialogues that a model has seen: each turn of the user's, and the dialogue to it."""
    texts = {
        Dialogue(dialogue.turns[first : last + 1]).text
        for dialogue in asked
        for last in range(0, len(dialogue.turns), 2)
        for first in (0, last)
    }
    return tuple(sorted({_hash(text) for text in texts}))


def record_of(config: RunConfig, asked: Mapping[str, Iterable[Dialogue]], resume_from: Path | None) -> Record:
    """What the model of a run will have seen.

    Args:
        config: Of the run.
        asked: What it has read, by the option that names the data.
        resume_from: The checkpoint that it goes on from, whose run may have read other data; None for a new run.

    Raises:
        InputError: A record beside a model, or beside the checkpoints, is damaged.
    """
    found = [
        Source(option, source, None, prompt_hashes(asked[option]))
        for option, (source, _) in data_sources(config).items()
    ]
    for option, path in model_paths(config).items():
        found += taken_over(option, path)
    if resume_from is not None:
        file = resume_from.resolve().parent.parent / FILE
        # A run of before there were records.
        found += _read(file)[1] if file.is_file() else (Source("resume", str(resume_from), None, None),)
    return distinct(found)


def held_out_notes(asked: Mapping[str, Iterable[Dialogue]], held_out: str, source: str | None) -> list[str]:
    """What the user should know where prompts to evaluate on are trained on too.

    Args:
        asked: What the run has read, by the option that names the data.
        held_out: The option of those to evaluate on.
        source: What that names.
    """
    of = {option: {prompt_hash(dialogue) for dialogue in dialogues} for option, dialogues in asked.items()}
    own = of.pop(held_out, set())
    shared = len(own & set().union(*of.values()))
    if not shared:
        return []
    return [f"{source}: {shared} of {len(own)} prompts to evaluate on are trained on too, and are not held out"]


def taken_over(option: str, path: str) -> Record:
    """What is known of a model to whom starts from it, or is scored by it.

    Args:
        option: That names it, for what has no record.
        path: As for `policy.path`, or for a scorer.

    Raises:
        InputError: Its record is damaged.
    """
    record = read_record(path)
    if record is not None:
        return tuple(source if source.of is not None else replace(source, of=path) for source in record)
    is_function = is_called(path) and not path.startswith(JUDGE) and folder_of(path) is None
    return () if is_function else (Source(option, path, None, None),)


def distinct(sources: Iterable[Source]) -> Record:
    """The same, each once: what several models were trained on alike stays with the first."""
    found: dict[tuple, Source] = {}
    for source in sources:
        found.setdefault((source.option, source.source, source.hashes), source)
    return tuple(found.values())


def write_record(folder: Path, model: str, record: Record) -> None:
    """Write a run's record, over one of before, which stays until the new one is whole.

    Args:
        folder: The run's output folder, or that of the model.
        model: The name of the model's folder, in it; or `INSIDE`.
        record: Of the model.

    Raises:
        OSError: It cannot be written.
    """
    content = {"format": _FORMAT, "model": model, "sources": [asdict(source) for source in record]}
    with rewriting(folder / FILE) as file:
        file.write(json.dumps(content, separators=(",", ":")) + "\n")


def read_record(path: str) -> Record | None:
    """What a model has seen; None where that is not known.

    Args:
        path: Of a model, as options name it: a folder, which the record beside it has to be about, an embedded one, a
            hub name, `guard:FOLDER`, or else a scorer that is no model.

    Raises:
        InputError: Its record is damaged.
    """
    if path in EMBEDDED:
        return _of_embedded(path)
    folder = folder_of(path.removeprefix(GUARD))
    if not path or folder is None:
        return None
    folder = folder.resolve()
    if (folder / FILE).is_file():
        model, record = _read(folder / FILE)
        if model == INSIDE:
            return record
    if not (folder.parent / FILE).is_file() and (folder / "adapter_config.json").is_file():
        # Adapters stand in the folder of the model that they are merged into.
        folder = folder.parent
    file = folder.parent / FILE
    if not file.is_file():
        return None
    model, record = _read(file)
    return record if model == folder.name else None


def is_about_its_folder(folder: Path) -> bool:
    """Whether a folder has a record, and that is about the model in the folder itself.

    Raises:
        InputError: It is damaged.
    """
    return (folder / FILE).is_file() and _read(folder / FILE)[0] == INSIDE


def copy_record(output_dir: Path, folder: Path) -> bool:
    """Give a model that a run made its record inside, from the run's own; returns whether there is one.

    Raises:
        InputError: It is damaged.
        OSError: It cannot be written.
    """
    if not (output_dir / FILE).is_file():
        return False
    write_record(folder, INSIDE, _read(output_dir / FILE)[1])
    return True


@cache
def _of_embedded(path: str) -> Record:
    from repo_fast.world.policy import base_recipe, tiny_recipe, training_rows

    recipe = tiny_recipe() if path == "world:tiny" else base_recipe()
    hashes = prompt_hashes(Dialogue((row["prompt"],)) for row in training_rows(recipe))
    return (Source(recipe.stage, "demonstrations of the embedded world", None, hashes),)


def _read(file: Path) -> tuple[str, Record]:
    """The name of the model's folder, and the record."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, first_line(error)) from error
    if not isinstance(content, dict) or "format" not in content:
        raise _damaged(file, "it has no format")
    if content["format"] != _FORMAT:
        raise _damaged(file, f"it is of format {str(content['format'])[:20]!r}")
    model, sources = content.get("model"), content.get("sources")
    if not isinstance(model, str) or not isinstance(sources, list):
        raise _damaged(file, "it has no model, or no list of sources")
    for number, source in enumerate(sources, start=1):
        if not _is_source(source):
            raise _damaged(file, f"source {number} is none")
    return model, tuple(
        Source(**source | {"hashes": None if source["hashes"] is None else tuple(source["hashes"])})
        for source in sources
    )


def _damaged(file: Path, what: str) -> InputError:
    return InputError(
        f"{file} is damaged ({what}), expected the record of a run's training prompts, of format {_FORMAT}; without "
        "the file they count as not known"
    )


def _is_source(source: object) -> bool:
    if not isinstance(source, dict) or source.keys() != _KEYS:
        return False
    hashes, of = source["hashes"], source["of"]
    texts = [source["option"], source["source"], *([] if of is None else [of])]
    are_hashes = hashes is None or (
        isinstance(hashes, list) and all(isinstance(one, str) and _HASH.fullmatch(one) for one in hashes)
    )
    return are_hashes and all(isinstance(text, str) for text in texts)


def seen(record: Record, prompts: Sequence[Prompt]) -> list[tuple[Prompt, Source]]:
    """Those of the prompts that a model has seen, each with the first of the sources that has it."""
    having: dict[str, Source] = {}
    for source in record:
        for one in source.hashes or ():
            having.setdefault(one, source)
    found = ((prompt, having.get(prompt_hash(prompt.asked))) for prompt in prompts)
    return [(prompt, source) for prompt, source in found if source is not None]


def unknown(record: Record) -> list[str]:
    """What is not known of a model's training, a sentence each."""
    return [
        f"What {source.name} was trained on is not known: prompts from it were not excluded."
        for source in record
        if source.hashes is None
    ]
