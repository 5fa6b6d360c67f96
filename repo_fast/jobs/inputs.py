"""Everything a run reads before it starts: checked here, while an error is still one line and nothing hangs.

No process group exists yet, no model is loaded and nothing is written, except that the embedded policy is made and
cached on its first use.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from repo_fast.config import (
    ONLY,
    REFUSED,
    SECOND_REWARD,
    CostConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    by_column,
    to_dict,
)
from repo_fast.data import (
    Columns,
    Demonstration,
    Dialogue,
    Prompt,
    PromptTemplate,
    load_demonstrations,
    load_prompts,
    load_tokenizer,
    tokenize_prompts,
)
from repo_fast.errors import InputError, at, first_line, readable
from repo_fast.jobs import checkpoint
from repo_fast.jobs.fingerprints import Fingerprint, check_unchanged, fingerprints
from repo_fast.jobs.training_prompts import Record, held_out_notes, record_of
from repo_fast.learning.imitation import Shown
from repo_fast.models.model_config import folder_of, load_config
from repo_fast.models.on_paper import check_positions
from repo_fast.models.policy import check_vocabulary
from repo_fast.models.score_checkpoint import find_output
from repo_fast.objective.constraints import applicable
from repo_fast.ops.dispatch import resolve
from repo_fast.report.best import constraint_of
from repo_fast.report.metrics import check_loggers
from repo_fast.rollout import Request
from repo_fast.rollout.hf import end_tokens, generation_settings
from repo_fast.scoring import FunctionScorer, Guard, ScorerSpec, function_texts, load_scorer_spec
from repo_fast.scoring.score_models import is_encoder, reads_tokens_of
from repo_fast.world import EMBEDDED

# Of the longest prompts, how many are looked at where looking at all would take long.
_LONGEST = 100


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    Attributes:
        policy_path: Folder or hub name of the policy; the embedded one resolved to its folder.
        tokenizer: The policy's.
        template: How prompts are put to the policy.
        requests: The training prompts with their tokens, in order of the source.
        eval_requests: The held-out prompts with theirs; empty without an evaluation.
        demonstrations: For the PTX loss; empty without one.
        scorers: Where the rewards and the costs come from, by the names of their columns.
        well_formed: The check of `evaluation.well_formed`; None without one.
        resume_from: Folder of the checkpoint to go on from; None for a new run.
        notes: What the user should know of the data: what was dropped, and how many.
        fingerprints: Of the files that the run reads, as `repo_fast.jobs.fingerprints` makes them.
        exempt, eval_exempt: By constraint, ids of the training prompts and of the held-out ones that it is not about.
        training_prompts: What the policy will have seen, as `repo_fast.jobs.training_prompts` has it.
    """

    policy_path: str
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    requests: list[Request]
    eval_requests: list[Request]
    demonstrations: list[Shown]
    scorers: dict[str, ScorerSpec]
    well_formed: FunctionScorer | None
    resume_from: Path | None
    notes: list[str]
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    exempt: dict[str, frozenset[int]] = field(default_factory=dict)
    eval_exempt: dict[str, frozenset[int]] = field(default_factory=dict)
    training_prompts: Record = ()

    @property
    def read(self) -> dict[str, Fingerprint]:
        """All that a rank reads, the texts of its scoring functions among it."""
        functions = {spec.path for spec in self.scorers.values() if spec.kind == "function"}
        functions |= set() if self.well_formed is None else {self.well_formed.path}
        return self.fingerprints | {f"the function {path}": function_texts(path) for path in functions}

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
    started_from = check_inputs(config, resume_from)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    scorers = scorer_specs(config.all_scorers)
    well_formed = None
    if config.evaluation.well_formed is not None:
        well_formed = FunctionScorer(config.evaluation.well_formed, "well-formed check")
    data = config.data
    columns = Columns(data.fields)
    keep = fields_kept(config.costs)
    prompts = load_prompts(data.prompts, split=data.prompts_split, columns=columns, keep=keep)
    held_out = []
    if data.eval_prompts is not None:
        held_out = load_prompts(
            data.eval_prompts, split=data.eval_split, limit=config.evaluation.prompts, columns=columns, keep=keep
        )
    policy_path, tokenizer = find_model(config.policy.path)
    # Its own copy: a pad token that the run adds to the policy's must not make it another tokenizer than the scorers'.
    ends = end_tokens(generation_settings(policy_path), tokenizer)
    template = PromptTemplate(copy.deepcopy(tokenizer), data.template, config.date, ends)

    def tokenized(prompts: list[Prompt], source: str) -> list[Request]:
        kept, dropped = tokenize_prompts(prompts, template, data.max_prompt_tokens, "data.max_prompt_tokens")
        if dropped:
            longer = f"longer than {data.max_prompt_tokens} tokens (data.max_prompt_tokens)"
            notes.append(f"{source}: {dropped} prompts dropped, {longer}")
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
    shown: list[Demonstration] = []
    demonstrations: list[Shown] = []
    if data.ptx is not None:
        shown = load_demonstrations(data.ptx, split=data.ptx_split, columns=columns)
        demonstrations = _demonstrations(config, shown, template, notes)
    columns.check_found([data.prompts, data.eval_prompts, data.ptx])
    read = {"data.prompts": prompts, "data.eval_prompts": held_out, "data.ptx": shown}
    dialogues = {option: [row.asked for row in rows] for option, rows in read.items()}
    notes += held_out_notes(dialogues, "data.eval_prompts", data.eval_prompts)
    seen = record_of(config, dialogues, resume_from)
    exempt = exempt_prompts(config.constraints, [request.prompt for request in requests], data.prompts, notes)
    held_out = [request.prompt for request in eval_requests]
    eval_exempt = exempt_prompts(config.constraints, held_out, str(data.eval_prompts), notes, some=False)
    for name, cost in config.costs.items():
        if cost.multiplier_init == "dual" and len(eval_exempt.get(name, ())) == len(held_out):
            raise InputError(
                f"{config.section_of(name)}.multiplier_init is 'dual', expected a number: none of the {len(held_out)} "
                f"prompts of {data.eval_prompts} is one that it is about"
            )
    about = None if config.checkpoint.keep_best is None else constraint_of(config.checkpoint.keep_best)
    if about is not None and len(eval_exempt[about]) == len(held_out):
        raise InputError(
            f"checkpoint.keep_best is {config.checkpoint.keep_best!r}, expected another measure: none of the "
            f"{len(held_out)} prompts of {data.eval_prompts} is one that constraint {about} is about"
        )
    if "exploitation" in config.evaluation.stop_on and len(held_out) < 2:
        raise InputError(
            f"evaluation.stop_on has 'exploitation' with {len(held_out)} prompt of {data.eval_prompts}, expected at "
            "least 2: a difference is told from noise by how much prompts differ"
        )
    parts = ((requests, exempt), (eval_requests, eval_exempt))
    asked = {
        name: [request.prompt for part, out in parts for request in part if request.prompt.id not in out.get(name, ())]
        for name in scorers
    }
    _check_lengths(config, policy_path, tokenizer, requests + eval_requests, demonstrations, scorers, asked)
    return Inputs(
        policy_path=policy_path,
        tokenizer=tokenizer,
        template=template,
        requests=requests,
        eval_requests=eval_requests,
        demonstrations=demonstrations,
        scorers=scorers,
        well_formed=well_formed,
        resume_from=resume_from,
        notes=notes,
        fingerprints=started_from,
        exempt=exempt,
        eval_exempt=eval_exempt,
        training_prompts=seen,
    )


