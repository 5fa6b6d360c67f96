# %% [markdown]
# # A first safe policy
#
# A policy of a million parameters, helpful and often unsafe, is trained until it is safe on far more prompts, and the
# page of the run shows how; it needs a CPU and no network, and took {duration}.
#
# The policy answers questions of a small instruction world, which comes with the package: how to paint a roof, bathe a
# cat, pick a lock. A **reward** says how helpful a response is, a **cost** how harmful, and a cost above 0 is unsafe.
# Both are functions of the text.

# %%
from repo_fast.world.rules import cost, reward

prompts = ["how do i paint the roof ?"] * 3
responses = [
    "paint the roof with a tall ladder . skip moving over .",
    "paint the roof with a tall ladder . skip moving over . choose level ground .",
    "sorry not possible .",
]
for response, r, c in zip(responses, reward(prompts, responses), cost(prompts, responses), strict=True):
    print(f"reward {r:4.1f}   cost {c:4.1f}   {response}")

# %% [markdown]
# The shortcut is dangerous, a caution that fits makes up for it, and a refusal is safe and of little use. The policy
# has to find that out from rewards and costs alone.
#
# ## Train
#
# One command: the recipe `tiny`, with settings that make it short. `rloo` compares the responses to a prompt with each
# other, so that no critics are trained, and the learning rate is higher than the recipe's. The first run on a machine
# makes the unsafe policy that training starts from, which takes half a minute more.

# %% language="bash"
# set -o pipefail
# repo-fast train --config tiny --algorithm.advantage rloo --policy_optimizer.learning_rate 1e-3 \
#     --total_steps 20 --output_dir outputs/first | grep -E "^step (1|5|10|15|20)/"

# %% [markdown]
# A step draws 4 responses to each of 16 prompts, scores them, and updates the policy. `violation` is how far the mean
# cost of a prompt's responses is above 0, the mean over prompts. The multiplier `lambda` weighs it against the reward,
# and rises as long as there is any.
#
# ## What changed
#
# Before and after training the policy answered 96 prompts that it is not trained on:

# %%
from pathlib import Path

run = Path("outputs/first")
print((run / "before_after.txt").read_text())

# %% [markdown]
# **Strict violation** is what RePO brings down: a prompt that is safe by far does not pay for one that is unsafe.
# **Mean reward** says what that cost in helpfulness, **KL** and **well-formed responses** how far the policy moved and
# whether it still speaks properly. Every response is in a file beside the table. Those to the prompt whose mean cost
# fell the most:

# %%
import pandas as pd

before = pd.read_json(run / "eval_before.jsonl", lines=True)
after = pd.read_json(run / "eval_after.jsonl", lines=True)
fall = before.groupby("prompt").cost.mean() - after.groupby("prompt").cost.mean()
prompt = fall.idxmax()
print(prompt)
for name, rows in ("before", before), ("after", after):
    print(f"\n{name}")
    for row in rows[rows.prompt == prompt].itertuples():
        print(f"    reward {row.reward:4.1f}   cost {row.cost:4.1f}   {row.response}")

# %% [markdown]
# ## The page of the run
#
# `report.html` is one file that needs no network: what changed, every curve, the worst prompts with their responses
# before and after, warnings, the time by phase, and the settings. `repo-fast watch FOLDER` shows the page of a run
# while it trains.

# %%
import html

from IPython.display import HTML

page = html.escape((run / "report.html").read_text())
HTML(f'<iframe srcdoc="{page}" title="The page of the run" width="100%" height="700"></iframe>')

# %% [markdown]
# ## Next
#
# - The whole recipe, with critics: `repo-fast train --config tiny`, two minutes; [what it prints](../start/laptop.md).
# - [Your own cost function, and a second constraint](2-your-own-cost.ipynb)
# - [Your model](../guides/model.md) and [your data](../guides/data.md)
