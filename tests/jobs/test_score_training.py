"""One update of a score model against a naive float64 one."""

from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file
from transformers import LlamaModel

from repo_fast.config import EngineConfig, OptimizerConfig, ScoreConfig
from repo_fast.config.score import PreferenceLossConfig
from repo_fast.config.supervised import ModelConfig
from repo_fast.data import HeadTarget, load_tokenizer
from repo_fast.engine import start_distributed
from repo_fast.jobs.score_training import ScoreTraining, TokenizedPreference
from repo_fast.jobs.supervised import SupervisedInputs
from tests.learning.learner_worker import plain_descent
from tests.tiny import save_beaver

# Uneven lengths; a pair with labels, one without, one with one label, and labelled responses by themselves.
EXAMPLES = [
    TokenizedPreference((torch.tensor([1, 12, 13, 14, 2]), torch.tensor([1, 12, 15, 2])), (HeadTarget((1.0, -1.0)),)),
    TokenizedPreference((torch.tensor([1, 9, 9, 2]),), (HeadTarget((-1.0,)),)),
    TokenizedPreference(
        (torch.tensor([1, 16, 17, 18, 19, 20, 2]), torch.tensor([1, 16, 21])), (HeadTarget((0.0, 0.0)),)
    ),
    TokenizedPreference((torch.tensor([7]),), (HeadTarget((1.0,)),)),
    TokenizedPreference((torch.tensor([1, 14, 2]), torch.tensor([1, 14, 13, 12, 2, 22, 2])), (HeadTarget((0.0, 1.0)),)),
]
LOSS = PreferenceLossConfig(regularization=0.05, margin=0.3, label_smoothing=0.1)


@pytest.fixture(scope="module")
def cost_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost model with random weights."""
    return save_beaver(tmp_path_factory.mktemp("cost_model") / "model", config_overrides={"score_type": "cost"})


def make_run(cost_model: Path, output_dir: Path, micro_batch_tokens: int) -> ScoreTraining:
    """A run on `EXAMPLES`, all of them in a step of plain descent."""
    config = ScoreConfig(
        output_dir=str(output_dir),
        kind="cost",
        model=ModelConfig(path=str(cost_model)),
        batch_size=len(EXAMPLES),
        micro_batch_tokens=micro_batch_tokens,
        loss=LOSS,
        optimizer=OptimizerConfig(gradient_clip=0.0),
        engine=EngineConfig(dtype="float32", zero_stage=3, parameter_persistence_threshold=0),
    )
    inputs = SupervisedInputs(
        str(cost_model),
        load_tokenizer(str(cost_model)),
        None,
        EXAMPLES,
        [],
        None,
        [],  # type: ignore[arg-type]
    )
    with plain_descent(0.1):
        return ScoreTraining(config, inputs, start_distributed())


def gradients(run: ScoreTraining) -> dict[str, torch.Tensor]:
    return {name: safe_get_full_grad(parameter).double() for name, parameter in run.engine.module.named_parameters()}


@pytest.fixture(scope="module")
def naive(cost_model: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the mean over examples: float64, a sequence at a time, the formulas written out."""
    trunk = LlamaModel.from_pretrained(cost_model, dtype=torch.float64)
    head = load_file(cost_model / "model.safetensors")["score_head.weight"][0].double().requires_grad_()

    def nll(x: torch.Tensor) -> torch.Tensor:
        right, wrong = -torch.log(1 / (1 + torch.exp(-x))), -torch.log(1 / (1 + torch.exp(x)))
        return (1 - LOSS.label_smoothing) * right + LOSS.label_smoothing * wrong

    total = torch.zeros((), dtype=torch.float64)
    for example in EXAMPLES:
        scores = [trunk(sequence[None]).last_hidden_state[0, -1] @ head for sequence in example.sequences]
        if len(scores) == 2:
            total = total + nll(scores[0] - scores[1] - LOSS.margin)
        for score, label in zip(scores, example.targets[0].labels, strict=True):
            if label:
                total = total + nll(label * score)
            total = total + LOSS.regularization * score**2 / len(scores)
    loss = total / len(EXAMPLES)
    loss.backward()
    expected = {f"trunk.{name}": parameter.grad for name, parameter in trunk.named_parameters()}
    return loss.item(), expected | {"score_head.weight": head.grad[None]}


def norm_wise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    difference = sum((actual[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(tensor.square().sum() for tensor in expected.values())).sqrt())


@pytest.mark.parametrize("micro_batch_tokens", [4096, 20, 1])
def test_an_update_equals_a_naive_float64_one(
    cost_model: Path, naive: tuple[float, dict[str, torch.Tensor]], tmp_path: Path, micro_batch_tokens: int
) -> None:
    """Whatever the micro-batches: one, several, one for each example."""
    run = make_run(cost_model, tmp_path / "run", micro_batch_tokens)
    assert len(run.micro_batches(EXAMPLES)) == {4096: 1, 20: 2, 1: 5}[micro_batch_tokens]
    loss, expected = naive
    seen: dict[str, torch.Tensor] = {}
    step = run.engine.step
    run.engine.step = lambda: seen.update(gradients(run)) or step()  # type: ignore[method-assign]
    result = run.update(EXAMPLES)
    assert norm_wise(seen, expected) <= 1e-5
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["tokens"] == sum(len(sequence) for example in EXAMPLES for sequence in example.sequences)


def test_an_empty_micro_batch_changes_nothing(cost_model: Path, tmp_path: Path) -> None:
    """What a rank runs while the others have more: forward and backward, and no gradient."""
    found = []
    for rows in ([EXAMPLES], [[], EXAMPLES], [EXAMPLES, []]):
        run = make_run(cost_model, tmp_path / "run", 4096)
        found.append((run.backward(rows, 0.2), gradients(run)))
    for sums, slopes in found[1:]:
        assert sums == found[0][0]
        assert norm_wise(slopes, found[0][1]) == 0
