"""One copy of the frozen weights that several models have alike.

A run with adapters may hold six models on the same base: policy, reference, two critics, reward and cost model. Each
stays a module of its own, with its own adapters and its own head; shared are the parameters themselves: those that are
frozen in both and equal to the bit. So nothing is switched between models, no model can run with another's adapters,
and what is computed is what separate models compute, bit for bit. Where a run trains some last layers, its reference
shares the others in the same way.

Weights are compared, not folders: it does not matter where they came from, and of a base whose vocabulary has grown all
but the embeddings is shared.

Under ZeRO-3 the shards of a parameter belong to one engine, which gathers and releases them as its own model runs: two
engines would release each other's. There models stay separate, and what that costs is told.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from repo_fast.errors import InputError


@dataclass
class SharedWeights:
    """The frozen weights of a run's models, each kept once.

    Attributes:
        required: Whether a model that has frozen layers of its own is an error.
        apart: Whether models keep their copies, and what sharing would spare is only counted.
        spared: Bytes on this rank, by the name of the model.
        unlike: By the name of a model, the first frozen weight of its layers that none before it has.
        base: `Checkpoint.fingerprint` of the first model's folder and how it is quantised, where adapters of score
            models on the same base are not merged, whether models are apart or not; None: all are.
    """

    required: bool = False
    apart: bool = False
    spared: dict[str, int] = field(default_factory=dict)
    unlike: dict[str, str] = field(default_factory=dict)
    base: tuple[str, str | None] | None = None
    _kept: dict[str, list[nn.Parameter]] = field(default_factory=dict)

    def take(self, name: str, transformer: nn.Module) -> None:
        """Let a model use what is kept, in place of its own, and keep what is new; before an engine is made of it.

        Args:
            name: Of the model, for messages.
            transformer: The Hugging Face model, with or without a head over tokens. Its adapters are in it, and what is
                frozen is marked so. Its parameters may be shards.

        Raises:
            InputError: Sharing is required, and the model has a frozen layer that no model before it has.
        """
        is_first = not self._kept
        prefix = f"{getattr(transformer, 'base_model_prefix', '')}."
        replaced: dict[nn.Parameter, nn.Parameter] = {}
        for own, parameter in transformer.named_parameters():
            if parameter.requires_grad:
                continue
            alike = self._kept.setdefault(own.removeprefix(prefix).replace(".base_layer.", "."), [])
            same = next((kept for kept in alike if _equal(kept, parameter)), None)
            if same is not None:
                replaced[parameter] = same
                continue
            alike.append(parameter)
            # Embeddings, which may have grown, stand outside the layers; adapters that are kept are a model's own.
            if not is_first and ".lora_" not in own and any(part.isdigit() for part in own.split(".")):
                self.unlike.setdefault(name, own)
        if self.required and name in self.unlike:
            raise InputError(
                f"engine.share_base is true, but {self.unlike[name]} of {name} is unlike the policy's, expected an "
                "adapter on the policy's base (a merged folder has weights of its own), or engine.share_base auto"
            )
        self.spared[name] = sum(_bytes(parameter) for parameter in replaced)
        if self.apart:
            return
        for module in transformer.modules():
            for leaf, parameter in module._parameters.items():
                if parameter in replaced:
                    module._parameters[leaf] = replaced[parameter]
                    if hasattr(parameter, "quant_state"):
                        # The layer has hold of its scales, too.
                        module.quant_state = replaced[parameter].quant_state


def _equal(kept: nn.Parameter, other: nn.Parameter) -> bool:
    """To the bit; of shards this rank's are compared."""
    if _shape(kept) != _shape(other) or kept.dtype != other.dtype:
        return False
    pairs = zip(_parts(kept), _parts(other), strict=True)
    return all(torch.equal(_bits(ours), _bits(theirs).to(ours.device)) for ours, theirs in pairs)


def _parts(parameter: nn.Parameter) -> list[torch.Tensor]:
    """Its values, and of one in 4 bits the scales, too: twice a weight has the same 4 bits."""
    scales = getattr(parameter, "quant_state", None)
    values = getattr(parameter, "ds_tensor", parameter).detach()
    return [values] if scales is None else [values, scales.absmax]


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def whole_bytes(parameter: nn.Parameter) -> int:
    """Of a parameter, and the scales of one in 4 bits, over all ranks that have shards of it."""
    values, *scales = _parts(parameter)
    held = sum(_bits(scale).numel() for scale in scales)
    return getattr(parameter, "ds_numel", values.numel()) * values.element_size() + held


def _bytes(parameter: nn.Parameter) -> int:
    return sum(_bits(part).numel() for part in _parts(parameter))
