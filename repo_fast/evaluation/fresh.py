"""Prompts that a policy is certified on: those that neither it nor a scorer has seen, as far as that is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repo_fast.data import Prompt
from repo_fast.errors import InputError
from repo_fast.evaluation.suites import KnownPrompt
from repo_fast.jobs.training_prompts import distinct, prompt_hash, seen, taken_over, unknown


@dataclass(frozen=True)
class Fresh:
    """Prompts, and what was found of them.

    Attributes:
        prompts: Those that are left, at least one, in their order.
        excluded: The others: `prompt_id`, `prompt`, and `of`, what has it.
        unknown: What they may be in all the same, a sentence each.
    """

    prompts: list[Prompt]
    excluded: list[dict[str, int | str]]
    unknown: list[str]


def exclude_seen(policy: str, policy_path: str, scorers: Mapping[str, str], prompts: Sequence[Prompt]) -> Fresh:
    """Leave out the prompts that a policy, or what scores it, was trained or tuned on.

    Args:
        policy: Its name, for messages.
        policy_path: As the configuration names it: of an embedded one, the folder that it is kept in has no record.
        scorers: The paths of the scorers, by the options that name them.
        prompts: At least one.

    Raises:
        InputError: None is left, or a record of training prompts is damaged.
    """
    record = [*taken_over(f"the policy {policy!r}", policy_path)]
    for option, path in scorers.items():
        record += taken_over(option, path)
    record_of_all = distinct(record)
    found = seen(record_of_all, prompts)
    excluded: list[dict[str, int | str]] = [
        {"prompt_id": prompt.id, "prompt": prompt.text, "of": source.name} for prompt, source in found
    ]
    out = {prompt.id for prompt, _ in found}
    # Prompts have to be drawn independently: written twice, one says nothing more. Those of suites are in one cluster
    # then, which counts once, and each is its suite's.
    first: dict[tuple[str, str | None], Prompt] = {}
    for prompt in prompts:
        if isinstance(prompt, KnownPrompt):
            continue
        written = prompt_hash(prompt.asked), prompt.asked.system
        if prompt.id not in out and (one := first.setdefault(written, prompt)) is not prompt:
            excluded.append({"prompt_id": prompt.id, "prompt": prompt.text, "of": f"prompt {one.id} of the same set"})
            out.add(prompt.id)
    kept = [prompt for prompt in prompts if prompt.id not in out]
    if not kept:
        raise InputError(
            f"the policy {policy!r}, or what scores it, was trained or tuned on all {len(prompts)} prompts, the first "
            f"by {excluded[0]['of']}; expected prompts that are new to it"
        )
    return Fresh(kept, excluded, unknown(record_of_all))
