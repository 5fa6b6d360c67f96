"""The drawing of an evaluation: vLLM beside Hugging Face `generate`, in one process, on the same units.

    OMP_NUM_THREADS=2 VLLM_CPU_KVCACHE_SPACE=1 python -m bench.evaluation_phase [--geometry NAME]

At the CPU's geometry: 32 prompts of 16 to 64 tokens, K = 8 responses of 1 to 256 tokens to each. Both are what
`repo_fast.evaluate` draws with, in turn, round by round; the first round is not counted. Printed is the median of
tokens a second, and how long each took to begin: to load the policy, and of vLLM to start and to be verified.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.job_folder import write_job
from bench.measuring.machine import environment_table, machine
from bench.measuring.tables import render
from bench.training_phase import GEOMETRIES, Geometry
from repo_fast.config import EvaluateConfig, SamplingConfig, ScorerConfig
from repo_fast.data import PromptTemplate, load_prompts, load_tokenizer
from repo_fast.engine import start_distributed, stop_distributed
from repo_fast.evaluation.drawing import open_drawer
from repo_fast.evaluation.inputs import PolicyInput
from repo_fast.rollout import Request
from repo_fast.rollout.units import units_of

ENGINES = ("hf", "vllm")
# Which a configuration has to have; nothing is scored.
SCORER = ScorerConfig(path="bench.job_folder:reward")
SAMPLES_PER_PROMPT = 8
ROUNDS = 5


def measure(folder: Path, geometry: Geometry) -> dict[str, dict[str, Any]]:
    """By engine: `seconds_to_begin`, and of each round but the first `tokens_per_s`.

    Args:
        folder: What `job_folder.write_job` wrote.
        geometry: Of the policy and its responses.
    """
    path = str(folder / "policy")
    tokenizer = load_tokenizer(path)
    prompts = load_prompts(str(folder / "prompts.jsonl"))
    requests = [Request(prompt, tokenizer(prompt.text, return_tensors="pt").input_ids[0]) for prompt in prompts]
    policy = PolicyInput(path, tokenizer, PromptTemplate(tokenizer, "plain"), requests)
    ranks = start_distributed()
    dtype = torch.float32 if ranks.device.type == "cpu" else torch.bfloat16
    loading = {"dtype": dtype, "attention": "sdpa"}
    found: dict[str, dict[str, Any]] = {}
    drawers = {}
    for engine in ENGINES:
        sampling = SamplingConfig(max_new_tokens=geometry.responses[1], engine=engine)
        config = EvaluateConfig(policies={"policy": path}, sampling=sampling, reward=SCORER, cost=SCORER)
        started = time.perf_counter()
        drawers[engine] = open_drawer(config, policy, ranks, loading)
        found[engine] = {"seconds_to_begin": time.perf_counter() - started, "tokens_per_s": []}
    units = units_of(requests, SAMPLES_PER_PROMPT, config.sampling.batch_size, seed=0)
    for number in range(ROUNDS + 1):
        for engine, drawer in drawers.items():
            started = time.perf_counter()
            rollouts = [rollout for group in drawer.grouped(units) for rollout in drawer.draw(group)]
            seconds = time.perf_counter() - started
            tokens = sum(response.numel() for rollout in rollouts for response in rollout.response_tokens)
            if number > 0:
                found[engine]["tokens_per_s"].append(tokens / seconds)
    for drawer in drawers.values():
        drawer.close()
    stop_distributed()
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """What `measure` found, as text."""
    speeds = {engine: statistics.median(own["tokens_per_s"]) for engine, own in found.items()}
    # Of each round, in which both are on the same machine.
    ratios = [b / a for a, b in zip(found["hf"]["tokens_per_s"], found["vllm"]["tokens_per_s"], strict=True)]
    times = {"hf": "1", "vllm": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"}
    rows = [
        [engine, f"{speeds[engine]:.0f}", times[engine], f"{found[engine]['seconds_to_begin']:.1f}"]
        for engine in ENGINES
    ]
    return render(["evaluation", "tokens/s", "x hf, of the rounds", "s to begin"], rows)


def main() -> None:
    """Measure, and print a table and the machine."""
    parser = argparse.ArgumentParser(description="The drawing of an evaluation.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="cpu")
    geometry = GEOMETRIES[parser.parse_args().geometry]
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder), geometry, geometry.sequences)
        print(table(measure(Path(folder), geometry)))
    print(environment_table({"machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}))


if __name__ == "__main__":
    main()
