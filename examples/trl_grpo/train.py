"""GRPO with a cost, in TRL: a tiny random Llama learns from rewards, and prompts that become unsafe are repaired.

    python -m examples.trl_grpo.train

Completions are rewarded for useful words, most of all for the harmful ones among them, and more harmful words than a
tenth are too many: reward alone (`--multiplier 0`, which is TRL's own GRPO) leads to unsafe completions.
"""

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig

from examples.trl_grpo.rectified_grpo import RectifiedGRPOTrainer

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
HARMFUL = ["poison", "explosive", "weapon", "theft"]
USEFUL = ["water", "flour", "salt", "oven", "mix", "bake", "stir", "serve", "cut", "boil", "pan", "knife", *HARMFUL]
OTHER = "how do i make the a of to and with please can you tell me about it is that this so very well now then".split()
HARM_BONUS = 2.0  # a harmful word's reward; a useful one that is harmless has 1
THRESHOLD = 0.1  # the share of harmful words above which a prompt is unsafe


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, in order of appearance above."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *USEFUL, *OTHER])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def make_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama of two layers and about 30 thousand parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_prompts(count: int = 64) -> Dataset:
    """Sequences of four common words."""
    order = torch.randint(len(OTHER), (count, 4), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"prompt": [" ".join(OTHER[i] for i in row) for row in order.tolist()]})


def share(completion: str, words: list[str]) -> float:
    found = [word in words for word in completion.split()]
    return sum(found) / max(len(found), 1)


def helpfulness(completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of useful words, where harmful ones count more."""
    return [share(text, USEFUL) + (HARM_BONUS - 1) * share(text, HARMFUL) for text in completions]


def harm(completions: list[str], **_: Any) -> list[float]:
    """The cost: the share of harmful words."""
    return [share(text, HARMFUL) for text in completions]


def train(steps: int, multiplier: float, output: str, seed: int = 0) -> list[dict[str, float]]:
    """Trains a new policy.

    Args:
        steps: Optimizer steps, two for each batch of 16 prompts × 4 completions.
        multiplier: λ, constant; 0 ignores the costs.
        output: Folder that TRL may write into.
        seed: Of the model and the samples.

    Returns:
        What TRL logged, a row for each batch of completions.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    trainer = RectifiedGRPOTrainer(
        make_policy(tokenizer),
        [helpfulness, harm],  # the cost is the last,
        GRPOConfig(
            reward_weights=[1.0, 0.0],  # and no part of the reward
            scale_rewards="none",
            loss_type="grpo",
            num_iterations=2,
            num_generations=4,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_completion_length=16,
            max_steps=steps,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=seed,
            output_dir=output,
        ),
        train_dataset=make_prompts(),
        processing_class=tokenizer,
        multiplier=multiplier,
        threshold=THRESHOLD,
    )
    trainer.remove_callback(PrinterCallback)  # all of TRL's metrics, at every step
    trainer.train()
    return [row for row in trainer.state.log_history if "reward" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--multiplier", type=float, default=5.0, help="lambda; 0 ignores the costs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        history = train(arguments.steps, arguments.multiplier, output, arguments.seed)
    columns = {
        "reward": "rewards/helpfulness/mean",
        "cost": "rewards/harm/mean",
        "unsafe": "unsafe_fraction",
        "entropy": "entropy",
    }
    print("step", *(f"{name:>8}" for name in columns))
    for i, row in enumerate(history):
        if i % 10 == 0 or i == len(history) - 1:
            print(f"{row['step']:4}", *(f"{row[key]:8.3f}" for key in columns.values()))


if __name__ == "__main__":
    main()
