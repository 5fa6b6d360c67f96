"""The implementations that are measured side by side; `PRODUCTS` is the floor."""

from bench.peers.cce import CCE
from bench.peers.liger import LIGER
from bench.peers.ours import OURS, OURS_TORCH
from bench.peers.peer import Peer
from bench.peers.plain import COMPILE, PLAIN
from bench.peers.products import PRODUCTS
from bench.peers.torch_linear import TORCH_LINEAR

__all__ = ["PEERS", "PRODUCTS", "Peer"]

PEERS = {peer.name: peer for peer in (PRODUCTS, OURS, OURS_TORCH, PLAIN, COMPILE, CCE, LIGER, TORCH_LINEAR)}
