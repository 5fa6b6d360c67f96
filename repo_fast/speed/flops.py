"""The floating-point operations that a model's work takes: what throughput is measured against.

Counted are the matrix products of the layers on real tokens, causal attention, and the head at the positions that it is
asked for; twice as many operations as multiplications. Not counted: padding, recomputation of activations, whatever is
not a product, and the other half of attention's square, which is masked. So more FLOP/s is always more work done. This
is the model FLOPs utilisation (MFU) of PaLM (arXiv 2204.02311, appendix B) but for two points: PaLM counts attention's
whole square, and the head at every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Dense bfloat16 FLOP/s by the makers' data sheets, by a part of the name that the driver gives.
DATASHEET_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "MI300X": 1307.4e12,
}


def peak_flops(device: torch.device) -> float | None:
    """What a device could do at most, FLOP/s in dense bfloat16; None where its data sheet is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in DATASHEET_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Shape:
    """What of a transformer's size its work depends on.

    Attributes:
        layers: With attention.
        attention_width: Query heads × their size.
        products: Elements of all weights that a token is multiplied with, but the head's.
        trained_products: Those of them with a gradient.
        passed_products: Those whose input needs a gradient, because something before them, or they, are trained.
        head: Elements of the head; 0 without one that is a matrix product.
        head_trained: Whether its weight has a gradient.
    """

    layers: int
    attention_width: int
    products: int
    trained_products: int
    passed_products: int
    head: int
    head_trained: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Shape | None":
        """From a transformers model, with or without a head; its parameters may be shards, or without data.

        Returns:
            None for a mixture of experts, in which a token meets a part of the weights, and for what has no heads.
        """
        config = model.config.get_text_config()
        experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        if experts or not getattr(config, "num_attention_heads", None):
            return None
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        products = trained = passed = 0
        reached = False
        # Registered in the order of the data's way.
        for module in model.modules():
            if module is head or not isinstance(module, nn.Linear | Conv1D):
                continue
            elements = module.nx * module.nf if isinstance(module, Conv1D) else module.in_features * module.out_features
            reached = reached or module.weight.requires_grad
            products += elements
            trained += elements * module.weight.requires_grad
            passed += elements * reached
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
            products=products,
            trained_products=trained,
            passed_products=passed,
            head=0 if head is None else head.in_features * head.out_features,
            head_trained=head is not None and head.weight.requires_grad,
        )

    def forward(self, lengths: Sequence[int], head_positions: int) -> int:
        """Operations of a forward.

        Args:
            lengths: Tokens of each sequence, which does not see the others.
            head_positions: How many positions the head is asked for.
        """
        body = 2 * self.products * sum(lengths)
        return body + self._attention(lengths) + 2 * self.head * head_positions

    def forward_and_backward(self, lengths: Sequence[int], head_positions: int) -> int:
        """Operations of a forward and a backward; what is frozen gets no gradient, and passes one only if it must."""
        reached = self.passed_products / max(self.products, 1)
        gradients = 2 * (self.trained_products + self.passed_products) * sum(lengths)
        head = 2 * self.head * head_positions * ((reached > 0) + self.head_trained)
        return self.forward(lengths, head_positions) + gradients + int(2 * reached * self._attention(lengths)) + head

    def _attention(self, lengths: Sequence[int]) -> int:
        """Scores and weighted values over the lower half of each square."""
        return 2 * self.layers * self.attention_width * sum(length**2 for length in lengths)


def forward_work(shape: Shape | None, lengths: Sequence[int], head_positions: int = 0) -> int:
    """What work is evened out by: a forward's operations, or the tokens where these cannot be counted."""
    return sum(lengths) if shape is None else shape.forward(lengths, head_positions)
