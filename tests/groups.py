"""Runs a function in a gloo group of spawned processes; for what needs a process group but no launcher."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_group(ranks: int, function: Callable[[int, Path], None], folder: Path) -> None:
    """Call `function(rank, folder)`, a module's own, on every rank."""
    mp.spawn(_one_rank, args=(ranks, function, folder), nprocs=ranks)


def _one_rank(rank: int, ranks: int, function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    function(rank, folder)
    dist.destroy_process_group()
    # A gloo thread that still holds a tensor would abort an interpreter that is going: `engine._pause_at_exit`.
    time.sleep(0.5)