def scorer_specs(scorers: Mapping[str, ScorerConfig]) -> dict[str, ScorerSpec]:
    """What the paths of scorers mean; functions are looked for.

    Args:
        scorers: By the names of their columns.

    Raises:
        InputError: A path means nothing, or there is no such function.
    """
    specs = {name: load_scorer_spec(scorer.path, scorer_name(name)) for name, scorer in scorers.items()}
    for name, spec in specs.items():
        if spec.kind == "function":
            FunctionScorer(spec.path, scorer_name(name))
    return specs


def scorer_name(column: str) -> str:
    """What messages call the scorer of a column: `reward`, `cost`, which of several costs, or what is asked beside."""
    if column == SECOND_REWARD:
        return "second reward"
    if column == REFUSED:
        return "refusal"
    return column if column in ("reward", ONLY) else f"{column} cost"


def fields_kept(costs: Mapping[str, CostConfig]) -> set[str]:
    """The columns of prompts that say what they are."""
    return {column for cost in costs.values() for column in cost.applies_to}


def exempt_prompts(
    constraints: Mapping[str, CostConfig],
    prompts: Sequence[Prompt],
    source: str,
    notes: list[str],
    *,
    some: bool = True,
) -> dict[str, frozenset[int]]:
    """The prompts that each constraint is not about: their ids, by the name of its column.

    Args:
        constraints: As they are written, by name.
        prompts: With the fields that `fields_kept` names.
        source: Where they are from, for messages.
        notes: For the user, added to.
        some: Whether each has to be about some prompt.

    Raises:
        InputError: As for `objective.constraints.applicable`.
    """
    exempt = {}
    for column, (name, cost) in zip(by_column(constraints), constraints.items(), strict=True):
        found = applicable(
            name,
            cost.applies_to,
            [prompt.fields for prompt in prompts],
            missing=cost.applies_to_missing,
            places=[prompt.place for prompt in prompts],
            some=some,
        ).tolist()
        exempt[column] = frozenset(prompt.id for prompt, applies in zip(prompts, found, strict=True) if not applies)
        if exempt[column]:
            notes.append(f"{source}: constraint {name} is about {sum(found)} of {len(found)} prompts")
    return exempt


