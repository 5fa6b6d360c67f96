"""A hook of MkDocs: the reference of what evaluations measure, from what the report's page says of each measure."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from repo_fast.report.page_parts.wording import MEASURES, Measure, groups_of

# Of those that are no shares.
UNITS = {
    "compensation": "cost",
    "strict_violation": "cost",
    "cvar_violation": "cost",
    "max_violation": "cost",
    "mean_cost": "cost",
    "mean_reward": "reward",
    "mean_second_reward": "second reward",
    "mean_reward_on_safe_prompts": "reward",
    "judge_rating": "1 to 10",
    "kl": "nats a response",
    "response_length": "tokens",
}
_WHERE = """# Measures

What evaluations measure. The report of an evaluation has a table of them, with 95 % intervals; how to read it:
[policies side by side](../guides/evaluation.md#report).

- `report.json` of `repo-fast evaluate` has each as `policies.NAME.MEASURE`, with `value`, `low` and `high`, and as
  `differences.NAME.MEASURE` to the reference; by category and by suite again. null: not defined, or no interval.
- Known prompts need suites, `judge_` measures a judge, and `well_formed` a check; `kl` and `mean_second_reward` are a
  training's alone. The reference has no differences.
- `evaluations.jsonl` of a training has the values alone, of the measures of the before/after table, and of some, as
  `MEASURE_error`, the standard error over prompts.
- With several constraints those of costs come for each, behind its name: `harm_mean_cost`. Without a name rates are of
  what is safe by all.
"""
_BETTER = {1: "higher", 0: "", -1: "lower"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/measures.md", content=render()))
    return files


def render() -> str:
    """A page of Markdown: a heading and a table a group."""
    lines = [_WHERE]
    for title, group in groups_of(list(MEASURES)):
        lines += [f"## {title}", "", "| measure | unit | better | is |", "|---|---|---|---|"]
        lines += [f"| `{one.key}` | {_unit(one)} | {_BETTER[one.better]} | {one.definition} |" for one in group] + [""]
    return "\n".join(lines)


def _unit(measure: Measure) -> str:
    return "share" if measure.share else UNITS[measure.key]
