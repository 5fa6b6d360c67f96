"""Checkpoints of a trained model beside DeepSpeed's own, in time and bytes.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m bench.checkpoints [--stage 2] [--dtype float32]

A Llama of 134 million parameters (D = 768, 12 layers, V = 32,001), with AdamW's moments as a step leaves them. Round by
round both write and both read, in turn; the first round is not counted. DeepSpeed's are read by an engine that was just
made, as they have to be; ours by one whose moments are forgotten, as a new one has none. Engines stay in memory: the
rounds take about 20 GB on two ranks.
Ours take sums of what they write, and bring it to disk; reading compares all sums before it, as a resume does.
DeepSpeed's do neither. Printed are medians over the rounds, and the ratio of each round's pair.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measuring.machine import environment_table, machine
from bench.measuring.tables import render
from repo_fast.checkpoints.manifest import check_sums, read_manifest, seal
from repo_fast.collectives import Ranks
from repo_fast.config import EngineConfig, OptimizerConfig
from repo_fast.engine import Engine, start_distributed, stop_distributed

MODEL = LlamaConfig(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    vocab_size=32_001,
    max_position_embeddings=64,
)
ROUNDS = 3
TAG = "state"


def engine(config: EngineConfig, ranks: Ranks) -> Engine:
    torch.manual_seed(0)
    dtype = getattr(torch, config.dtype)
    return Engine(LlamaForCausalLM._from_config(MODEL, dtype=dtype), config, ranks, OptimizerConfig(), steps=8)


def write(source: Engine, folder: Path, ranks: Ranks) -> None:
    """As a run does, with a manifest."""
    sums = source.unsaved().write(folder)
    everyone = dict(ranks.gather_list([*sums.items()]))
    if ranks.is_first:
        seal(folder, everyone)
    ranks.barrier()


def read(target: Engine, folder: Path, ranks: Ranks) -> None:
    """As a resume does, after the ranks have shared the reading of sums."""
    files = read_manifest(folder)
    check_sums(folder, files, ranks.share(sorted(files)))
    ranks.barrier()
    target.load(folder)


def timed(ranks: Ranks, work: Callable[..., object], *arguments: object, **options: object) -> float:
    """Seconds until all ranks are done."""
    ranks.barrier()
    started = time.perf_counter()
    work(*arguments, **options)
    ranks.barrier()
    return time.perf_counter() - started


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(config: EngineConfig, ranks: Ranks, folder: Path) -> list[list[str]]:
    """Rows of the table."""
    source = engine(config, ranks)
    ids = torch.arange(16)[None] + 16 * ranks.rank
    source.backward(source(input_ids=ids, labels=ids).loss / ranks.size, last=True)
    source.step()
    seconds: dict[str, list[float]] = {name: [] for name in ("write", "its write", "read", "its read")}
    ours, its, library, target = folder / "ours", folder / "deepspeed", source._engine, engine(config, ranks)
    for _ in range(ROUNDS + 1):
        if ranks.is_first:
            shutil.rmtree(ours, ignore_errors=True)
            shutil.rmtree(its, ignore_errors=True)
        seconds["write"].append(timed(ranks, write, source, ours, ranks))
        seconds["its write"].append(timed(ranks, library.save_checkpoint, str(its), tag=TAG, save_latest=False))
        target._engine.optimizer.optimizer.state.clear()
        seconds["read"].append(timed(ranks, read, target, ours, ranks))
        seconds["its read"].append(timed(ranks, engine(config, ranks)._engine.load_checkpoint, str(its), tag=TAG))
    rows = []
    for what in ("write", "read"):
        pairs = list(zip(seconds[what][1:], seconds[f"its {what}"][1:], strict=True))
        ratios = sorted(mine / its for mine, its in pairs)
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([f"{what}, s", *(f"{median:.2f}" for median in medians), spread])
    bytes_of = [size(folder / name) for name in ("ours", "deepspeed")]
    rows.append(["bytes, MB", *(f"{held / 1e6:.0f}" for held in bytes_of), f"{bytes_of[0] / bytes_of[1]:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="that the model computes in"
    )
    chosen = parser.parse_args()
    ranks = start_distributed()
    folder = Path(ranks.gather_list([tempfile.mkdtemp()] if ranks.is_first else [])[0])
    rows = measure(EngineConfig(zero_stage=chosen.stage, dtype=chosen.dtype), ranks, folder)
    if ranks.is_first:
        shutil.rmtree(folder)
        what = f"ZeRO {chosen.stage}, {chosen.dtype}, {ranks.size} ranks"
        print(
            render([what, "ours", "DeepSpeed's", "ratio"], rows),
            environment_table({"": machine(ranks.device)}),
            sep="\n\n",
        )
    stop_distributed()


if __name__ == "__main__":
    main()
