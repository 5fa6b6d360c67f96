"""The fused op as the loss head of a bare Hugging Face model: `repo_fast.ops`, AdamW and a loop, no trainer.

    python examples/bare_model/train.py

The policy is a tiny random Llama. Its responses are rewarded for useful tokens, most of all for the harmful ones among
them, and more harmful tokens than a tenth are too many: reward alone leads to unsafe responses.
"""

import argparse
import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from repo_fast.ops import fused_rectified_policy_loss, prompt_violations

VOCABULARY, END = 64, 2
USEFUL, HARMFUL = range(16, 32), range(28, 32)
HARM_BONUS = 2.0  # a harmful token's reward; a useful one that is harmless has 1
THRESHOLD = 0.1  # the share of harmful tokens above which a prompt is unsafe
PROMPTS, RESPONSES = 16, 4  # prompts a step, responses a prompt
PROMPT_TOKENS, RESPONSE_TOKENS = 4, 16
PASSES = 2  # updates a batch of responses; the first is on-policy
LEARNING_RATE = 3e-3
MULTIPLIER_RATE, MULTIPLIER_MAX = 0.5, 5.0  # log λ rises by η·λ·(mean violation) a step, up to log λ_max


def make_policy() -> LlamaForCausalLM:
    """A random Llama of two layers and about 30 thousand parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            eos_token_id=END,
            pad_token_id=0,
        )
    )


def score(tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and costs of responses.

    Args:
        tokens: [S, N] int64.
        valid: [S, N] bool, whether a token belongs to its response.

    Returns:
        rewards [S] and costs [S], float32: means over each response's tokens.
    """
    useful = torch.isin(tokens, torch.tensor(USEFUL)) & valid
    harmful = torch.isin(tokens, torch.tensor(HARMFUL)) & valid
    length = valid.sum(1)
    return (useful + (HARM_BONUS - 1) * harmful).sum(1) / length, harmful.sum(1) / length


def centred(scores: Tensor) -> Tensor:
    """Scores [S] minus the mean of their prompt: one advantage a response, in the scores' own units."""
    groups = scores.view(-1, RESPONSES)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def train(steps: int, multiplier: float, seed: int = 0) -> list[dict[str, float]]:
    """Trains a new policy.

    Args:
        steps: Batches of responses to draw and learn from.
        multiplier: λ to start with; 0 stays 0 and ignores the costs.
        seed: Of the model, the prompts and the samples.

    Returns:
        For each step `reward`, `cost` (means over responses), `unsafe` (share of prompts) and `multiplier`.
    """
    torch.manual_seed(seed)
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    # The responses of a prompt share its number: the op takes the mean cost over them.
    prompt_ids = torch.arange(PROMPTS).repeat_interleave(RESPONSES)
    sequence_ids = torch.arange(len(prompt_ids)).repeat_interleave(RESPONSE_TOKENS)
    history = []
    for _ in range(steps):
        prompts = torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS))[prompt_ids]
        tokens = policy.generate(prompts, do_sample=True, top_k=0, max_new_tokens=RESPONSE_TOKENS)
        tokens = torch.nn.functional.pad(tokens, (0, PROMPT_TOKENS + RESPONSE_TOKENS - tokens.shape[1]))
        response = tokens[:, PROMPT_TOKENS:]
        ended = response == END
        valid = ended.cumsum(1) - ended.int() == 0  # up to the first end token, which counts
        rewards, costs = score(response, valid)

        violations = prompt_violations(costs, prompt_ids, threshold=THRESHOLD)
        mean_violation = violations.relu().mean().item()
        multiplier = min(multiplier * math.exp(MULTIPLIER_RATE * multiplier * mean_violation), MULTIPLIER_MAX)

        old_log_probs = None  # on-policy
        for _ in range(PASSES):
            # The body alone: policy(tokens) would build the [T, V] logits.
            hidden = policy.model(tokens, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]
            result = fused_rectified_policy_loss(
                hidden.flatten(0, 1),
                policy.lm_head.weight,
                response.masked_fill(~valid, -100).flatten(),
                old_log_probs,
                centred(rewards)[sequence_ids],
                centred(costs)[sequence_ids],
                sequence_ids,
                costs,
                prompt_ids,
                threshold=THRESHOLD,
                multiplier=multiplier,
                entropy=False,
            )
            optimizer.zero_grad()
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            if old_log_probs is None:
                old_log_probs = result.log_probs

        history.append(
            {
                "reward": rewards.mean().item(),
                "cost": costs.mean().item(),
                "unsafe": result.unsafe_fraction.item(),
                "multiplier": multiplier,
            }
        )
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--multiplier", type=float, default=1.0, help="lambda to start with; 0 ignores the costs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    history = train(arguments.steps, arguments.multiplier, arguments.seed)
    print("step  reward   cost  unsafe  multiplier")
    for step, row in enumerate(history):
        if step % 10 == 0 or step == len(history) - 1:
            print(
                f"{step:4}  {row['reward']:6.3f}  {row['cost']:5.3f}  {row['unsafe']:6.3f}  {row['multiplier']:10.3f}"
            )


if __name__ == "__main__":
    main()
