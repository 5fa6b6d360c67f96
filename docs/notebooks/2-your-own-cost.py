# %% [markdown]
# # Your own cost, and a second constraint
#
# A rule of your own becomes a constraint by a Python function, and a second constraint mends what the first one spoils;
# it needs a CPU and no network, and took {duration}.
#
# ## A cost function
#
# Suppose that answers are read aloud, and that twelve words are as many as anybody listens to. A cost function takes
# prompts and responses and returns a number for each; above 0 the rule is broken. Its scale is the pressure: here four
# words too many weigh 1, about as much as a clause of the embedded world earns.

# %%
# %%writefile my_rules.py
def length(prompts: list[str], responses: list[str]) -> list[float]:
    """Above 0 is too long: more than twelve words."""
    return [(len(text.replace(".", "").split()) - 12) / 4 for text in responses]


# %%
import my_rules

responses = [
    "take warm water and bathe the cat .",
    "take warm water and bathe the cat . stop after five minutes . keep the room quiet . good luck .",
]
my_rules.length(["how do i bathe the cat ?"] * 2, responses)

# %% [markdown]
# ## Train under it
#
# `--cost.path FILE:FUNCTION` is all. The rest is [the first notebook's](1-a-first-safe-policy.ipynb) command, without
# evaluations: policies are compared below.

# %% language="bash"
# set -o pipefail
# repo-fast train --config tiny --algorithm.advantage rloo --policy_optimizer.learning_rate 1e-3 \
#     --total_steps 15 --data.eval_prompts null --cost.path my_rules:length --output_dir outputs/brief \
#     | grep -E "^step (1|5|10|15)/"

# %% [markdown]
# ## A second constraint
#
# A short answer has no room for a caution: that the policy is brief says nothing of whether it is safe. So harm becomes
# a constraint too. In a recipe, a file in YAML, `constraints` stands in place of `cost`, and each constraint has a
# name:

# %% language="bash"
# cat > brief-and-safe.yaml <<'END'
# policy: {path: "world:tiny"}
# data: {prompts: "world:train", eval_prompts: null, max_prompt_tokens: 64}
# rollout: {prompts_per_step: 16, responses_per_prompt: 4, max_new_tokens: 32}
# reward: {path: "repo_fast.world.rules:reward"}
# constraints:
#   length: {path: "my_rules:length"}
#   harm: {path: "repo_fast.world.rules:cost"}
# algorithm: {name: repo, advantage: rloo, kl_coefficient: 0.02}
# update: {minibatches: 4, micro_batch_tokens: 1024}
# policy_optimizer: {learning_rate: 1.0e-3}
# total_steps: 15
# END
# set -o pipefail
# repo-fast train --config brief-and-safe.yaml --output_dir outputs/brief-and-safe | grep -E "^step (1|5|10|15)/"

# %% [markdown]
# ## Side by side
#
# `repo-fast evaluate` lets the three policies answer the same 96 prompts, none of which was trained on, and judges them
# by both constraints.

# %% language="bash"
# repo-fast evaluate --policy start=world:tiny --policy brief=outputs/brief/policy \
#     --policy both=outputs/brief-and-safe/policy --prompts world:test --samples_per_prompt 4 \
#     --sampling.max_new_tokens 32 --reward.path repo_fast.world.rules:reward \
#     --constraints.length.path my_rules:length --constraints.harm.path repo_fast.world.rules:cost \
#     --output_dir outputs/side-by-side > evaluation.txt

# %%
import json
from pathlib import Path

import pandas as pd

policies = json.loads(Path("outputs/side-by-side/report.json").read_text())["policies"]
measures = ["length_strict_violation", "harm_strict_violation", "mean_reward", "response_length"]
pd.DataFrame({name: {m: values[m]["value"] for m in measures} for name, values in policies.items()}).round(3)

# %% [markdown]
# A strict violation is how far the mean cost of a prompt's responses is above 0, the mean over prompts. What each
# policy says to one prompt:

# %%
samples = pd.read_json("outputs/side-by-side/samples.jsonl", lines=True)
prompt = "how do i paint the roof ?"
for name, rows in samples[samples.prompt == prompt].groupby("policy", sort=False):
    print(name, *rows.response[:4], sep="\n    ")

# %% [markdown]
# ## Next
#
# - A constraint that is about some prompts only (`applies_to`), thresholds, margins and controllers: [several
#   constraints](../guides/constraints.md)
# - A model instead of a function: [score models](../guides/scores.md#score-models), [guard models and
#   judges](../guides/guards-and-judges.md)
# - [Reading an evaluation and a certificate](4-an-evaluation-and-a-certificate.ipynb)
