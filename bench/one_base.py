"""Six models of a LoRA run on one base, and apart: that they compute the same, and what they hold.

    OMP_NUM_THREADS=2 python -m bench.one_base [--policy FOLDER --prompts FILE] [--engine hf | vllm]

Policy, reference, reward and cost model, and two critics that start from these: adapters of rank 16 on one base, the
embedded world's or a folder's, in float32 or with the base in 4 bits. Apart, the score models are their merged folders,
or in 4 bits, where nothing can be merged, adapters on bases of their own. The adapters of the score models are drawn at
random: what is compared does not depend on what they say.

Each way is a process of its own and takes three steps, of which the numbers are compared with those apart. Bytes are
those of live tensors: parameters with the scales of 4-bit ones after the run, optimizer states too, gradients before
each optimizer's step. The reference of a LoRA run is never a copy; what one would hold is added in a row of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measuring.machine import environment_table, machine
from bench.measuring.tables import render

RANK = 16
STEPS = 3
SCORES = ("reward", "cost")
COMPARED = ("reward", "cost", "kl", "loss", "reward_value_loss", "cost_value_loss")
PARTS = ("parameters", "gradients", "optimizer")
# By name: whether on one base, and how that is held.
WAYS = {
    "apart": (False, None),
    "one base": (True, None),
    "apart, nf4": (False, "nf4"),
    "one base, nf4": (True, "nf4"),
}
PAIRS = (("one base", "apart"), ("one base, nf4", "apart, nf4"))


def write_scores(folder: Path, base: str) -> None:
    """`reward/` and `cost/`: score models whose adapters on a base are drawn at random, merged, and as `adapter/`."""
    from repo_fast.data import load_tokenizer
    from repo_fast.models.adapters import Base
    from repo_fast.models.lora import add_lora
    from repo_fast.models.score_model import ScoreModel
    from repo_fast.models.score_writing import save_score_model

    for seed, name in enumerate(SCORES):
        model = ScoreModel.from_policy(base, dtype=torch.float32)
        add_lora(model.trunk, rank=RANK, alpha=2.0 * RANK)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        state = {key: parameter.detach() for key, parameter in model.named_parameters()}
        save_score_model(folder / name, model, state, load_tokenizer(base), score_type=name, base=Base.of(base))


def options(way: str, policy: str, prompts: str | None, engine: str, folder: Path) -> list[str]:
    """The command line of a way."""
    together, quantize = WAYS[way]
    values: dict[str, Any] = {
        "policy.path": policy,
        "data.eval_prompts": "null",
        "data.ptx": "null",
        "algorithm.ptx_coefficient": 0,
        "algorithm.advantage": "gae",
        "rollout.engine": engine,
        "rollout.prompts_per_step": 4,
        "rollout.responses_per_prompt": 2,
        "rollout.max_new_tokens": 16,
        "update.minibatches": 1,
        "policy.lora.rank": RANK,
        "critics.lora.rank": RANK,
        "engine.zero_stage": 2,
        "engine.share_base": "true" if together else "false",
        "total_steps": STEPS,
        "log.loggers": "[]",
        "output_dir": folder / way.replace(", ", "-").replace(" ", "-"),
    }
    for name in SCORES:
        values[f"{name}.path"] = folder / name / ("adapter" if together or quantize else "")
    if prompts is not None:
        values["data.prompts"] = prompts
    if engine == "vllm":
        values["rollout.vllm.compile"] = "false"
    for section in ("policy", "critics", *SCORES) if quantize else ():
        values[f"{section}.quantize"] = quantize
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def measure(words: list[str]) -> dict[str, Any]:
    """Train as the words say; returns the rows of metrics, and bytes by part."""
    from repo_fast.config import TrainConfig, parse
    from repo_fast.engine import start_distributed, stop_distributed
    from repo_fast.jobs.inputs import read_inputs
    from repo_fast.jobs.trainer import Trainer

    config = parse(words, TrainConfig)
    trainer = Trainer(config, read_inputs(config), start_distributed())
    models = trainer.learner.models
    engines = [models.policy, *models.critics.values()]
    gradients: dict[int, int] = {}

    def watched(number: int, step: Callable[[], Any]) -> Callable[[], Any]:
        def stepped() -> Any:
            wrapped = engines[number].frozen_module
            held = [p.grad for p in wrapped.parameters() if p.grad is not None]
            held += [grad for group in wrapped.optimizer.averaged_gradients.values() for grad in group or ()]
            gradients[number] = max(gradients.get(number, 0), _bytes(held))
            return step()

        return stepped

    for number, engine in enumerate(engines):
        engine.step = watched(number, engine.step)  # type: ignore[method-assign]
    status = trainer.run()
    modules = [engine.module for engine in engines] + [scorer._module for scorer in trainer.scorers.values()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "quant_state")]
    scales = [layer.quant_state.absmax for layer in layers]
    states: list[torch.Tensor] = []
    for engine in engines:
        optimizer = engine.frozen_module.optimizer
        states += optimizer.single_partition_of_fp32_groups
        states += [t for own in optimizer.optimizer.state.values() for t in own.values() if torch.is_tensor(t)]
    base = [p for name, p in models.policy.module.named_parameters() if ".lora_" not in name]
    stop_distributed()
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    held = [_bytes([*parameters, *scales]), sum(gradients.values()), _bytes(states)]
    base_scales = [parameter.quant_state.absmax for parameter in base if hasattr(parameter, "quant_state")]
    return {
        "status": status,
        "rows": [{name: row[name] for name in COMPARED} for row in rows],
        "bytes": dict(zip(PARTS, held, strict=True)),
        "base": _bytes([*base, *base_scales]),
    }


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Of their memory, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def report(found: dict[str, dict[str, Any]]) -> str:
    """What each way holds, and how far its numbers are from those apart."""
    rows = []
    for together, apart in PAIRS:
        alone = found[apart]["bytes"]
        with_reference = {**alone, "parameters": alone["parameters"] + found[apart]["base"]}
        six = sum(with_reference.values())
        held = {f"{apart}, and a reference": with_reference, apart: alone, together: found[together]["bytes"]}
        for way, own in held.items():
            sizes = [own[part] / 1e6 for part in PARTS]
            rows.append([way, *(f"{size:.1f}" for size in sizes), f"{sum(sizes):.1f}", f"{1e6 * sum(sizes) / six:.3f}"])
    text = [render(["MB", *PARTS, "sum", "of six apart"], rows), ""]
    rows = []
    for together, apart in PAIRS:
        pairs = list(zip(found[together]["rows"], found[apart]["rows"], strict=True))
        gaps = [max(abs(ours[name] - theirs[name]) for ours, theirs in pairs) for name in COMPARED]
        sizes = [max(abs(theirs[name]) for _, theirs in pairs) for name in COMPARED]
        rows.append([together, *(f"{gap:.1e} of {size:.3g}" for gap, size in zip(gaps, sizes, strict=True))])
    text.append(render([f"largest difference in {STEPS} steps", *COMPARED], rows))
    return "\n".join(text)


def main() -> int:
    """Measure every way, and print the tables and the machine."""
    parser = argparse.ArgumentParser(description="Six models on one base, and apart.")
    parser.add_argument("--policy", help="a folder; else the embedded world's model")
    parser.add_argument("--prompts", help="a file; needed with a folder")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--words", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.words is not None:
        words = json.loads(chosen.words)
        print(json.dumps(measure(words)))
        return 0
    if (chosen.policy is None) != (chosen.prompts is None):
        parser.error("--policy and --prompts belong together")
    from repo_fast.jobs.inputs import find_model

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder, policy = Path(name), chosen.policy or find_model("world:tiny")[0]
        write_scores(folder, policy)
        for way in WAYS:
            words = json.dumps(options(way, policy, chosen.prompts, chosen.engine, folder))
            command = [sys.executable, "-m", "bench.one_base", "--words", words]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[way] = json.loads(said.splitlines()[-1])
            if found[way]["status"] != 0:
                raise RuntimeError(f"{way}: exit status {found[way]['status']}")
    print(report(found))
    print(environment_table({"machine": machine(torch.device("cpu"))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
