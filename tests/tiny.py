"""Tiny models and tokenizers, made on the fly: everything a test needs, with nothing downloaded.

The weights are drawn with a larger spread than Hugging Face's 0.02, so that a wrong mask, position or head moves a
score by far more than rounding does.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
ROLE_TOKENS = ["<user>", "<assistant>", "<system>"]
SAFE_RLHF_WORDS = ["BEGINNING", "OF", "CONVERSATION:", "USER:", "ASSISTANT:"]
WORDS = "how do i make tea bread a bomb please sorry no yes you can the with".split()

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %} <{{ message['role'] }}> {{ message['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def word_tokenizer(
    words: Iterable[str] = WORDS, chat_template: bool = True, pad_token: str | None = PAD, bos_token: str | None = BOS
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word; `tokenizer(text)` prepends the bos token as Llama's does.

    Args:
        words: The vocabulary, split at white space; anything else becomes `<unk>`. The order decides the ids.
        chat_template: Whether the tokenizer has a chat template.
        pad_token: Its pad token; None for a tokenizer without one, `EOS` for pad = eos.
        bos_token: Its bos token; None for a tokenizer that has and prepends none.
    """
    vocabulary = {
        w: i for i, w in enumerate(dict.fromkeys([PAD, BOS, EOS, UNKNOWN, *ROLE_TOKENS, *SAFE_RLHF_WORDS, *words]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos_token is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=EOS, unk_token=UNKNOWN, pad_token=pad_token
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama_config(vocab: int = 64, **overrides) -> LlamaConfig:
    """A two-layer Llama of width 32 (about 30 thousand parameters)."""
    settings = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaConfig(**{**settings, **overrides})


def save_policy(
    path: Path, tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0, **config_overrides
) -> Path:
    """Writes a causal language model with random weights and its tokenizer (`word_tokenizer()` unless given)."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_llama_config(**{"vocab": len(tokenizer), **config_overrides})).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def save_beaver(
    path: Path,
    layout: str = "LlamaForScore",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    outputs: int = 1,
    bias: bool | None = None,
    normalizer: tuple[float | list[float], float | list[float]] | None = (0.0, 1.0),
    shards: int = 1,
    suffix: str = "safetensors",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config_overrides: dict | None = None,
    **sizes,
) -> Path:
    """Writes a score model in Safe RLHF's layout.

    Args:
        path: The folder to make.
        layout: `LlamaForScore`, or the older `LlamaModelForScore`.
        tokenizer: Saved beside it; `word_tokenizer(chat_template=False)` unless given.
        outputs: How many scores a response has.
        bias: None: a config without the key and no bias; False: a key that says there is none; True: a bias.
        normalizer: Mean and variance in `normalizer.*`, of several outputs a list each; None for a checkpoint without
            these buffers.
        shards: Number of weight files.
        suffix: `safetensors` or `bin`.
        seed: Of the weights.
        dtype: Of all tensors but the count.
        config_overrides: Keys written into `config.json` as they are, such as `do_normalize`.
        sizes: Settings of the Llama other than `tiny_llama_config`'s.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or word_tokenizer(chat_template=False)
    torch.manual_seed(seed)
    config = tiny_llama_config(len(tokenizer), pad_token_id=0, **sizes)
    state = {f"model.{name}": tensor for name, tensor in LlamaModel(config).state_dict().items()}
    state["score_head.weight"] = torch.randn(outputs, config.hidden_size)
    if bias:
        state["score_head.bias"] = torch.randn(outputs)
    if normalizer is not None:
        mean, variance = normalizer
        state["normalizer.mean"] = torch.tensor(mean).reshape(-1)
        state["normalizer.var"] = torch.tensor(variance).reshape(-1)
        state["normalizer.count"] = torch.tensor([10])

    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    settings = config.to_dict() | {
        "architectures": [layout],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "score_type": "reward",
        "score_dim": outputs,
        "do_normalize": False,
    }
    if bias is not None:
        settings["bias" if layout == "LlamaForScore" else "score_bias"] = bias
    (path / "config.json").write_text(json.dumps(settings | (config_overrides or {})))
    _save_weights(state, path, shards, suffix)
    tokenizer.save_pretrained(path)
    return path


def save_sequence_classifier(
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
    num_labels: int = 1,
    **config_overrides,
) -> Path:
    """Writes a `LlamaForSequenceClassification` with random weights and its tokenizer."""
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(seed)
    settings = {"vocab": len(tokenizer), "num_labels": num_labels, "pad_token_id": tokenizer.pad_token_id}
    config = tiny_llama_config(**{**settings, **config_overrides})
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def _save_weights(state: dict[str, torch.Tensor], path: Path, shards: int, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(state)
    chunks = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, chunk in enumerate(chunks):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        tensors = {name: state[name].contiguous() for name in chunk}
        if suffix == "safetensors":
            save_file(tensors, path / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, path / file)
        weight_map |= dict.fromkeys(chunk, file)
    if shards > 1:
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
