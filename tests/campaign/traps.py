"""What an attack is made of: code that leaves a trace where it runs, models and runs to hide it in, programs to open
them with.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from repo_fast.checkpoints.files import sum_of
from repo_fast.checkpoints.manifest import MANIFEST, read_manifest, seal
from tests.job_runs import REPOSITORY, Job, write_lines
from tests.supervised_runs import make_inputs

# A run of one step, of what is cheapest.
SMALL = ("--total_steps 1", "--algorithm.advantage rloo", "--data.ptx null", "--algorithm.ptx_coefficient 0")
_GUARD = (
    "--cost.guard.safe",
    '[" no"]',
    "--cost.guard.unsafe",
    '[" yes"]',
    "--cost.guard.prompt",
    "{prompt} {response}",
)


class Trap:
    """A folder that is there once the code ran. It is no pickle of this class, but of what makes the folder."""

    def __init__(self, folder: Path) -> None:
        self.sprung = folder / "sprung"

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.sprung),)

    @property
    def code(self) -> str:
        """Python that does it."""
        return f"import os\nos.path.isdir({str(self.sprung)!r}) or os.mkdir({str(self.sprung)!r})\n"

    def assert_springs(self, load: Callable[[], Any]) -> None:
        """That it works on who does not look: else nothing would be shown by what follows."""
        with contextlib.suppress(Exception):
            load()
        assert self.sprung.exists(), "the attack does nothing to who does not look either"
        self.sprung.rmdir()

    def assert_is_whole(self, what: str) -> None:
        assert not self.sprung.exists(), f"code was executed by {what}"

    def pickle_to(self, file: Path) -> None:
        """A file of plain pickle."""
        file.write_bytes(pickle.dumps(self))
        self.assert_springs(lambda: pickle.loads(file.read_bytes()))

    def save_to(self, file: Path, zipped: bool = True) -> None:
        """A file as `torch.save` writes it, in its older form or the newer one."""
        torch.save({"model.embed_tokens.weight": self}, file, _use_new_zipfile_serialization=zipped)
        self.assert_springs(lambda: torch.load(file, weights_only=False))


def call(module: str, *words: str) -> tuple[int, str]:
    """Run a program in this process: its exit status, and what it printed. A traceback is raised."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = importlib.import_module(module).main(list(words))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, printed.getvalue()


def started(words: Sequence[str], **options: Any) -> subprocess.Popen:
    """A program in a process of its own, in the repository."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, env=variables, **pipes, **options)


class Place:
    """A folder with inputs of every job, and the programs that open a model's folder.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder / "inputs", Job.make(folder / "inputs")
        make_inputs(self.folder)
        self._runs = 0

    def out(self) -> Path:
        """A new folder for results."""
        self._runs += 1
        return self.folder.parent / "results" / str(self._runs)

    def copy(self, source: Path | None = None) -> Path:
        """A folder to poison, of the policy unless said."""
        return Path(shutil.copytree(source or self.folder / "policy", self.out()))

    def train(self, *options: str) -> tuple[int, str]:
        return call("repo_fast.train", *self.job.words(self.out(), *SMALL, *options))

    def supervised(self, kind: str, *options: str) -> tuple[int, str]:
        words = ["--config", str(self.folder / f"{kind}.yaml"), "--output_dir", str(self.out()), "--epochs", "1"]
        module = "repo_fast.sft" if kind == "sft" else "repo_fast.score"
        return call(module, *words, *(word for option in options for word in option.split(" ")))

    def evaluate(self, *options: str, out: Path | None = None) -> tuple[int, str]:
        words = ["--output_dir", str(out or self.out()), "--samples_per_prompt", "2", "--resamples", "20"]
        words += ["--sampling.max_new_tokens", "4", "--reward.path", "tests.scorers:reward"]
        return call("repo_fast.evaluate", *words, *(word for option in options for word in option.split(" ")))

    def prompts(self) -> str:
        return str(self.folder / "prompts.jsonl")

    def open_policy(self, model: Path) -> dict[str, tuple[int, str]]:
        """What every program that takes a policy's folder makes of one."""
        own = f"--policy a={model} --prompts {self.prompts()} --cost.path tests.scorers:cost"
        planned = ["--gpus", "1", *self.job.words(self.out(), f"--policy.path {model}")]
        return {
            "train": self.train(f"--policy.path {model}"),
            "sft": self.supervised("sft", f"--model.path {model}"),
            "score": self.supervised("reward", f"--model.path {model}"),
            "evaluate": self.evaluate(own),
            "plan": call("repo_fast.plan.__main__", *planned),
            "guard": call(
                "repo_fast.train", *self.job.words(self.out(), *SMALL, f"--cost.path guard:{model}"), *_GUARD
            ),
        }

    def open_score_model(self, model: Path) -> dict[str, tuple[int, str]]:
        """The same of a score model's."""
        return {
            "score --check": call("repo_fast.score", "--check", str(model), "--kind", "reward"),
            "score --convert": call(
                "repo_fast.score", "--convert", str(model), "--to", str(self.out()), "--kind", "reward"
            ),
            "train": self.train(f"--reward.path {model}"),
            "critic": self.train(f"--reward.path {model}", "--algorithm.advantage gae"),
        }

    def run(self, *options: str) -> Path:
        """A run of two steps with a checkpoint of each."""
        folder = self.out()
        words = self.job.words(folder, *SMALL, "--checkpoint.every 1", "--checkpoint.keep 0", *options)
        status, said = call("repo_fast.train", *words, "--total_steps", "2")
        assert status == 0, said
        return folder

    def resume(self, output_dir: Path, resume: str = "auto") -> tuple[int, str]:
        """Go on with such a one."""
        words = self.job.words(output_dir, *SMALL, "--checkpoint.every 1", "--checkpoint.keep 0")
        return call("repo_fast.train", *words, "--total_steps", "2", "--resume", resume)


def sealed_again(checkpoint: Path) -> None:
    """Give a checkpoint whose files were changed a manifest that agrees: who changes the ones can change the other."""
    names = [*read_manifest(checkpoint)]
    seal(checkpoint, {name: sum_of(checkpoint / name) for name in names})


def renamed_in_manifest(checkpoint: Path, before: str, after: str) -> None:
    """Let the manifest of a checkpoint name a file otherwise."""
    files = read_manifest(checkpoint)
    seal(checkpoint, {after if name == before else name: known for name, known in files.items()})
    assert after in json.loads((checkpoint / MANIFEST).read_text())["files"]


def edit_json(file: Path, **changes: Any) -> None:
    """Change settings of a file of JSON, which is made where there is none."""
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def edit_yaml(file: Path, **changes: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


@contextlib.contextmanager
def modules_of_models_in(folder: Path) -> Any:
    """Let transformers keep the code of models, which it is told to trust here, in a folder that goes again."""
    from transformers import dynamic_module_utils

    with mock.patch.object(dynamic_module_utils, "HF_MODULES_CACHE", str(folder)):
        yield


__all__ = [
    "SMALL",
    "Place",
    "Trap",
    "call",
    "edit_json",
    "edit_yaml",
    "modules_of_models_in",
    "renamed_in_manifest",
    "sealed_again",
    "started",
    "write_lines",
]
