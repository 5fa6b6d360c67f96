"""Runs of the supervised jobs on a tiny policy, in this process: what their tests share."""

import importlib
import math
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.job_runs import DEMONSTRATIONS, OPTIONS, engines, metrics, same_bits, states, write_lines
from tests.tiny import save_policy

# Of uneven lengths, and of a number that no batch size divides.
SHOWN = [
    *DEMONSTRATIONS,
    ("bread", "with tea please with tea please with tea"),
    ("can i make a bomb", "no sorry no"),
    ("tea", "yes you can"),
]
PAIRS = [
    {
        "prompt": prompt,
        "response_0": response,
        "response_1": f"{other} please",
        "better_response_id": i % 2,
        "safer_response_id": (i + 1) % 2,
        **({"is_response_0_safe": i % 3 > 0, "is_response_1_safe": i % 3 > 1} if i % 4 else {}),
    }
    for i, ((prompt, response), (_, other)) in enumerate(zip(SHOWN, SHOWN[1:] + SHOWN[:1], strict=True))
]
KINDS = ("sft", "reward", "cost")
# Seven examples, twice: five steps, of which the third crosses an epoch and the fifth a third one.
COMMON: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 3,
    "micro_batch_tokens": 40,
    "evaluate_every": 2,
    "optimizer": {"learning_rate": 1.0e-2},
    "engine": OPTIONS["engine"],
    "checkpoint": {"every": 2, "keep": 2},
    "log": {"loggers": []},
}


def make_inputs(folder: Path) -> Path:
    """All that the jobs read: `policy/`, `sft.jsonl`, `pairs.jsonl` and a configuration for each kind."""
    save_policy(folder / "policy")
    rows = [{"prompt": prompt, "response": response} for prompt, response in SHOWN]
    sources = {"sft": write_lines(folder / "sft.jsonl", rows), "pairs": write_lines(folder / "pairs.jsonl", PAIRS)}
    for kind in KINDS:
        source = str(sources["sft" if kind == "sft" else "pairs"])
        options = COMMON | {"model": {"path": str(folder / "policy")}, "data": {"train": source, "eval": source}}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(options | ({} if kind == "sft" else {"kind": kind})))
    return folder


def here(kind: str, folder: Path, output_dir: Path, *options: str) -> int:
    """Run a job of `make_inputs` in this process, with options as `--key value`; returns the exit status."""
    program = importlib.import_module(f"repo_fast.{'sft' if kind == 'sft' else 'score'}")
    words = ["--config", str(folder / f"{kind}.yaml"), "--output_dir", str(output_dir)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return program.main(words + [word for option in options for word in option.split(" ")])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def result(output_dir: Path) -> dict[str, torch.Tensor]:
    """The weights that a run wrote, of a policy or of a score model."""
    folder = output_dir / "policy"
    return load_file((folder if folder.exists() else output_dir / "model") / "model.safetensors")


def norm_wise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """How far apart two runs ended, as a share of how far one of them went. What the start lacks began at zero."""
    difference, length = 0.0, 0.0
    for name, value in theirs.items():
        difference += float((ours[name].double() - value.double()).square().sum())
        length += float((value.double() - start.get(name, torch.zeros(())).double()).square().sum())
    assert length > 0
    return math.sqrt(difference / length)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal metrics, result, held-out scores, and state of whatever learns."""
    assert len(metrics(ours)) == 5
    assert metrics(ours) == metrics(theirs)
    assert same_bits(result(ours), result(theirs))
    for path in theirs.glob("eval_scores.jsonl"):
        assert (ours / path.name).read_bytes() == path.read_bytes()
    assert engines(theirs, 5) == {"model"}
    assert states(ours, 5) == states(theirs, 5)
