"""Evaluations drawn by vLLM, in one process, for `tests/evaluation/test_vllm.py`."""

import contextlib
import functools
import io
import json
import os
from pathlib import Path
from typing import Any

from repo_fast import engine
from repo_fast.evaluate import main
from repo_fast.evaluation import drawing
from repo_fast.rollout.vllm import VllmEngine
from tests.job_runs import PROMPTS, write_lines
from tests.rollout.vllm_architectures import SIZES, save
from tests.tiny import save_policy

K = 3


def make_inputs(folder: Path) -> Path:
    """Two policies and `prompts.jsonl`."""
    save_policy(folder / "one", seed=1, **SIZES)
    save_policy(folder / "two", seed=2, tie_word_embeddings=True, **SIZES)
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    return folder


def words(folder: Path, output_dir: Path, *options: str, policies: tuple[str, ...] = ("one", "two")) -> list[str]:
    named = [word for name in policies for word in ("--policy", f"{name}={folder / name}")]
    common = ["--prompts", str(folder / "prompts.jsonl"), "--output_dir", str(output_dir), "--resamples", "10"]
    common += ["--samples_per_prompt", str(K), "--reward.path", "tests.evaluation.test_evaluate:reward"]
    drawn = ["--cost.path", "tests.scorers:cost", "--sampling.max_new_tokens", "6", "--sampling.batch_size", "2"]
    return [*named, *common, *drawn, *options]


# A nucleus of one token: no random number says which.
LIKELIEST = ("--sampling.top_p", "0.001")
VLLM = ("--sampling.engine", "vllm", "--sampling.vllm.compile", "false")


def drawn(output_dir: Path) -> list[tuple[str, int, int, str]]:
    rows = map(json.loads, (output_dir / "samples.jsonl").read_text().splitlines())
    return [(row["policy"], row["prompt_id"], row["sample"], row["response"]) for row in rows]


def keep_caches_small() -> None:
    """There is no end of an engine but that of its process."""
    import vllm

    # On a CPU this would be what each takes, whatever it is told.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    vllm.LLM = functools.partial(vllm.LLM, kv_cache_memory_bytes=2**24)


def compare(folder: Path) -> dict[str, Any]:
    """What came out, by what was asked for."""
    keep_caches_small()
    engine.stop_distributed = lambda: None
    make_inputs(folder)
    found: dict[str, Any] = {}

    def evaluate(name: str, output_dir: str, *options: str, **settings: Any) -> None:
        said, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            status = main(words(folder, folder / output_dir, *options, **settings))
        rows = drawn(folder / output_dir) if status == 0 else []
        found[name] = {"status": status, "errors": errors.getvalue(), "rows": rows}

    def stop_at(call: int) -> None:
        """The engine's draw of this number fails, once."""
        calls, draw = 0, VllmEngine.draw

        def failing(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                VllmEngine.draw = draw
                raise KeyboardInterrupt
            found["draws"] = found.get("draws", 0) + 1
            return draw(*args)

        VllmEngine.draw = failing

    # The same cache: what one engine drew is not taken for the other's.
    evaluate("hf, likeliest", "likeliest", *LIKELIEST)
    evaluate("vllm, likeliest", "likeliest", *LIKELIEST, *VLLM)
    evaluate("vllm", "drawn", *VLLM)
    # Three units of 2, 2 and 1 responses at once are at least 5.
    drawing._VLLM_AT_ONCE = 5
    stop_at(3)
    with contextlib.suppress(KeyboardInterrupt):
        evaluate("stopped", "stopped", *VLLM, policies=("one",))
    evaluate("gone on", "stopped", *VLLM, policies=("one",))
    Path(save("Cohere, untied", folder)).rename(folder / "cohere")
    evaluate("no head", "refused", *VLLM, policies=("cohere",))
    return found


def on_two_ranks(folder: Path) -> int:
    """On each rank: an engine that both share."""
    keep_caches_small()
    options = (*VLLM, *LIKELIEST, "--sampling.vllm.tensor_parallel", "2")
    return main(words(folder, folder / "shared", *options))
