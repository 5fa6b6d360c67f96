"""Training of score models: preferences -> packed micro-batches -> scores at the last tokens -> loss -> step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import ScoreConfig, to_dict
from repo_fast.data import Candidate, Columns, Dialogue, HeadTarget, Preference, PromptTemplate, load_preferences
from repo_fast.data.heads import check_both
from repo_fast.errors import InputError, at
from repo_fast.jobs.assembly import check_heads_of, is_score_model, load_trained_score_model, settle_scores
from repo_fast.jobs.inputs import check_inputs, check_start, find_model
from repo_fast.jobs.supervised import SupervisedInputs, SupervisedRun
from repo_fast.jobs.training_prompts import held_out_notes, record_of
from repo_fast.models.adapters import Base, is_adapter
from repo_fast.models.on_paper import check_positions
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.score_writing import check_layout, save_score_model
from repo_fast.objective.preference import PreferenceLoss, mean_over_heads, preference_loss
from repo_fast.packing.balance import share_out
from repo_fast.packing.rows import pack_whole, with_last
from repo_fast.report.panels import SCORES
from repo_fast.report.preferences import ScoredPreferences, measures_by_head, plot_scores, write_scored
from repo_fast.scoring import check_expected_score, score_text

_SHOWN = (
    ("loss", "loss", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("ranking_accuracy", "held out", ".3f"),
    ("safety_accuracy", "safe/unsafe", ".3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)


@dataclass(frozen=True)
class TokenizedPreference:
    """A preference as the model reads it.

    Attributes:
        sequences: One or two int64 CPU tensors, prompt and response together, never padded; as in `Preference`, the
            one that is to score higher first.
        targets: What each head learns from them; one of a model with one output.
    """

    sequences: tuple[torch.Tensor, ...]
    targets: tuple[HeadTarget, ...]


def read_inputs(config: ScoreConfig) -> SupervisedInputs[TokenizedPreference]:
    """Read and check all inputs of a run.

    Raises:
        InputError: The first thing that cannot be used.
    """
    resume_from = check_start(config)
    started_from = check_inputs(config, resume_from)
    path, tokenizer = find_model(config.model.path)
    if config.model.lora.rank and is_adapter(path):
        raise InputError(
            f"model.lora.rank is {config.model.lora.rank} with model.path {path!r}, which holds adapters: new ones "
            "need a base with weights of its own, expected the folder of the merged model"
        )
    if is_score_model(path):
        check_heads_of(path, config.heads)
    elif config.expect is not None:
        raise InputError(f"expect is given with model.path {path!r}, which has no score yet, expected a score model")
    data, template = config.data, PromptTemplate(tokenizer, config.data.template, config.date)
    notes: list[str] = []
    columns = Columns(data.fields)
    asked: dict[str, list[Dialogue]] = {}

    def read(option: str, source: str, split: str, limit: int | None = None) -> list[TokenizedPreference]:
        preferences, said = load_preferences(
            source,
            config.kind,
            split=split,
            unusable=data.unusable,
            limit=limit,
            columns=columns,
            heads=config.heads,
        )
        notes.extend(said)
        asked[option] = [candidate.asked for preference in preferences for candidate in preference.candidates]
        return _tokenize(preferences, template, data.max_tokens, source, notes)

    examples = read("data.train", data.train, data.train_split, data.limit)
    if config.heads:
        check_both(data.train, [example.targets for example in examples], config.heads)
    held_out = [] if data.eval is None else read("data.eval", data.eval, data.eval_split)
    columns.check_found([data.train, data.eval])
    longest = max(sequence.numel() for example in examples + held_out for sequence in example.sequences)
    check_positions(path, longest, f"a prompt and its response, cut to data.max_tokens ({data.max_tokens})")
    notes += held_out_notes(asked, "data.eval", data.eval)
    seen = record_of(config, asked, resume_from)
    return SupervisedInputs(path, tokenizer, template, examples, held_out, resume_from, notes, started_from, seen)


def _tokenize(
    preferences: Sequence[Preference], template: PromptTemplate, max_tokens: int, source: str, notes: list[str]
) -> list[TokenizedPreference]:
    """Sequences above the limit lose their beginning, as where they are scored, and are counted."""
    truncated = 0

    def sequence(candidate: Candidate) -> torch.Tensor:
        nonlocal truncated
        with at(candidate.place):
            tokens = template.encode_dialogue(candidate.asked, candidate.response)
        truncated += len(tokens) > max_tokens
        return torch.tensor(tokens[-max_tokens:])

    label = {None: 0.0, True: 1.0, False: -1.0}
    tokenized = [
        TokenizedPreference(
            tuple(sequence(candidate) for candidate in preference.candidates),
            preference.targets or (HeadTarget(tuple(label[candidate.unsafe] for candidate in preference.candidates)),),
        )
        for preference in preferences
    ]
    if truncated:
        longer = f"longer than {max_tokens} tokens (data.max_tokens)"
        notes.append(f"{source}: {truncated} sequences lost their beginning, {longer}")
    return tokenized


class ScoreTraining(SupervisedRun[TokenizedPreference]):
    """A run that trains a reward or cost model.

    Args:
        config: The resolved configuration.
        inputs: What `read_inputs` made of it.
        ranks: This process among those of the run.
    """

    RESULT = "model"

    config: ScoreConfig

    def __init__(self, config: ScoreConfig, inputs: SupervisedInputs[TokenizedPreference], ranks: Ranks) -> None:
        super().__init__(config, inputs, ranks, _SHOWN, SCORES)
        settle_scores("the model", self.engine, self.engine.module.score_head, config.model.attention, ranks)
        if config.expect is not None and inputs.resume_from is None:
            text, expected = config.expect
            check_expected_score(self._score_of, text, expected, config.kind)

    def _score_of(self, text: str) -> float:
        return score_text(self.engine, self.inputs.tokenizer, text, self.ranks.device)

    def load_model(self) -> ScoreModel:
        config, inputs, kind = self.config, self.inputs, self.config.kind
        # As it is read: until the model is written, its folder may change.
        self._base = Base.of(inputs.model_path) if config.model.lora.rank else None
        model = load_trained_score_model(
            inputs.model_path, kind, inputs.tokenizer, config.model, config.engine, self.ranks, tuple(config.heads)
        )
        check_layout(inputs.model_path, model, score_type=kind, layout=config.layout)
        return model

    def transformer(self) -> torch.nn.Module:
        return self.engine.module.trunk

    def lengths(self, example: TokenizedPreference) -> list[int]:
        return [sequence.numel() for sequence in example.sequences]

    def weight(self, example: TokenizedPreference) -> int:
        """The loss is the mean over examples."""
        return 1

    def backward(self, rows: list[list[TokenizedPreference]], scale: float) -> dict[str, float]:
        sums = torch.zeros(5, dtype=torch.float64)
        for row, last in with_last(rows):
            scores = self._scores(row)
            loss = self._loss(scores, row)
            self.engine.backward(loss.loss * scale, last=last)
            sums += torch.stack([*(part.detach().double().cpu() for part in loss), _right(scores.detach(), row)])
        names = ("loss", "ranking_loss", "sign_loss", "squared_score", "accuracy")
        return dict(zip(names, sums.tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Ranking and safety accuracy, calibration and loss; the scores go to `eval_scores.jsonl` and the plots."""
        held_out = self.inputs.held_out
        mine = share_out(range(len(held_out)), lambda index: self.work(held_out[index]), self.ranks)
        loss, parts = torch.zeros((), dtype=torch.float64), []
        for row in self.micro_batches([held_out[i] for i in mine]):
            examples = [held_out[mine[i]] for i in row]
            scores = self._scores(examples)
            loss += self._loss(scores, examples).loss.double().cpu()
            for i, part in zip(row, _by_example(scores, examples), strict=True):
                parts.append((mine[i], part.T.tolist()))
        everyone = sorted(self.ranks.gather_list(parts))
        if not all(math.isfinite(score) for _, heads in everyone for own in heads for score in own):
            raise InputError(f"step {self.step}: a held-out score is not finite, expected numbers")
        rows = {
            # One without a name of its own is the model's.
            name: [{"example": i, "scores": heads[k], **vars(held_out[i].targets[k])} for i, heads in everyone]
            for k, name in enumerate(self.config.heads or [""])
        }
        scored = {name: ScoredPreferences.of(own) for name, own in rows.items()}
        with self.ranks.together("writing the held-out scores"):
            if self.ranks.is_first:
                write_scored(self.output_dir / "eval_scores.jsonl", rows, self.step)
                for name, own in scored.items():
                    plot_scores(own, self.config.kind, self.output_dir / "plots" / name)
        return {"eval_loss": float(self.ranks.sum(loss)) / len(held_out), **measures_by_head(scored)}

    def write_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        save_score_model(
            folder,
            self.engine.module,
            state,
            self.inputs.tokenizer,
            score_type=self.config.kind,
            layout=self.config.layout,
            heads=to_dict(self.config)["heads"],
            base=self._base,
        )

    def _scores(self, row: Sequence[TokenizedPreference]) -> torch.Tensor:
        """The scores of a micro-batch's responses, one after the other, of K heads: float32 [S, K]; of one token if it
        is empty."""
        sequences = [sequence for example in row for sequence in example.sequences] or [torch.zeros(1).long()]
        return self.engine(*pack_whole(sequences, self.ranks.device)).reshape(len(sequences), -1)

    def _loss(self, scores: torch.Tensor, row: Sequence[TokenizedPreference]) -> PreferenceLoss:
        settings, device = self.config.loss, scores.device
        counts = torch.tensor([len(example.sequences) for example in row], dtype=torch.int64)
        ids = torch.arange(len(row)).repeat_interleave(counts).to(device)

        def loss_of(head: int) -> PreferenceLoss:
            targets = [example.targets[head] for example in row]
            labels = torch.tensor([label for target in targets for label in target.labels])
            orders = torch.tensor([target.order for target in targets if len(target.labels) == 2])
            # An empty row has a score that counts for nothing, and keeps the graph.
            return preference_loss(
                scores[: labels.numel(), head],
                ids,
                labels.to(device),
                orders.to(device) if self.config.heads else None,
                margin=settings.margin,
                label_smoothing=settings.label_smoothing,
                regularization=settings.regularization,
            )

        return mean_over_heads([loss_of(head) for head in range(scores.shape[1])])


def _by_example(scores: torch.Tensor, row: Sequence[TokenizedPreference]) -> Sequence[torch.Tensor]:
    """A micro-batch's scores, CPU, by example: [1 or 2, K] each."""
    return scores.cpu().split([len(example.sequences) for example in row]) if row else ()


def _right(scores: torch.Tensor, row: Sequence[TokenizedPreference]) -> torch.Tensor:
    """How many of a micro-batch's examples are right: pairs in their order, what has none on its side of 0; of several
    heads the mean."""
    right = [
        _is_right(part[:, head], target)
        for part, example in zip(_by_example(scores, row), row, strict=True)
        for head, target in enumerate(example.targets)
    ]
    return torch.tensor(sum(right) / scores.shape[1], dtype=torch.float64)


def _is_right(scores: torch.Tensor, target: HeadTarget) -> bool:
    if len(scores) == 2 and target.order:
        return bool(target.order * (scores[0] - scores[1]) > 0)
    return all(bool(score > 0) == (label > 0) for score, label in zip(scores, target.labels, strict=True))
