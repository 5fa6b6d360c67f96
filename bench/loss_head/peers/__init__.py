"""The implementations that are measured side by side; `PRODUCTS` is the floor."""

from bench.loss_head.peers.cce import CCE
from bench.loss_head.peers.liger import LIGER, LIGER_CE, LIGER_SCALED
from bench.loss_head.peers.ours import OURS, OURS_CAPPED, OURS_CONSTRAINED, OURS_TORCH
from bench.loss_head.peers.peer import Peer
from bench.loss_head.peers.plain import COMPILE, PLAIN
from bench.loss_head.peers.products import PRODUCTS
from bench.loss_head.peers.quack import QUACK
from bench.loss_head.peers.torch_linear import TORCH_LINEAR
from bench.loss_head.peers.trl import TRL

__all__ = ["NOT_MEASURED", "PEERS", "PRODUCTS", "Peer"]

PEERS = {
    peer.name: peer
    for peer in (
        PRODUCTS,
        OURS,
        OURS_CAPPED,
        OURS_CONSTRAINED,
        OURS_TORCH,
        PLAIN,
        COMPILE,
        CCE,
        LIGER,
        LIGER_SCALED,
        LIGER_CE,
        TORCH_LINEAR,
        TRL,
        QUACK,
    )
}

NOT_MEASURED = """\
Not measured: heads that are single files of a trainer and cannot be installed. Published, on an H100 at
T 8192, D 4096, V 131072, forward + backward: verl's chunks in torch 128.8 ms, its cuTile head 57.2 ms, beside Liger's
kernels for Hopper with 50.4 ms (12.25 ms forward only). Fast-LLM's (its pull request 558), one row pass in Triton with
the policy loss like ours, without constraints, chunks or a CPU version: no figure known."""
