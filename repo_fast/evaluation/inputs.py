"""Everything an evaluation reads before it starts: checked here, while an error is still one line."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from repo_fast.config import OF_SUITES, REFUSED, EvaluateConfig, certified_policy, section_of, stated
from repo_fast.data import Columns, Prompt, PromptTemplate, load_prompts
from repo_fast.errors import InputError, at, readable
from repo_fast.evaluation.fresh import Fresh, exclude_seen
from repo_fast.evaluation.suites import KnownPrompt, Origin, categories_of, load_suites
from repo_fast.jobs.inputs import check_scorer_inputs, exempt_prompts, fields_kept, find_model, scorer_specs
from repo_fast.models.on_paper import check_positions
from repo_fast.report.folders import LOCK_FILE, check_no_links
from repo_fast.report.known_prompts import KnownPrompts
from repo_fast.rollout import Request
from repo_fast.rollout.hf import end_tokens, generation_settings
from repo_fast.rollout.vllm import check_installed
from repo_fast.scoring import FunctionScorer, ScorerSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyInput:
    """A policy to evaluate.

    Attributes:
        path: Folder or hub name; the embedded one resolved to its folder.
        tokenizer: Its own.
        template: How prompts are put to it.
        requests: The prompts with their tokens under this template; the same prompts for every policy.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    requests: list[Request]


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation starts from.

    Attributes:
        policies: By name, in the order given.
        reference: Name of the one that the others are compared with.
        prompts: Those that every policy can read, shortest text first: neighbours are generated together.
        scorers: Where the rewards and the costs come from, by the names of their columns.
        exempt: By constraint, ids of the prompts that it is not about.
        well_formed: The check of that name; None without one.
        too_long: The prompts that were too long.
        every: The prompts of the source.
        fresh: With claims, what was left out for being known to the policy.
        origins: By suite, what it was read from.
    """

    policies: dict[str, PolicyInput]
    reference: str
    prompts: list[Prompt]
    scorers: dict[str, ScorerSpec]
    exempt: dict[str, frozenset[int]]
    well_formed: ScorerSpec | None
    too_long: list[Prompt]
    every: list[Prompt]
    fresh: Fresh
    origins: dict[str, Origin]

    @property
    def reference_path(self) -> str:
        """Folder or hub name of the reference."""
        return self.policies[self.reference].path

    @property
    def known(self) -> KnownPrompts | None:
        """What is known of the prompts; None where they are of no suite."""
        found = [prompt for prompt in self.prompts if isinstance(prompt, KnownPrompt)]
        if not found:
            return None
        return KnownPrompts(
            {name: [prompt.id for prompt in found if name in prompt.suites] for name in self.origins},
            {prompt.id: prompt.harmful for prompt in found},
            {prompt.id: prompt.cluster for prompt in found},
        )

    @property
    def of_suites(self) -> dict[str, dict[str, Any]]:
        """By suite `source` and `sha256`, as `Origin` has them, how many `prompts` were read of it, and how many of
        these were left out: those that were `not_fresh`, with claims, and those that were `too_long`."""
        fresh = {prompt.id for prompt in self.fresh.prompts}

        def of(name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
            return [prompt for prompt in prompts if isinstance(prompt, KnownPrompt) and name in prompt.suites]

        return {
            name: {
                "source": origin.source,
                "sha256": origin.sha256,
                "prompts": len(of(name, self.every)),
                "not_fresh": len([prompt for prompt in of(name, self.every) if prompt.id not in fresh]),
                "too_long": len(of(name, self.too_long)),
            }
            for name, origin in self.origins.items()
        }

    @property
    def categories(self) -> dict[str, list[int]]:
        """By category the ids of its prompts."""
        found = defaultdict(list)
        for prompt in self.prompts:
            for category in filter(None, categories_of(prompt)):
                found[category].append(prompt.id)
        return dict(found)

    def not_scored(self, column: str) -> frozenset[int]:
        """Ids of the prompts whose responses a scorer is not given."""
        return _harmful(self.prompts) if column == REFUSED else self.exempt.get(column, frozenset())


def read_inputs(config: EvaluateConfig) -> EvaluationInputs:
    """Read and check all inputs of an evaluation.

    Raises:
        InputError: The first thing that cannot be used.
    """
    with readable(Path(config.output_dir)):
        _check_output_folder(Path(config.output_dir))
    if config.sampling.engine == "vllm":
        check_installed("sampling")
    scorers = scorer_specs(config.scorers)
    well_formed = None
    if config.well_formed is not None:
        well_formed = ScorerSpec(config.well_formed, "function")
        FunctionScorer(well_formed.path, "well-formed check")
    prompts, origins = _load(config)
    fresh = _fresh(config, prompts) if config.certify.claims else Fresh(prompts, [], [])
    every, prompts = prompts, fresh.prompts
    found = {name: find_model(path) for name, path in config.policies.items()}
    templates = {
        name: PromptTemplate(tokenizer, config.template, config.date, end_tokens(generation_settings(path), tokenizer))
        for name, (path, tokenizer) in found.items()
    }
    tokens = {name: _tokens(prompts, template) for name, template in templates.items()}
    kept = [
        prompt
        for prompt in sorted(prompts, key=lambda prompt: len(prompt.text))
        if all(encoded[prompt.id].numel() <= config.max_prompt_tokens for encoded in tokens.values())
    ]
    if not kept:
        raise InputError(
            f"{config.prompts_source}: all {len(prompts)} prompts are longer than max_prompt_tokens "
            f"({config.max_prompt_tokens}), expected at least one that is not"
        )
    drawn = 0
    for name, (path, _) in found.items():
        longest = max(tokens[name][prompt.id].numel() for prompt in kept) + config.sampling.max_new_tokens
        what = f"policy {name!r}, a prompt and sampling.max_new_tokens ({config.sampling.max_new_tokens})"
        check_positions(path, longest, what)
        drawn = max(drawn, longest)
    notes: list[str] = []
    exempt = exempt_prompts(config.constraints, kept, config.prompts_source, notes)
    for note in notes:
        log.info("%s", note)
    _check_judged(config, kept, exempt)
    policies = {
        name: PolicyInput(
            path, tokenizer, templates[name], [Request(prompt, tokens[name][prompt.id]) for prompt in kept]
        )
        for name, (path, tokenizer) in found.items()
    }
    used = {prompt.id for prompt in kept}
    inputs = EvaluationInputs(
        policies,
        config.compared_with,
        kept,
        scorers,
        exempt,
        well_formed,
        [prompt for prompt in prompts if prompt.id not in used],
        every,
        fresh,
        origins,
    )
    for name, spec in scorers.items():
        out = inputs.not_scored(name)
        asked = [prompt for prompt in kept if prompt.id not in out]
        check_scorer_inputs(section_of(name, config.constraints), spec, config.scorers[name], drawn, asked, config.date)
    return inputs


def _load(config: EvaluateConfig) -> tuple[list[Prompt], dict[str, Origin]]:
    """The distinct prompts, of a source or of suites, and what these were read from."""
    limit, keep = config.prompts_limit, fields_kept(config.costs)
    if config.suites.sources:
        known, origins = load_suites(config.suites.sources, limit=limit, keep=keep)
        return list(known), origins
    source, columns = config.prompts_source, Columns(config.prompts_fields, "prompts_fields")
    prompts = load_prompts(source, split=config.prompts_split, limit=limit, columns=columns, keep=keep)
    columns.check_found([source])
    return prompts, {}


def _harmful(prompts: Sequence[Prompt]) -> frozenset[int]:
    """Ids of those that are known to be."""
    return frozenset(prompt.id for prompt in prompts if isinstance(prompt, KnownPrompt) and prompt.harmful)


def _check_judged(config: EvaluateConfig, prompts: Sequence[Prompt], exempt: Mapping[str, frozenset[int]]) -> None:
    """Raise `InputError` where what is to be measured of known prompts cannot be."""
    if not config.suites.sources:
        return
    harmful = _harmful(prompts)
    if unjudged := harmful & exempt.get(config.harm, frozenset()):
        raise InputError(
            f"suites.harm is {config.harm!r}, which by its applies_to is not about {len(unjudged)} of {len(harmful)} "
            "harmful prompts, expected a constraint that is about all of them"
        )
    left = {"attack_success": ("harmful", len(harmful)), "over_refusal": ("harmless", len(prompts) - len(harmful))}
    for name, claim in config.certify.claims.items():
        statement = stated(name, claim).of_each
        if statement in OF_SUITES and not left[statement][1]:
            raise InputError(
                f"claim {name!r} is about {left[statement][0]} prompts, and {config.prompts_source} has none; expected "
                "a suite with some"
            )


def _fresh(config: EvaluateConfig, prompts: list[Prompt]) -> Fresh:
    """The prompts that the certified policy and what scores it have not seen."""
    policy = certified_policy(config.certify, config.policies, config.compared_with)
    paths = {f"{section_of(name, config.constraints)}.path": scorer.path for name, scorer in config.scorers.items()}
    fresh = exclude_seen(policy, config.policies[policy], paths, prompts)
    claims = {name: stated(name, claim) for name, claim in config.certify.claims.items()}
    by_category = [name for name, claim in claims.items() if claim.statement == "worst_category"]
    if by_category and all(prompt.category is None for prompt in fresh.prompts):
        raise InputError(
            f"claim {by_category[0]!r} is about every category, and no prompt of {config.prompts_source} has a category"
        )
    return fresh


def _tokens(prompts: list[Prompt], template: PromptTemplate) -> dict[int, torch.Tensor]:
    """The tokens of each prompt, by its id."""
    tokens = {}
    for prompt in prompts:
        with at(prompt.place):
            tokens[prompt.id] = torch.tensor(template.encode_prompt(prompt.asked))
    return tokens


def _check_output_folder(folder: Path) -> None:
    """A run's folder has files of the report's names: only a folder of an evaluation is written to again."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {str(folder)!r} is a file, expected a folder, or nothing")
    check_no_links(folder, ["cache", "plots"])
    # One that ended before it began leaves its lock.
    used = folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())
    if used and not (folder / EvaluateConfig.FILE).is_file():
        raise InputError(
            f"output_dir {str(folder)!r} holds other files than an evaluation's, expected a new folder, or that of an "
            "earlier evaluation"
        )
