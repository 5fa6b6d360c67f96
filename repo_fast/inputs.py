"""Everything a run reads before it starts: checked here, while an error is still one line and nothing hangs.

No process group exists yet, no model is loaded and nothing is written, except that the embedded policy is made and
cached on its first use.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from repo_fast import checkpoint
from repo_fast.config import RunConfig, TrainConfig, to_dict
from repo_fast.data import (
    Prompt,
    PromptTemplate,
    load_demonstrations,
    load_prompts,
    load_tokenizer,
    tokenize_prompts,
)
from repo_fast.errors import InputError, first_line
from repo_fast.imitation import TokenPair
from repo_fast.models.model_config import load_config
from repo_fast.models.on_paper import check_positions
from repo_fast.models.policy import check_vocabulary
from repo_fast.ops.dispatch import resolve
from repo_fast.report.metrics import check_loggers
from repo_fast.rollout import Request
from repo_fast.scoring import FunctionScorer, ScorerSpec, load_scorer_spec
from repo_fast.scoring.score_models import is_encoder, same_tokens


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    Attributes:
        policy_path: Folder or hub name of the policy; the embedded one resolved to its folder.
        tokenizer: The policy's.
        template: How prompts are put to the policy.
        requests: The training prompts with their tokens, in order of the source.
        eval_requests: The held-out prompts with theirs; empty without an evaluation.
        demonstrations: Prompt and response tokens (int64, CPU) for the PTX loss; empty without one.
        reward, cost: Where the scores come from.
        well_formed: The check of `evaluation.well_formed`; None without one.
        resume_from: Folder of the checkpoint to go on from; None for a new run.
        notes: What the user should know of the data: what was dropped, and how many.
    """

    policy_path: str
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    requests: list[Request]
    eval_requests: list[Request]
    demonstrations: list[TokenPair]
    reward: ScorerSpec
    cost: ScorerSpec
    well_formed: FunctionScorer | None
    resume_from: Path | None
    notes: list[str]

    @property
    def categories(self) -> dict[int, str | None]:
        """The category of each held-out prompt, by its id."""
        return {request.prompt.id: request.prompt.category for request in self.eval_requests}


def read_inputs(config: TrainConfig) -> Inputs:
    """Read and check all inputs of a run.

    Raises:
        InputError: The first thing that cannot be used.
    """
    notes: list[str] = []
    resume_from = check_start(config)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    reward, cost = load_scorer_spec(config.reward.path, "reward"), load_scorer_spec(config.cost.path, "cost")
    for name, spec in (("reward", reward), ("cost", cost)):
        if spec.kind == "function":
            FunctionScorer(spec.path, name)
    well_formed = None
    if config.evaluation.well_formed is not None:
        well_formed = FunctionScorer(config.evaluation.well_formed, "well-formed check")
    data = config.data
    prompts = load_prompts(data.prompts, split=data.prompts_split)
    held_out = []
    if data.eval_prompts is not None:
        held_out = load_prompts(data.eval_prompts, split=data.eval_split, limit=config.evaluation.prompts)
    policy_path, tokenizer = find_model(config.policy.path)
    # Its own copy: a pad token that the run adds to the policy's must not make it another tokenizer than the scorers'.
    template = PromptTemplate(copy.deepcopy(tokenizer), data.template)

    def tokenized(prompts: list[Prompt], source: str) -> list[Request]:
        kept, dropped = tokenize_prompts(prompts, template, data.max_prompt_tokens)
        if dropped:
            notes.append(f"{source}: {dropped} prompts dropped, longer than {data.max_prompt_tokens} tokens")
        return [Request(prompt, torch.tensor(tokens)) for prompt, tokens in kept]

    requests = tokenized(prompts, data.prompts)
    if config.rollout.prompts_per_step > len(requests):
        raise InputError(
            f"rollout.prompts_per_step is {config.rollout.prompts_per_step}, expected at most the {len(requests)} "
            f"prompts of {data.prompts}"
        )
    responses = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    if config.update.minibatches > responses // ranks:
        raise InputError(
            f"update.minibatches is {config.update.minibatches}, expected at most the {responses // ranks} responses "
            f"that each of {ranks} ranks has in a step"
        )
    eval_requests = tokenized(held_out, str(data.eval_prompts)) if held_out else []
    demonstrations = _demonstrations(config, template, notes) if data.ptx is not None else []
    drawn = max(request.tokens.numel() for request in requests + eval_requests) + config.rollout.max_new_tokens
    shown = max((prompt.numel() + response.numel() for prompt, response in demonstrations), default=0)
    check_positions(policy_path, drawn, f"a prompt and rollout.max_new_tokens ({config.rollout.max_new_tokens})")
    check_positions(policy_path, shown, f"a demonstration of data.ptx {data.ptx!r}")
    for name, spec, settings in (("reward", reward, config.reward), ("cost", cost, config.cost)):
        # An encoder cuts its texts to what it can read, and counts them.
        if spec.kind == "model" and not is_encoder(spec.path):
            longest = min(settings.max_tokens, drawn)
            check_positions(spec.path, longest, f"a prompt and its response, cut to {name}.max_tokens")
            if config.algorithm.advantage == "gae" and same_tokens(load_tokenizer(spec.path), tokenizer):
                check_positions(spec.path, drawn, f"a prompt and its response, for the critic from {name}.path")
    return Inputs(
        policy_path=policy_path,
        tokenizer=tokenizer,
        template=template,
        requests=requests,
        eval_requests=eval_requests,
        demonstrations=demonstrations,
        reward=reward,
        cost=cost,
        well_formed=well_formed,
        resume_from=resume_from,
        notes=notes,
    )


