# %% [markdown]
# # The loss head in a plain PyTorch loop
#
# RePO's policy loss is written out in PyTorch and called as one op, the two are compared in value, time and memory, and
# the op trains a model in a loop without a trainer; it needs a CPU and no network, and took {duration}.
#
# ## The loss, written out
#
# The policy loss needs the log-probability of one token out of V in each of T positions. In plain PyTorch that means
# logits [T, V]; the rest are short vectors.

# %%
import torch
from torch import Tensor


def plain_loss(
    hidden: Tensor,  # [T, D], the model's last hidden states
    weight: Tensor,  # [V, D], its LM head
    targets: Tensor,  # [T], the tokens that were drawn
    old_log_probs: Tensor,  # [T], of the policy that drew them
    reward_advantages: Tensor,  # [T]
    cost_advantages: Tensor,  # [T]
    sequence_ids: Tensor,  # [T], which of the S responses a token belongs to
    costs: Tensor,  # [S], above 0 is unsafe
    prompt_ids: Tensor,  # [S], which prompt a response answers
    multiplier: float,
) -> Tensor:
    logits = hidden @ weight.T
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratio = (log_probs - old_log_probs).exp()

    def clipped(advantages: Tensor) -> Tensor:
        return torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)

    # Rectified: the cost has a weight where the mean cost of a prompt's responses is above 0, and none elsewhere.
    mean_costs = torch.zeros(len(costs)).index_add(0, prompt_ids, costs) / prompt_ids.bincount(minlength=len(costs))
    unsafe = (mean_costs[prompt_ids] > 0)[sequence_ids]
    reward_weight = torch.where(unsafe, 1 / (1 + multiplier), 1.0)
    cost_weight = torch.where(unsafe, multiplier / (1 + multiplier), 0.0)
    losses = -(reward_weight * clipped(reward_advantages) + cost_weight * clipped(-cost_advantages))
    return (torch.zeros(len(costs)).index_add(0, sequence_ids, losses) / sequence_ids.bincount()).mean()


# %% [markdown]
# ## The same as one op
#
# `repo_fast.ops` needs PyTorch and nothing else of the package. The op forms the gradients in its forward pass, a chunk
# of rows at a time, so that the logits never exist at once.

# %%
from repo_fast.ops import available_backends, fused_rectified_policy_loss, linear_log_probs


def fused_loss(*inputs: Tensor, multiplier: float) -> Tensor:
    return fused_rectified_policy_loss(*inputs, multiplier=multiplier, entropy=False).loss


def example(T: int, D: int = 256, V: int = 32_000, tokens: int = 64, responses: int = 4) -> list[Tensor]:
    """Random inputs: responses of `tokens` tokens, `responses` of them to each prompt."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(T, D).requires_grad_(), (normal(V, D) / D**0.5).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    with torch.no_grad():
        log_probs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sequence_ids = torch.arange(T) // tokens
    prompt_ids = torch.arange(T // tokens) // responses
    old_log_probs = log_probs + 0.2 * normal(T)
    return [hidden, weight, targets, old_log_probs, normal(T), normal(T), sequence_ids, normal(T // tokens), prompt_ids]


def gradients(loss, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients to the hidden states and the head."""
    value = loss(*inputs, multiplier=2.0)
    return value.detach(), *torch.autograd.grad(value, inputs[:2])


inputs = example(T=512)
print("backends here:", *available_backends("fused_rectified_policy_loss"))
for name, plain, fused in zip(
    ("loss", "gradient to hidden", "gradient to weight"),
    gradients(plain_loss, inputs),
    gradients(fused_loss, inputs),
    strict=True,
):
    print(f"{name:18}   largest difference {(plain - fused).abs().max():.1e}, of values up to {plain.abs().max():.1e}")

# %% [markdown]
# ## Time and memory
#
# Forward and backward, in float32. Memory is the most that the process held beyond what it held before, less the
# gradients, which both return; Linux keeps that high-water mark. Of three rounds in turn, the shortest time and the
# most memory.

# %%
import ctypes
import re
import time
from pathlib import Path

import pandas as pd


def memory(name: str) -> float:
    """A line of the process's status, in MiB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(loss, inputs: list[Tensor]) -> tuple[float, float]:
    """Seconds and MiB."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, and is counted when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    held, started = memory("VmRSS"), time.perf_counter()
    found = gradients(loss, inputs)
    return time.perf_counter() - started, memory("VmHWM") - held - sum(tensor.nbytes for tensor in found) / 2**20


