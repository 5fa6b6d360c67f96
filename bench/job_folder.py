"""What a measured run reads: a random policy that ends its responses by chance, a tokenizer, prompts, scorers."""

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.training_phase import Geometry

PAD, END = "<pad>", "</s>"


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: a pad token, an end token, and `w0`, `w1`, ... up to the size of the vocabulary."""
    words = [PAD, END, *(f"w{i}" for i in range(vocabulary - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def make_policy(geometry: Geometry) -> LlamaForCausalLM:
    """A random policy whose responses end after a geometric number of tokens, on average half of the longest.

    Every embedding has the same first component, far above the others, and the end token's row of the head looks at it
    alone: its probability hardly depends on what came before.
    """
    torch.manual_seed(0)
    policy = LlamaForCausalLM(geometry.config(geometry.layers))
    with torch.no_grad():
        head = policy.lm_head.weight
        policy.model.embed_tokens.weight[:, 0] = 1.0
        head[:, 0] = 0.0
        head[1] = 0.0
        states = policy.model(torch.randint(2, geometry.vocabulary, (16, geometry.prompts[1]))).last_hidden_state
        others = (states @ head.T).logsumexp(-1).mean()
        head[1, 0] = (others - math.log(geometry.responses[1] / 2)) / states[..., 0].mean()
    # The update has no use for a cache, and so says the configuration; without one, generation computes all anew.
    policy.generation_config.use_cache = True
    policy.generation_config.eos_token_id = 1
    policy.generation_config.pad_token_id = 0
    return policy


def write_job(folder: Path, geometry: Geometry, prompts: int) -> None:
    """Writes `policy/` and `prompts.jsonl`, of random words, their lengths evenly spaced as the geometry says."""
    make_policy(geometry).save_pretrained(folder / "policy")
    make_tokenizer(geometry.vocabulary).save_pretrained(folder / "policy")
    g = torch.Generator().manual_seed(0)
    lengths = torch.linspace(*geometry.prompts, prompts).round().long()[torch.randperm(prompts, generator=g)]
    with (folder / "prompts.jsonl").open("w") as lines:
        for length in lengths.tolist():
            words = torch.randint(geometry.vocabulary - 2, (length,), generator=g).tolist()
            print(json.dumps({"prompt": " ".join(f"w{i}" for i in words)}), file=lines)


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Something that differs from response to response."""
    return [response.count("1") / (1 + len(response)) for response in responses]


def cost(prompts: list[str], responses: list[str]) -> list[float]:
    """Above 0 for about half of the responses."""
    return [response.count("2") / (1 + len(response)) - 0.08 for response in responses]