def check_start(config: RunConfig) -> Path | None:
    """Check what every job needs before it starts: where it writes, what it resumes, loggers, the ops' backend.

    Returns:
        The checkpoint folder to go on from; None for a new run.

    Raises:
        InputError: One of them cannot be.
    """
    output_dir = Path(config.output_dir)
    resume_from = checkpoint.find_resume(config.resume, output_dir)
    checkpoint.check_output_folder(config.resume, output_dir)
    if resume_from is not None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        checkpoint.check_run(resume_from, checkpoint.read_run(resume_from), to_dict(config), ranks)
    check_loggers(config.log.loggers)
    backend, device = config.engine.ops_backend, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve("fused_rectified_policy_loss", backend, device)
    except ValueError as error:
        raise InputError(f"engine.ops_backend is {backend!r}: {first_line(error)}") from error
    return resume_from


def find_model(path: str) -> tuple[str, PreTrainedTokenizerBase]:
    """The folder or hub name of a causal language model, and its tokenizer; the embedded ones are made on first use.

    Raises:
        InputError: There is no model with a tokenizer that fits it.
    """
    if path in ("world:tiny", "world:base"):
        from repo_fast.world.policy import base_policy, tiny_policy

        path = str(tiny_policy() if path == "world:tiny" else base_policy())
    tokenizer = load_tokenizer(path)
    check_vocabulary(path, load_config(path).vocab_size, tokenizer)
    return path, tokenizer


def tokenize_demonstrations(
    source: str,
    split: str,
    template: PromptTemplate,
    max_tokens: int,
    notes: list[str],
    limit: int | None = None,
) -> list[TokenPair]:
    """Read demonstrations and tokenise them; longer ones are dropped, and a note says how many.

    Raises:
        InputError: The source cannot be read, or no demonstration fits.
    """
    pairs = [
        (torch.tensor(template.encode_prompt(shown.prompt)), torch.tensor(template.encode_response(shown.response)))
        for shown in load_demonstrations(source, split=split, limit=limit)
    ]
    kept = [pair for pair in pairs if pair[0].numel() + pair[1].numel() <= max_tokens]
    if not kept:
        raise InputError(f"{source}: all {len(pairs)} demonstrations are longer than {max_tokens} tokens")
    if len(kept) < len(pairs):
        notes.append(f"{source}: {len(pairs) - len(kept)} demonstrations dropped, longer than {max_tokens} tokens")
    return kept


def _demonstrations(config: TrainConfig, template: PromptTemplate, notes: list[str]) -> list[TokenPair]:
    data = config.data
    kept = tokenize_demonstrations(str(data.ptx), data.ptx_split, template, data.ptx_max_tokens, notes)
    if len(kept) < config.update.ptx_batch_size:
        raise InputError(
            f"data.ptx {data.ptx!r} has {len(kept)} demonstrations of at most {data.ptx_max_tokens} tokens, expected "
            f"at least update.ptx_batch_size ({config.update.ptx_batch_size})"
        )
    return kept
