"""bitsandbytes' 4-bit linear layer, such that training after scoring is right and a state holds all of it."""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn


class Nf4Linear(Linear4bit):
    """A frozen linear layer whose weight is 4-bit numbers, two a byte, under a float32 scale for each block of 64.

    The weight is uint8 [in * out / 2, 1], a parameter like others: moved, split under ZeRO-3, gathered. The scales are
    whole on every rank, and stand in a state as the layer's extra state, under one key. bitsandbytes' own form of
    a state has several keys more, which it does not take back.
    """

    @classmethod
    def take_over(cls, layer: nn.Module) -> None:
        """Make one of a loaded `Linear4bit`, in place."""
        layer.__class__ = cls
        # Otherwise a forward without gradients, on a CPU that has the instructions, packs the weight anew in a form
        # that the backward does not know: every gradient after it is wrong, without a word.
        layer.support_avx512bf16_for_cpu = False

    def unpacked(self, packed: torch.Tensor) -> torch.Tensor:
        """The weight [out, in], in the dtype that it was loaded in.

        Args:
            packed: The whole of `weight`, on the device of the layer; under ZeRO-3 as gathered.
        """
        return dequantize_4bit(packed, self.quant_state)

    def get_extra_state(self) -> torch.Tensor:
        """The scales: float32, one for each block of 64 numbers of the weight."""
        return self.quant_state.absmax

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.quant_state.absmax.copy_(state)

    def _save_to_state_dict(self, *args: object) -> None:
        nn.Linear._save_to_state_dict(self, *args)  # type: ignore[arg-type]
