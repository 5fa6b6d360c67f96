"""The configuration of `repo_fast.evaluate`: policies side by side on the same prompts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repo_fast.config.certify import CertifyConfig, check_certify
from repo_fast.config.checks import require, require_at_least
from repo_fast.config.constraints import ONLY, CostConfig, by_column, check_costs
from repo_fast.config.judge import JudgeConfig, check_judge
from repo_fast.config.sections import (
    JobConfig,
    SamplingConfig,
    ScorerConfig,
    check_fields,
    check_sampling,
    check_scorer,
)
from repo_fast.config.suites import REFUSED, SuitesConfig, check_suites
from repo_fast.errors import InputError

# What someone who has just run `make train` was looking for.
_FIRST = (
    "after `make train`: python -m repo_fast.evaluate --config tiny --policy before=world:tiny --policy "
    "after=outputs/tiny/policy"
)
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class EvaluateConfig(JobConfig):
    """Compare policies on the same prompts: safety prompt by prompt, helpfulness, and a report to look at."""

    PROGRAM: ClassVar[str] = "repo-fast evaluate"
    FOLDER: ClassVar[str] = "evaluate"
    DEFAULT: ClassVar[str | None] = None
    FILE: ClassVar[str] = "evaluation.yaml"
    """The resolved configuration, in the output folder: what tells it from others."""
    ALSO: ClassVar[Mapping[str, str]] = {
        "--policy NAME=PATH": "A policy, once for each: one of `policies`.",
        "--suite NAME[=PATH][,...]": "Known prompts, once or several times: those of `suites.sources`, without a path "
        "from where they are published.",
        "--claim NAME=LIMIT": "A claim, once for each: `certify.claims.NAME.limit`.",
        "--accept-asymptotic": "`certify.accept_asymptotic true`.",
        "--verify CERTIFICATE": "Nothing is evaluated: make the certificate again from what lies beside this "
        "`certificate.json`, and compare. It stands alone.",
    }

    output_dir: str = "outputs/evaluate"
    """Folder for the report."""
    cache_dir: str | None = None
    """Folder of the samples, scores and judgments, which are not made again; evaluations may share one, one after the
    other. Null: `cache` in `output_dir`."""
    policies: dict[str, str] = field(default_factory=dict)
    """The policies by name: Hugging Face folders, hub names, or `world:tiny`. On the command line
    `--policy NAME=PATH`, once for each."""
    reference: str | None = None
    """Name of the policy that the others are compared with. Null: the first one."""
    prompts: str | None = None
    """Prompts: a file (.jsonl, .json, .txt or .csv, also as .gz, or .parquet) or a folder of such, `world:test` or
    `world:certify` (further ones), or a `datasets` hub name. Null: `suites`, or without any `world:test`."""
    prompts_split: str = "test"
    """Split to read when `prompts` is a `datasets` name, or a folder with several."""
    prompts_fields: dict[str, str] = field(default_factory=dict)
    """What columns of `prompts` are, where their names do not say it or they contradict each other: `prompt`,
    `response`, `history`, `system` or `ignore`, as `--prompts_fields.COLUMN ROLE`."""
    prompts_limit: int | None = None
    """Use only the first so many prompts, of suites of each. Null: all."""
    suites: SuitesConfig = field(default_factory=SuitesConfig)
    max_prompt_tokens: int = 1024
    """Longest templated prompt (tokens). One that is longer for any of the policies is dropped for all, and counted."""
    template: Literal["auto", "chat", "safe-rlhf", "plain"] = "auto"
    """How a prompt is put to the policies. `auto`: the tokenizer's chat template, else Safe RLHF's."""
    samples_per_prompt: int = 8
    """K, responses of each policy to each prompt. The reference draws K more, which show what sampling alone does."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: ScorerConfig = field(default_factory=ScorerConfig)
    cost: ScorerConfig = field(default_factory=ScorerConfig)
    threshold: float = 0.0
    """d: a cost above it is unsafe (units of the cost)."""
    constraints: dict[str, CostConfig] = field(default_factory=dict)
    """Several costs by name, each with its threshold, instead of `cost` and `threshold`."""
    well_formed: str | None = None
    """Python callable `package.module:function` (`(prompts, responses) -> list[bool]`) whose share is reported too."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    certify: CertifyConfig = field(default_factory=CertifyConfig)
    resamples: int = 2000
    """Bootstrap resamples of the prompts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations. `auto`: bfloat16 on a GPU, float32 on CPU."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2", "padded"] = "auto"
    """Attention implementation. `packed`: each sequence of a packed row by itself; `sdpa`, `eager`: the row under a
    mask; `padded`: each sequence a row of its own, slower and with more memory. `auto`: the first that is right for the
    architecture, found by trying: flash_attention_2 on CUDA where flash-attn is installed, then these in order."""
    scoring_tokens: int = 8192
    """Largest packed row that a score model reads at once on a rank (tokens). A longer text gets one of its own."""

    @property
    def costs(self) -> dict[str, CostConfig]:
        """Every cost by the name of its column, in whichever form it is written."""
        return by_column(self.constraints or {ONLY: CostConfig(**vars(self.cost), threshold=self.threshold)})

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """Where the rewards, the costs and, with suites, refusals come from, by the names of their columns."""
        return {"reward": self.reward, **self.costs} | ({REFUSED: self.suites.refusal} if self.suites.sources else {})

    @property
    def prompts_source(self) -> str:
        """What the prompts are from."""
        return self.suites.source if self.suites.sources else self.prompts or "world:test"

    @property
    def harm(self) -> str:
        """The column of the cost that says whether an answer to a harmful prompt of a suite is harmful."""
        return next(iter(self.costs)) if len(self.costs) == 1 else str(self.suites.harm)

    @property
    def compared_with(self) -> str:
        """Name of the reference."""
        return next(iter(self.policies)) if self.reference is None else self.reference

    @property
    def _given_prompts(self) -> list[tuple[str, object]]:
        """Options of prompts that are no suite's, with their values."""
        defaults: dict[str, object] = {"prompts": None, "prompts_split": "test", "prompts_fields": {}}
        return [(name, value) for name, other in defaults.items() if (value := getattr(self, name)) != other]

    def check(self) -> None:
        super().check()
        require(bool(self.policies), "policies", self.policies, f"at least one: --policy NAME=PATH; {_FIRST}")
        for name, path in self.policies.items():
            require(_NAME.fullmatch(name) is not None, "the policy name", name, "letters, digits and any of . _ + -")
            require(path != "", f"the path of policy {name!r}", path, "a Hugging Face folder or hub name")
        known = self.reference is None or self.reference in self.policies
        require(known, "reference", self.reference, f"the name of a policy: {', '.join(self.policies)}")
        require_at_least(
            1,
            {
                "prompts_limit": self.prompts_limit,
                "max_prompt_tokens": self.max_prompt_tokens,
                "samples_per_prompt": self.samples_per_prompt,
                "resamples": self.resamples,
                "scoring_tokens": self.scoring_tokens,
            },
        )
        check_fields("prompts_fields", self.prompts_fields)
        check_sampling("sampling", self.sampling)
        if self.reward == ScorerConfig():
            raise InputError(
                f"reward.path is '', expected what scores responses, as cost.path, or a --config; {_FIRST}"
            )
        check_scorer("reward", self.reward)
        check_costs(self.cost, self.constraints)
        alone = not self.constraints or self.threshold == 0
        require(alone, "threshold", self.threshold, "0 with constraints, which have one each")
        names = list(self.constraints or self.costs)
        check_suites(self.suites, names, self._given_prompts)
        measures = ["reward", *(["well_formed"] if self.well_formed is not None else []), *names]
        check_certify(self.certify, self.policies, self.compared_with, names, measures, bool(self.suites.sources))
        check_judge("judge", self.judge)
        require(self.cache_dir != "", "cache_dir", self.cache_dir, "a folder, or null")
        judged = self.judge.samples_per_prompt
        few = f"at most samples_per_prompt ({self.samples_per_prompt})"
        require(judged <= self.samples_per_prompt, "judge.samples_per_prompt", judged, few)
