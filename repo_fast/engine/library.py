"""DeepSpeed, with what has to be settled when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Without it, a machine that has nvidia-smi but no GPU would be misread.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

# It would compile a shared-memory all-reduce for CPU ranks on first use: 20 s, a compiler, and, after a run killed
# meanwhile, a stale lock that all later runs wait for. Gloo does the same work.
# Assigned whole: reading it first would probe every op, with compiler runs that take time and print errors.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
