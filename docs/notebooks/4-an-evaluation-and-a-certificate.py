# %% [markdown]
# # Reading an evaluation and a certificate
#
# Whether a policy became safer, on which prompts, and whether that is shown or only seen: an evaluation with claims,
# read measure by measure; it needs a CPU and no network, and took {duration}.
#
# ## A policy to judge
#
# [The first notebook's](1-a-first-safe-policy.ipynb), made again without the evaluations around it. Any folder of a
# Hugging Face model is judged in the same way.

# %% language="bash"
# set -o pipefail
# repo-fast train --config tiny --algorithm.advantage rloo --policy_optimizer.learning_rate 1e-3 \
#     --total_steps 20 --data.eval_prompts null --output_dir outputs/first | grep -E "^step (1|10|20)/"

# %% [markdown]
# ## Evaluate
#
# `before` is the reference; it is drawn twice, so that there is a floor: what sampling alone changes. A `--claim` says
# what is to be shown, and it is written down before anything is drawn. The three limits are chosen so that the verdicts
# are not all alike; yours come from what your policy is for. The exit status is the verdict: 0 is PASS, 3 FAIL, 4
# UNDECIDED.

# %% language="bash"
# repo-fast evaluate --config tiny --policy before=world:tiny --policy after=outputs/first/policy \
#     --reference before --prompts world:certify --samples_per_prompt 4 --certify.ledger looks.jsonl \
#     --output_dir outputs/certificate --claim unsafe_prompts=0.4 --claim interference=0.1 \
#     --claim unsafe_responses=0.2 > evaluation.txt
# echo "exit status $?"

# %% [markdown]
# ## The measures
#
# `report.html` is the page to read and to pass on, `report.json` has its numbers. Each is a mean with a 95 % bootstrap
# interval over prompts:

# %%
import json
from pathlib import Path

import pandas as pd

folder = Path("outputs/certificate")
report = json.loads((folder / "report.json").read_text())


def shown(measure: dict[str, float | None]) -> str:
    # Some have no value, or no interval: null in the file.
    numbers = ["-" if number is None else f"{number:.3f}" for number in measure.values()]
    return "{} [{}, {}]".format(*numbers)


measures = ["mean_reward", "safety_rate", "strict_safety_rate", "strict_violation", "interference_rate", "repair_rate"]
pd.DataFrame({name: {m: shown(values[m]) for m in measures} for name, values in report["policies"].items()})

# %% [markdown]
# - **Safety rate** is about responses, **strict safety rate** about prompts: the share of those whose responses are all
#   safe. The second is the lower one, always.
# - **Strict violation** is how far the mean cost of a prompt is above the threshold, 0 where it is not.
# - **Interference rate**: of the prompts that were safe, the share that is unsafe now. In the column `before` stands
#   the floor: a second sample of the same policy. Only what is above it comes of the training. **Repair rate** is the
#   other way round.
#
# Whether two policies differ is not read off two intervals that overlap or do not. Differences are paired by prompt,
# and have intervals of their own:

# %%
pd.Series({m: shown(report["differences"]["after"][m]) for m in measures}, name="after - before").to_frame()

# %% [markdown]
# An average hides where it holds. The prompts of the embedded world have categories:

# %%
import matplotlib.pyplot as plt

violations = pd.DataFrame(
    {
        name: {
            category: values["policies"][name]["strict_violation"]["value"]
            for category, values in report["categories"].items()
        }
        for name in report["policies"]
    }
).sort_values("before")
violations.plot.barh(figsize=(7, 3.6), xlabel="strict violation", width=0.8)
plt.tight_layout()

# %% [markdown]
# ## The certificate
#
# What was seen is not yet shown: another sample of prompts would have given other numbers. A claim passes only if the
# bound on what is claimed, not the estimate, is within the limit.

# %%
certificate = json.loads((folder / "certificate.json").read_text())
columns = ["verdict", "estimate", "bound", "limit", "n", "p_adjusted"]
print(f"{certificate['verdict']}: {certificate['reason']}")
pd.DataFrame.from_dict(certificate["claims"], orient="index")[columns].round(3)

# %%
for name, claim in certificate["claims"].items():
    print(f"{name}: {claim['says']}. {claim['reason']}\n")

# %% [markdown]
# - **PASS**: the claim is shown. **FAIL**: the opposite is. Each comes wrongly with a probability of at most `delta`.
#   In between a claim is **UNDECIDED**, and `prompts_needed` says how many fresh prompts would show it, if they are as
#   these are.
# - The unit is the prompt, `n` of them: more responses to the same prompts are not more evidence.
# - The claims are tested together, hence the adjusted p-values, and the certificate passes if every claim does.
#
# ## Looks
#
# Trying policies on the same prompts until one passes would pass what is false. So looks are counted in a file: look i
# has `delta` / 2^i.

# %%
print(f"look {certificate['look']} has {certificate['delta_of_look']} of {certificate['delta']}")

# %% [markdown]
# `--verify` makes the certificate again from the claims and the responses that lie beside it, and compares.

# %% language="bash"
# repo-fast evaluate --verify outputs/certificate/certificate.json > verification.txt
# echo "exit status $?"
# head -n 1 verification.txt

# %% [markdown]
# ## Next
#
# - What each claim says, and by which bound: [a certificate](../guides/certificate.md)
# - Known sets of prompts, judges, and vLLM: [policies side by side](../guides/evaluation.md)
# - How often the bounds err: [measured](../../experiments/coverage/RESULTS.md)
