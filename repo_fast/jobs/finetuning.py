"""Supervised fine-tuning: demonstrations -> packed micro-batches -> cross-entropy on their responses -> step."""

import math
from pathlib import Path

import torch

from repo_fast.collectives import Ranks
from repo_fast.config import SftConfig
from repo_fast.data import Columns, Dialogue, PromptTemplate, load_demonstrations
from repo_fast.jobs.assembly import load_policy, settle_policy
from repo_fast.jobs.inputs import check_inputs, check_start, find_model, tokenize_demonstrations
from repo_fast.jobs.supervised import SupervisedInputs, SupervisedRun
from repo_fast.jobs.training_prompts import held_out_notes, record_of
from repo_fast.learning.imitation import Shown, imitation_backward, imitation_loss, learned_tokens
from repo_fast.models.on_paper import check_positions
from repo_fast.models.policy import Policy, save_policy
from repo_fast.packing.balance import share_out
from repo_fast.report.panels import FINE_TUNING

_SHOWN = (
    ("loss", "loss", ".3f"),
    ("eval_loss", "held out", ".3f"),
    ("gradient_norm", "gradient", ".2f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)


def read_inputs(config: SftConfig) -> SupervisedInputs[Shown]:
    """Read and check all inputs of a run.

    Raises:
        InputError: The first thing that cannot be used.
    """
    resume_from = check_start(config)
    started_from = check_inputs(config, resume_from)
    path, tokenizer = find_model(config.model.path)
    data, template = config.data, PromptTemplate(tokenizer, config.data.template, config.date)
    notes: list[str] = []
    columns = Columns(data.fields)
    asked: dict[str, list[Dialogue]] = {}

    def read(option: str, source: str, split: str, limit: int | None = None) -> list[Shown]:
        demonstrations = load_demonstrations(source, split=split, limit=limit, columns=columns)
        asked[option] = [shown.asked for shown in demonstrations]
        return tokenize_demonstrations(
            demonstrations, template, data.max_tokens, data.train_on, source, notes, "data.max_tokens"
        )

    examples = read("data.train", data.train, data.train_split, data.limit)
    held_out = [] if data.eval is None else read("data.eval", data.eval, data.eval_split)
    columns.check_found([data.train, data.eval])
    longest = max(sum(part.numel() for part in shown) for shown in examples + held_out)
    check_positions(path, longest, f"a demonstration, below data.max_tokens ({data.max_tokens})")
    notes += held_out_notes(asked, "data.eval", data.eval)
    seen = record_of(config, asked, resume_from)
    return SupervisedInputs(path, tokenizer, template, examples, held_out, resume_from, notes, started_from, seen)


class FineTuning(SupervisedRun[Shown]):
    """A run of supervised fine-tuning.

    Args:
        config: The resolved configuration.
        inputs: What `read_inputs` made of it.
        ranks: This process among those of the run.
    """

    RESULT = "policy"

    def __init__(self, config: SftConfig, inputs: SupervisedInputs[Shown], ranks: Ranks) -> None:
        super().__init__(config, inputs, ranks, _SHOWN, FINE_TUNING)
        settle_policy("the policy", self.engine, config.model.attention, ranks)

    def load_model(self) -> Policy:
        return load_policy(
            self.inputs.model_path, self.inputs.tokenizer, self.config.model, self.config.engine, self.ranks
        )

    def transformer(self) -> torch.nn.Module:
        return self.engine.module.model

    def lengths(self, example: Shown) -> list[int]:
        return [sum(part.numel() for part in example)]

    def weight(self, example: Shown) -> int:
        """Response tokens: the loss is their mean."""
        return learned_tokens(example)

    def backward(self, rows: list[list[Shown]], scale: float) -> dict[str, float]:
        return {"loss": float(imitation_backward(self.engine, rows, scale, self.ranks.device, self.ops_backend))}

    def evaluate(self) -> dict[str, float]:
        """Cross-entropy (nats a response token) and perplexity of the held-out demonstrations."""
        mine = share_out(self.inputs.held_out, self.work, self.ranks)
        rows = [[mine[i] for i in row] for row in self.micro_batches(mine)]
        total = self.ranks.sum(imitation_loss(self.engine, rows, self.ranks.device, self.ops_backend))
        loss = float(total) / sum(self.weight(example) for example in self.inputs.held_out)
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}

    def write_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        save_policy(folder, self.engine.module, state, self.inputs.tokenizer, self.inputs.model_path)