rows = []
for T in (256, 512, 1024):
    inputs = example(T)
    rounds = [measure(loss, inputs) for _ in range(3) for loss in (plain_loss, fused_loss)]
    for name, measured in ("plain", rounds[::2]), ("fused", rounds[1::2]):
        seconds, mebibytes = zip(*measured, strict=True)
        rows.append({"tokens": T, "loss": name, "ms": min(seconds) * 1000, "MiB": max(mebibytes)})
print(f"V = 32,000, D = 256, {torch.get_num_threads()} thread(s)")
table = pd.DataFrame(rows).pivot(index="tokens", columns="loss", values=["ms", "MiB"]).round().astype(int)
table

# %% [markdown]
# The plain loss holds several tensors of the size of the logits, which grow with T and V; the op holds a chunk of rows.
# Other sizes, bfloat16, GPUs, and other heads beside it: [measured](../measured/index.md).
#
# ## A loop
#
# A tiny random Llama learns to say useful tokens. A quarter of them are harmful, and worth twice as much: reward alone
# leads to harm. A prompt is unsafe where more than a tenth of its responses' tokens are harmful.

# %%
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, PROMPTS, RESPONSES, TOKENS, STEPS = 64, 16, 4, 16, 40
USEFUL, HARMFUL = torch.arange(16, 32), torch.arange(28, 32)


def advantages(scores: Tensor) -> Tensor:
    """Scores [S] less the mean of their prompt's, for each token."""
    groups = scores.view(PROMPTS, RESPONSES)
    return (groups - groups.mean(1, keepdim=True)).flatten().repeat_interleave(TOKENS)


def train(loss, multiplier: float) -> pd.DataFrame:
    """Mean reward and mean cost of each step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, pad_token_id=0, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    prompt_ids = torch.arange(PROMPTS).repeat_interleave(RESPONSES)
    sequence_ids = torch.arange(PROMPTS * RESPONSES).repeat_interleave(TOKENS)
    history = []
    for _ in range(STEPS):
        prompts = torch.randint(1, VOCABULARY, (PROMPTS, 4))[prompt_ids]
        tokens = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=TOKENS)
        response = tokens[:, 4:]
        harm = torch.isin(response, HARMFUL).float().mean(1)
        reward, cost = torch.isin(response, USEFUL).float().mean(1) + harm, harm - 0.1
        old_log_probs = None
        for _ in range(2):
            # Position t predicts token t + 1. The body alone: model(tokens) would form the logits.
            hidden = model.model(tokens).last_hidden_state[:, 3:-1].flatten(0, 1)
            head = (hidden, model.lm_head.weight, response.flatten())
            if old_log_probs is None:
                with torch.no_grad():
                    old_log_probs = linear_log_probs(*head)
            scores = (advantages(reward), advantages(cost), sequence_ids, cost, prompt_ids)
            optimizer.zero_grad()
            loss(*head, old_log_probs, *scores, multiplier=multiplier).backward()
            optimizer.step()
        history.append({"reward": reward.mean().item(), "cost": cost.mean().item()})
    return pd.DataFrame(history)


# %%
import matplotlib.pyplot as plt

runs = {
    "plain, multiplier 5": train(plain_loss, 5.0),
    "fused, multiplier 5": train(fused_loss, 5.0),
    "fused, multiplier 0": train(fused_loss, 0.0),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, measure_name in zip(axes, ("reward", "cost"), strict=True):
    for (name, history), style in zip(runs.items(), ("-", "--", ":"), strict=True):
        axis.plot(history[measure_name], style, label=name)
    axis.set(xlabel="step", title=f"mean {measure_name}")
axes[1].axhline(0, color="gray", linewidth=0.8)
axes[0].legend(fontsize="small")
figure.tight_layout()

# %% [markdown]
# The two losses train alike, up to roundings that sampling magnifies. With a multiplier of 0 it is the loss of PPO and
# GRPO, and harm follows the reward.
#
# ## Next
#
# - [A complete example](../../examples/bare_model/README.md), with a multiplier that is learned, and [the op in TRL's
#   trainer](../../examples/trl_grpo/README.md)
# - [How the op works](../how/loss-head.md), and [its reference](../reference/ops.md)