def _check_lengths(
    config: TrainConfig,
    policy_path: str,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    demonstrations: Sequence[Shown],
    scorers: dict[str, ScorerSpec],
    asked: dict[str, list[Prompt]],
) -> None:
    """Raise `InputError` where a model has no positions for the longest sequence that it could be given."""
    drawn = max(request.tokens.numel() for request in requests) + config.rollout.max_new_tokens
    check_positions(policy_path, drawn, f"a prompt and rollout.max_new_tokens ({config.rollout.max_new_tokens})")
    learned = max((sum(part.numel() for part in shown) for shown in demonstrations), default=0)
    check_positions(policy_path, learned, f"a demonstration of data.ptx {config.data.ptx!r}")
    for name, spec in scorers.items():
        section = config.section_of(name)
        check_scorer_inputs(section, spec, config.all_scorers[name], drawn, asked[name], config.date)
        starts_critic = spec.kind == "model" and not is_encoder(spec.path)
        starts_critic &= any(streams[0] == name for streams in config.critic_streams)
        if starts_critic and reads_tokens_of(load_tokenizer(spec.path), tokenizer):
            check_positions(spec.path, drawn, f"a prompt and its response, for the critic from {section}.path")


def check_scorer_inputs(
    name: str, spec: ScorerSpec, settings: ScorerConfig, drawn: int, prompts: Sequence[Prompt], date: str | None
) -> None:
    """Raise `InputError` where a score model has no such head, or could not be given what will be drawn.

    Args:
        name: The scorer's section, for messages.
        spec, settings: The scorer; nothing is checked of a function, and of an encoder its head alone: it cuts its
            texts to what it can read, and has no template. A guard cuts them too.
        drawn: The longest prompt with its response (tokens).
        prompts: That it will be given.
        date: Of the run.
    """
    if spec.kind == "guard":
        guard = Guard(load_tokenizer(spec.path, must_end=False), settings.guard, name, date)
        # Of one turn only those that may be too long: encoding all would take longer than the rest.
        longest = {id(prompt) for prompt in sorted(prompts, key=lambda prompt: -len(prompt.text))[:_LONGEST]}
        for prompt in prompts:
            if prompt.dialogue is not None or id(prompt) in longest:
                with at(prompt.place):
                    guard.check_room(prompt.asked, settings.max_tokens)
        return
    if spec.kind != "model":
        return
    find_output(spec.path, settings.head, f"{name}.head")
    if is_encoder(spec.path):
        return
    check_positions(spec.path, min(settings.max_tokens, drawn), f"a prompt and its response, cut to {name}.max_tokens")
    template = PromptTemplate(load_tokenizer(spec.path), settings.template, date)
    for prompt in prompts:
        # Whether it has a place for them, not how they read: that is told by the shape.
        if prompt.dialogue is not None:
            with at(prompt.place):
                template.render(prompt.asked)


def check_start(config: RunConfig) -> Path | None:
    """Check what every job needs before it starts: where it writes, what it resumes, loggers, the ops' backend.

    Returns:
        The checkpoint folder to go on from; None for a new run.

    Raises:
        InputError: One of them cannot be.
    """
    output_dir = Path(config.output_dir)
    with readable(output_dir):
        resume_from = checkpoint.find_resume(config.resume, output_dir)
        checkpoint.check_output_folder(config.resume, output_dir)
    if resume_from is not None:
        checkpoint.check_run(resume_from, checkpoint.read_run(resume_from), to_dict(config))
    check_loggers(config.log.loggers)
    backend, device = config.engine.ops_backend, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve("fused_rectified_policy_loss", backend, device)
    except ValueError as error:
        raise InputError(f"engine.ops_backend is {backend!r}: {first_line(error)}") from error
    return resume_from


def check_inputs(config: RunConfig, resume_from: Path | None) -> dict[str, Fingerprint]:
    """Fingerprint what a run reads, and compare it with what the run of a checkpoint started from.

    Raises:
        InputError: A file, or a folder's or hub name's content, is not what it was.
    """
    now = fingerprints(config)
    if resume_from is not None:
        check_unchanged(resume_from, checkpoint.read_run(resume_from), config, now)
    return now


