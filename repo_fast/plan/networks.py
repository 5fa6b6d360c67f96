"""The models of a run on paper: built without data, so that a 70B model takes no memory.

What a forward keeps for its backward is not guessed from the architecture: one layer runs on torch's `meta` device, and
what autograd saves is added up.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM, PretrainedConfig

from repo_fast.config import EngineConfig, LoraConfig, TrainConfig
from repo_fast.errors import InputError
from repo_fast.jobs.assembly import prepare_training
from repo_fast.jobs.inputs import scorer_name
from repo_fast.models.adapters import Adapter, is_adapter, put_adapter, read_adapter
from repo_fast.models.attention import MASKED, PACKED, PADDED
from repo_fast.models.blocks import linear_layers
from repo_fast.models.model_config import folder_of, load_config
from repo_fast.models.on_paper import built, built_at, first_attention
from repo_fast.models.policy import check_head
from repo_fast.models.quantization import BLOCK
from repo_fast.models.score_checkpoint import find_output
from repo_fast.scoring import load_scorer_spec
from repo_fast.speed.flops import Shape

_ON_PAPER = "repo_fast_plan"
_PROBED_TOKENS = 64


@dataclass(frozen=True)
class Network:
    """A model of a run.

    Attributes:
        role: `policy`, `reference`, `reward`, `cost` or which of several, the first that reads it, or the name of a
            critic.
        parameters, trained: How many, and how many of them have a gradient.
        largest: Parameters of its largest module, which ZeRO-3 gathers at once.
        base: Where its weights are from, and how they are quantised: what two models of one base have frozen is the
            same.
        quantized, scales: How many of its parameters are held in 4 bits, and how many float32 scales they have.
        largest_quantized: Parameters of the largest layer held so, which is unpacked when it computes.
        adapter: The folder of a score model's adapters that are kept beside its weights, frozen; None: there are none,
            or they are merged.
        adapter_parameters: How many of its parameters those are.
        width, vocabulary: Of the hidden states, and of the head; 0 without one over tokens.
        head_bias: Whether that has a bias.
        cache_elements: Keys and values of a token in all layers.
        layers: How many keep activations for a backward: those from the first trained one on.
        layer_activations, other_activations: Bytes that a token's forward keeps for the backward, in a layer and in all
            that is not a layer, in the dtype of the run.
        shape: For its operations; None where they cannot be counted.
        masked: Why its attention is not packed; empty where it is.
    """

    role: str
    parameters: int
    trained: int
    largest: int
    width: int
    vocabulary: int
    head_bias: bool
    cache_elements: int
    layers: int
    layer_activations: float
    other_activations: float
    shape: Shape | None
    masked: str = ""
    base: tuple[str, str | None] | None = None
    quantized: int = 0
    scales: int = 0
    largest_quantized: int = 0
    adapter: str | None = None
    adapter_parameters: int = 0

    @property
    def scale_bytes(self) -> float:
        """Of the scales of 4-bit weights, which are whole on every rank."""
        return torch.float32.itemsize * self.scales

    def shared_bytes(self, width: int) -> float:
        """Of all weights of so many bytes each, without the scales: what ZeRO-3 splits and gathers."""
        return width * (self.parameters - self.quantized) + self.quantized / 2

    def common_bytes(self, other: "Network", width: int) -> float:
        """Of the weights that it need not hold beside another model: those that both have frozen, of one base."""
        if self.base is None or self.base != other.base:
            return 0.0
        frozen = min(model.parameters - model.trained - model.adapter_parameters for model in (self, other))
        adapters = self.adapter_parameters if self.adapter == other.adapter else 0
        return width * (frozen + adapters - self.quantized) + self.quantized / 2 + self.scale_bytes

    def weight_bytes(self, width: int, ranks: int = 1) -> float:
        """Of the weights on a rank, where so many share them."""
        return self.shared_bytes(width) / ranks + self.scale_bytes

    @property
    def scores(self) -> bool:
        """Whether it gives rewards or costs."""
        return self.role.endswith(("reward", "cost"))


def networks(config: TrainConfig, dtype: torch.dtype) -> list[Network]:
    """The models that a run holds on its devices; scorers that are functions are not among them.

    Read are configurations, and the adapters of score models that are folders of such.

    Raises:
        InputError: A model's configuration or adapters cannot be read, or it cannot be trained as asked.
    """
    policy = _policy_config(config)
    # FlashAttention's memory is that of the packed one.
    masked = {"auto": (PACKED, *MASKED), PADDED: MASKED, "sdpa": ("sdpa",), "eager": ("eager",)}
    candidates = masked.get(config.policy.attention, (PACKED,))
    common: dict[str, Any] = {"head": True, "candidates": candidates}
    base = _base(policy.name_or_path, config.policy.quantize)
    options = {"lora": config.policy.lora, "last": config.policy.trainable_layers, "base": base}
    found = [network("policy", policy, dtype, **options, **common)]
    if config.update.share_prompts and found[0].masked:
        raise InputError(f"update.share_prompts is true, expected false: the policy is not packed ({found[0].masked})")
    if not config.policy.lora.rank:
        found.append(network("reference", policy, dtype, frozen=True, base=base, **common))
    trunks, read, adapted = {}, set[tuple[str, str | None]](), config.policy.lora.rank > 0

    def on(path: str, quantize: str | None, stays: bool = True) -> dict[str, Any]:
        """What a score model's weights are once they are loaded: adapters are merged, or kept beside their base."""
        if is_adapter(path):
            adapter = read_adapter(path)
            own = _base(adapter.base.path, quantize)
            if quantize or (adapted and stays and own == base):
                return {"base": own, "adapter": adapter}
        return {"base": _base(path, quantize)}

    for name, scorer in config.all_scorers.items():
        role = scorer_name(name)
        spec = load_scorer_spec(scorer.path, role)
        if spec.kind == "model":
            find_output(spec.path, scorer.head, f"{config.section_of(name)}.head")
            trunks[name] = load_config(spec.path)
            # Scorers that read other outputs of a folder share its model.
            if (spec.path, scorer.quantize) not in read:
                found.append(network(role, trunks[name], dtype, frozen=True, **on(spec.path, scorer.quantize)))
            read.add((spec.path, scorer.quantize))
        elif spec.kind == "guard":
            guard = load_config(spec.path)
            weights = _base(spec.path, scorer.quantize)
            found.append(network(role, guard, dtype, frozen=True, head=True, base=weights))
    for streams in config.critic_streams:
        role = "critic" if len(streams) > 1 else f"{streams[0]} critic"
        stream, lora, quantize = streams[0], config.critics.lora, config.critics.quantize
        start: dict[str, Any] = {"base": _base(policy.name_or_path, quantize)}
        if stream in trunks:
            start = on(load_scorer_spec(config.all_scorers[stream].path, role).path, quantize, lora.rank > 0)
        found.append(network(role, trunks.get(stream, policy), dtype, lora=lora, **start))
    return found