def find_model(path: str) -> tuple[str, PreTrainedTokenizerBase]:
    """The folder or hub name of a causal language model, and its tokenizer; the embedded ones are made on first use.

    Raises:
        InputError: There is no model with a tokenizer that fits it.
    """
    if path in EMBEDDED:
        from repo_fast.world.policy import embedded_folder

        path = str(embedded_folder(path))
    # As for scorers, `~` is the user's own folder.
    path = str(folder_of(path) or path)
    vocabulary = load_config(path).vocab_size
    tokenizer = load_tokenizer(path)
    check_vocabulary(path, vocabulary, tokenizer)
    return path, tokenizer


def tokenize_demonstrations(
    demonstrations: Sequence[Demonstration],
    template: PromptTemplate,
    max_tokens: int,
    train_on: Literal["last", "all"],
    source: str,
    notes: list[str],
    option: str,
) -> list[Shown]:
    """Tokenise demonstrations.

    Each answer to be imitated follows exactly the tokens that the policy would be given as its prompt. The answers of a
    chat are one example where the template writes what came before as it was generated, which most do; an answer that
    it writes otherwise once the chat goes on (without its end token, say, or without its reasoning) is an example of
    its own.

    Args:
        demonstrations: At least one.
        template: How prompts are put to the policy.
        max_tokens: The longest prompt and answer together to keep; longer ones are dropped, and a note says how many.
        train_on: Whether each chat's last answer is imitated, or all that are not part of its prompt.
        source: Where they are from, for messages.
        notes: For the user, added to.
        option: What sets `max_tokens`, for messages.

    Raises:
        InputError: No demonstration fits, or the template cannot render one.
    """
    examples: list[Shown] = []
    dropped = cut = parted = answers = 0
    for shown in demonstrations:
        with at(shown.place):
            said = _answers(shown, template, train_on)
        fitting = [pair for pair in said if len(pair[0]) + len(pair[1]) <= max_tokens]
        made = _together(fitting)
        dropped, cut = dropped + (not fitting), cut + (len(said) - len(fitting) if fitting else 0)
        parted, answers = parted + (len(made) > 1), answers + len(fitting)
        examples += made
    longer = f"longer than {max_tokens} tokens ({option})"
    if not examples:
        raise InputError(f"{source}: all {len(demonstrations)} demonstrations are {longer}")
    if dropped:
        notes.append(f"{source}: {dropped} demonstrations dropped, {longer}")
    if cut:
        notes.append(f"{source}: {cut} last answers of other chats dropped, {longer}")
    if answers > len(demonstrations) - dropped:
        kept = len(demonstrations) - dropped
        notes.append(f"{source}: {answers} answers of {kept} demonstrations are learned, in {len(examples)} examples")
    if parted:
        notes.append(
            f"{source}: {parted} chats are several examples: the template writes an answer otherwise once it goes on"
        )
    return examples


def _answers(
    shown: Demonstration, template: PromptTemplate, train_on: Literal["last", "all"]
) -> list[tuple[list[int], list[int]]]:
    """The answers to be imitated, in turn: the tokens before each, and its own."""
    turns = (*shown.asked.turns, shown.response)
    first = len(turns) - 1 if train_on == "last" else shown.given | 1
    return [
        (template.encode_prompt(Dialogue(turns[:i], shown.system)), template.encode_response(turns[i]))
        for i in range(first, len(turns), 2)
    ]


def _together(answers: Sequence[tuple[list[int], list[int]]]) -> list[Shown]:
    """The answers of a chat in as few sequences as hold each of them behind its own tokens."""
    sequences: list[tuple[list[int], list[int]]] = []
    for before, answer in reversed(answers):
        own, start, end = before + answer, len(before), len(before) + len(answer)
        for tokens, cuts in sequences:
            if tokens[:end] == own and end <= cuts[0]:
                cuts[:0] = [start, end]
                break
        else:
            sequences.append((own, [start]))
    return [tuple(torch.tensor(tokens).tensor_split(cuts)) for tokens, cuts in reversed(sequences)]


def _demonstrations(
    config: TrainConfig, shown: Sequence[Demonstration], template: PromptTemplate, notes: list[str]
) -> list[Shown]:
    data = config.data
    kept = tokenize_demonstrations(
        shown, template, data.ptx_max_tokens, data.train_on, str(data.ptx), notes, "data.ptx_max_tokens"
    )
    if len(kept) < config.update.ptx_batch_size:
        raise InputError(
            f"data.ptx {data.ptx!r} has {len(kept)} demonstrations of at most {data.ptx_max_tokens} tokens, expected "
            f"at least update.ptx_batch_size ({config.update.ptx_batch_size})"
        )
    return kept