def _base(path: str, quantize: str | None) -> tuple[str, str | None]:
    """A folder by its absolute path; on paper, no weights are compared."""
    folder = folder_of(path)
    return (path if folder is None else str(folder.absolute())), quantize


def _policy_config(config: TrainConfig) -> PretrainedConfig:
    path = config.policy.path
    if path.startswith("world:"):
        from repo_fast.jobs.inputs import find_model

        path = find_model(path)[0]
    loaded = load_config(path)
    multiple = config.policy.pad_vocabulary_to
    loaded.vocab_size = -(-loaded.vocab_size // multiple) * multiple
    return loaded


def network(
    role: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    head: bool = False,
    frozen: bool = False,
    lora: LoraConfig | None = None,
    last: int | None = None,
    base: tuple[str, str | None] | None = None,
    adapter: Adapter | None = None,
    candidates: Sequence[str] = (PACKED, *MASKED),
) -> Network:
    """A model on paper.

    Args:
        role: Its name.
        config: Of the architecture.
        dtype: Of weights and activations.
        head: Whether it has one over the vocabulary; else it is a trunk with heads of scores, which are not counted:
            a row of the width each, some kB.
        frozen, lora, last: What of it is trained: nothing; adapters; so many last layers; everything.
        base: As of the `Network`. None: of its own, and not quantised.
        adapter: That is kept beside its weights, frozen.
        candidates: The attentions that it may have, by transformers' names.

    Raises:
        InputError: It cannot be built with any of these; or with a head that is no linear layer; the adapter is not
            of its layers.
    """
    kind = AutoModelForCausalLM if head else AutoModel
    model = built_at(config.name_or_path, kind, config).to(dtype)
    # Before adapters, which are linear layers too.
    quantized = base is not None and base[1] is not None
    layers = [model.get_submodule(name).weight.numel() for name in linear_layers(model)] if quantized else []
    biased = head and check_head(config.name_or_path, model).bias is not None
    if adapter is not None:
        put_adapter(model, adapter)
    if frozen:
        model.requires_grad_(False)
    else:
        prepare_training(model, last, lora or LoraConfig(), EngineConfig())
    attention, passed_over = first_attention(kind, config.name_or_path, config, candidates)
    one, two = (_saved_bytes(config, dtype, layers, attention) for layers in (1, 2))
    text = config.get_text_config()
    # A recurrent trunk has none.
    queries = getattr(text, "num_attention_heads", 0)
    size = getattr(text, "head_dim", None) or text.hidden_size // max(queries, 1)
    heads = getattr(text, "num_key_value_heads", None) or queries
    return Network(
        role=role,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        width=text.hidden_size,
        vocabulary=text.vocab_size if head else 0,
        head_bias=biased,
        cache_elements=2 * text.num_hidden_layers * heads * size,
        layers=0 if frozen else last or text.num_hidden_layers,
        layer_activations=(two - one) / _PROBED_TOKENS,
        other_activations=(2 * one - two) / _PROBED_TOKENS,
        shape=Shape.of(model),
        masked="" if attention == PACKED else "; ".join(passed_over) or f"attention {attention}",
        base=base,
        quantized=sum(layers),
        scales=sum(-(-elements // BLOCK) for elements in layers),
        largest_quantized=max(layers, default=0),
        adapter=adapter and adapter.path,
        adapter_parameters=sum(part.numel() for pair in adapter.pairs.values() for part in pair) if adapter else 0,
    )


def _saved_bytes(config: PretrainedConfig, dtype: torch.dtype, layers: int, attention: str) -> int:
    """What the forward of a few tokens through a trunk of so many layers keeps for its backward."""
    shallow = copy.deepcopy(config)
    shallow.get_text_config().num_hidden_layers = layers
    # FlashAttention's stands for the packed one.
    trunk = built(AutoModel, shallow, _ON_PAPER if attention == PACKED else "eager").to(dtype)
    weights = {parameter.untyped_storage()._cdata for parameter in trunk.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, _PROBED_TOKENS, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if attention == PACKED:
            # A mask of four dimensions is handed on as it is.
            mask = torch.zeros(1, 1, 1, 1, device="meta")
            trunk(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
        else:
            # Without one, some look at values to find the sequences of a row.
            trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


class _Attention(torch.autograd.Function):
    """Keeps what FlashAttention keeps: its inputs, its output, a log-sum-exp a head and token."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError("a model on paper has no backward")


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    return _Attention.apply(query, key, value), None


AttentionInterface.register(_ON_PAPER, _attention)
AttentionMaskInterface.register(_ON_PAPER, lambda *_, **__: None)
