"""LoRA in every entry point: what is trained, what the reference is, what is saved, and that all of it resumes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from repo_fast import evaluate, score
from repo_fast.config import CriticConfig, LoraConfig, parse
from repo_fast.data import PromptTemplate
from repo_fast.engine import Engine, start_distributed, stop_distributed
from repo_fast.jobs import assembly
from repo_fast.jobs.inputs import read_inputs
from repo_fast.jobs.trainer import Trainer
from repo_fast.jobs.training_prompts import read_record
from repo_fast.models.attention import PACKED
from repo_fast.models.policy import Policy
from repo_fast.models.score_model import ScoreModel
from repo_fast.plan.networks import networks
from repo_fast.rollout.seeds import Purpose
from repo_fast.scoring.expectation import score_text
from tests.job_runs import Job, engines, metrics, same_bits, states, weights
from tests.learning import learner_worker
from tests.learning.learner_worker import plain_descent
from tests.supervised_runs import PAIRS, assert_same_run, here, make_inputs, norm_wise, result
from tests.tiny import save_policy

ADAPTED = ("--model.lora.rank 3", "--model.lora.alpha 6")
TRAINED = ("--policy.lora.rank 3", "--policy.lora.alpha 6", "--critics.lora.rank 2", "--total_steps 3")
TOKENS = torch.tensor([[1, 4, 13, 14, 15, 16, 17, 2]])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def cost_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost") / "run"
    assert here("cost", inputs, folder, *ADAPTED) == 0
    return folder


@pytest.fixture(scope="module")
def runs(
    inputs: Path, job: Job, cost_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Where each entry point started, and what it wrote."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in ("train", "sft")}
    assert here("sft", inputs, folders["sft"], *ADAPTED) == 0
    assert job.here(folders["train"], *TRAINED) == 0
    starts = {"train": job.folder / "policy", "sft": inputs / "policy", "cost": inputs / "policy"}
    return {kind: (starts[kind], folder) for kind, folder in (folders | {"cost": cost_run}).items()}


def plain_names(state: dict[str, torch.Tensor], without: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(without): value for name, value in state.items()}


@pytest.mark.parametrize("kind", ["train", "sft", "cost"])
def test_only_the_adapters_and_a_score_head_are_trained(runs: dict[str, tuple[Path, Path]], kind: str) -> None:
    """The result differs from the start by alpha / rank B A, on every linear layer of every block, and nowhere else."""
    start, run = runs[kind]
    folder = run / ("model" if kind == "cost" else "policy")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    # A score model's adapters sit in the trunk, whose names lack the language model's prefix.
    inner = "base_model.model." + ("" if kind == "cost" else "model.")
    after = plain_names(result(run), "model.")
    changed = set()
    for name, before in plain_names(load_file(start / "model.safetensors"), "model.").items():
        a, b = (adapter.get(f"{inner}{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        if a is None:
            assert name not in after or torch.equal(after[name], before), name
        else:
            assert a.shape[0] == 3
            torch.testing.assert_close(after[name], before + 6 / 3 * b @ a, atol=1e-7, rtol=1e-6)
            changed.add(name)
            assert not torch.equal(after[name], before), name
    layers = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert changed == {f"layers.{i}.{layer}_proj.weight" for i in range(2) for layer in layers}
    assert len(adapter) == 2 * len(changed)
    assert (folder / "adapter" / "score_head.safetensors").exists() == (kind == "cost")


@pytest.mark.parametrize("kind", ["train", "sft"])
def test_peft_reads_a_policys_adapter(runs: dict[str, tuple[Path, Path]], kind: str) -> None:
    start, run = runs[kind]
    base = AutoModelForCausalLM.from_pretrained(start)
    merged = AutoModelForCausalLM.from_pretrained(run / "policy")
    with torch.no_grad():
        before = base(TOKENS).logits
        adapted = PeftModel.from_pretrained(base, run / "policy" / "adapter")(TOKENS).logits
        torch.testing.assert_close(adapted, merged(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert (adapted - before).abs().max() > 1e-2
    noted = json.loads((run / "policy" / "adapter" / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == str(start)


def held_out() -> list[list[tuple[str, str]]]:
    """Prompt and response of each pair for a cost model, the less safe one first."""
    return [
        [(row["prompt"], row[f"response_{i}"]) for i in (1 - row["safer_response_id"], row["safer_response_id"])]
        for row in PAIRS
    ]


def test_the_merged_score_model_scores_as_the_trained_one_did(inputs: Path, cost_run: Path) -> None:
    """`eval_scores.jsonl` was written with adapters; `model/` has none, and `adapter/` is peft's, with a head."""
    start, run = inputs / "policy", cost_run
    lines = [json.loads(line) for line in (run / "eval_scores.jsonl").read_text().splitlines()]
    scored = torch.tensor([[line["score_0"], line["score_1"]] for line in lines])
    template = PromptTemplate(AutoTokenizer.from_pretrained(run / "model"))
    model, loaded = (
        ScoreModel.from_pretrained(str(run / name), dtype=torch.float32) for name in ("model", "model/adapter")
    )
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    trunk = PeftModel.from_pretrained(AutoModel.from_pretrained(start), run / "model" / "adapter")
    head = load_file(run / "model" / "adapter" / "score_head.safetensors")["score_head.weight"]
    merged, adapted = torch.zeros(2, len(PAIRS), 2)
    for i, pair in enumerate(held_out()):
        for j, (prompt, response) in enumerate(pair):
            tokens = torch.tensor([template.encode_prompt(prompt) + template.encode_response(response)])
            with torch.no_grad():
                last = torch.tensor([tokens.shape[1] - 1])
                merged[i, j] = model(tokens, torch.arange(tokens.shape[1])[None], last)[0]
                adapted[i, j] = trunk(tokens).last_hidden_state[0, -1] @ head[0]
    assert scored.std() > 0.05
    torch.testing.assert_close(merged, scored, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapted, scored, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- as a score model


def test_training_scores_by_an_adapter_as_by_the_merged_model(job: Job, cost_run: Path, tmp_path: Path) -> None:
    """The critic starts from it too, in shards, and all of it is trained."""
    model = cost_run / "model"
    for name, path in (("merged", model), ("adapter", model / "adapter")):
        assert job.here(tmp_path / name, "--total_steps 2", f"--cost.path {path}") == 0
    assert metrics(tmp_path / "adapter") == metrics(tmp_path / "merged")
    assert len({row["cost"] for row in metrics(tmp_path / "merged")}) == 2
    assert same_bits(weights(tmp_path / "adapter"), weights(tmp_path / "merged"))


def test_evaluation_scores_by_an_adapter_as_by_the_merged_model(job: Job, cost_run: Path, tmp_path: Path) -> None:
    model, words = cost_run / "model", ["--policy", f"start={job.folder / 'policy'}"]
    words += ["--prompts", str(job.folder / "prompts.jsonl"), "--reward.path", "tests.scorers:reward"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--sampling.max_new_tokens", "6"]
    costs = []
    for name, path in (("merged", model), ("adapter", model / "adapter")):
        assert evaluate.main([*words, "--output_dir", str(tmp_path / name), "--cost.path", str(path)]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        costs.append([row["cost"] for row in rows])
    assert costs[0] == costs[1] and len(set(costs[0])) > 1


def test_an_adapter_is_checked(cost_run: Path, capsys: pytest.CaptureFixture) -> None:
    model = cost_run / "model"
    text = "<user> tea </s> <assistant> no"
    known = score_text(
        ScoreModel.from_pretrained(str(model), dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model), text
    )
    for folder in (model, model / "adapter"):
        assert score.main(["--check", str(folder), "--expect", text, str(known)]) == 0
        assert f"score {known:.4f}, as expected" in capsys.readouterr().out
    assert score.main(["--check", str(model / "adapter"), "--expect", text, str(known + 1)]) == 2


def test_its_base_has_to_be_what_it_was(
    inputs: Path, cost_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = shutil.copytree(cost_run / "model" / "adapter", tmp_path / "adapter")
    other = save_policy(tmp_path / "other", seed=7)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(other)}))
    capsys.readouterr()
    assert score.main(["--check", str(adapter)]) == 2
    said = rf"error: '{adapter}' was trained on other weights than its base '{other}' has: .*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    # As earlier versions wrote it, and as it is for a policy.
    (adapter / "config.json").unlink()
    assert score.main(["--check", str(adapter), "--kind", "cost"]) == 2
    assert re.fullmatch(r"error: .* holds adapters without a config\.json.*\n", capsys.readouterr().err)


def test_the_adapters_of_a_policy_are_no_policy(
    job: Job, runs: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, whole = runs["train"]
    capsys.readouterr()
    assert job.here(tmp_path / "run", f"--policy.path {whole / 'policy' / 'adapter'}") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .* holds adapters without a config\.json, .*folder of the merged model.*\n", said)
    noted = json.loads((whole / "policy" / "adapter" / "adapter_config.json").read_text())
    assert Path(noted["base_model_name_or_path"]).is_absolute()


@pytest.mark.parametrize("kind", ["sft", "cost", "train"])
def test_a_base_that_changes_under_a_run_stops_it(
    job: Job, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    """Whatever is allowed of data: the adapters would be noted as of weights that they were not trained on, and models
    that share the base would compute with what the others do not."""
    base = shutil.copytree(inputs / "policy", tmp_path / "policy")

    def run(*options: str) -> int:
        if kind == "train":
            return job.here(tmp_path / "run", *TRAINED, f"--policy.path {base}", "--engine.zero_stage 2", *options)
        return here(kind, inputs, tmp_path / "run", *ADAPTED, f"--model.path {base}", *options)

    assert run("--stop_after 2") == 0
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run("--resume auto", "--resume_changed_data true") == 2
    assert re.search(
        "error: checkpoint .* was trained beside frozen weights that are not this model's", capsys.readouterr().err
    )


def test_it_is_gone_on_with_as_a_whole_alone(
    inputs: Path, cost_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter = cost_run / "model" / "adapter"
    capsys.readouterr()
    assert here("cost", inputs, tmp_path / "adapted", *ADAPTED, f"--model.path {adapter}") == 2
    assert re.fullmatch(
        r"error: model\.lora\.rank is 3 with model\.path .* holds adapters.*\n", capsys.readouterr().err
    )
    assert here("cost", inputs, tmp_path / "whole", f"--model.path {adapter}", "--epochs 1") == 0
    start, end = result(cost_run), result(tmp_path / "whole")
    assert start.keys() == end.keys() and not torch.equal(start["model.norm.weight"], end["model.norm.weight"])


def test_its_training_prompts_are_the_models(cost_run: Path, tmp_path: Path) -> None:
    model = cost_run / "model"
    known = read_record(str(model))
    assert known and read_record(str(model / "adapter")) == known
    assert read_record(str(shutil.copytree(model / "adapter", tmp_path / "adapter"))) is None


def test_the_plan_counts_what_is_held(job: Job, cost_run: Path, tmp_path: Path) -> None:
    """Merged as it is loaded: its base's weights, and no more."""
    model = cost_run / "model"
    found = []
    for path in (model, model / "adapter"):
        config = parse(job.words(tmp_path / "run", f"--cost.path {path}"))
        # But for where they are from.
        found.append([replace(model, base=None) for model in networks(config, torch.float32)])
    assert found[0] == found[1]
    scored = next(network for network in found[1] if network.role == "cost")
    trunk = ScoreModel.from_pretrained(str(model / "adapter"), dtype=torch.float32).trunk
    assert scored.parameters == sum(parameter.numel() for parameter in trunk.parameters()) and scored.trained == 0


# --------------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_the_start_to_the_last_bit_and_no_second_copy(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three steps, the reference's log-probabilities of new responses are those of the folder trained from."""
    built = []

    class Counted(Engine):
        def __init__(self, module: torch.nn.Module, *args) -> None:
            built.append(type(module).__name__)
            super().__init__(module, *args)

    monkeypatch.setattr(assembly, "Engine", Counted)
    config = parse(job.words(tmp_path / "run", *TRAINED))
    given, ranks = read_inputs(config), start_distributed()
    trainer = Trainer(config, given, ranks)
    assert built == ["Policy", "Critic", "Critic"]
    assert trainer.run() == 0
    kl = [row["kl"] for row in metrics(tmp_path / "run")]
    assert kl[0] == 0.0 and all(kl[1:])
    models = trainer.learner.models
    rollout = trainer.generate(*trainer.share_requests(given.requests, 2, Purpose.TRAINING))
    ours = trainer.learner.log_probs(models.reference, rollout)
    now = trainer.learner.log_probs(models.policy, rollout)
    with assembly.sharded_loading(config.engine, ranks.device):
        start = Policy.from_pretrained(str(job.folder / "policy"), dtype=torch.float32, attention=PACKED)
    theirs = trainer.learner.log_probs(Engine(start, config.engine, ranks), rollout)
    assert torch.equal(ours, theirs)
    assert (now - ours).abs().max() > 1e-3
    # The switch goes back: the policy is the trained one again.
    assert torch.equal(trainer.learner.log_probs(models.policy, rollout), now)
    stop_distributed()


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("kind", ["sft", "cost"])
def test_supervised_runs_resume_exactly(
    inputs: Path, runs: dict[str, tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    assert here(kind, inputs, tmp_path / "run", *ADAPTED, "--stop_after 3") == 0
    assert here(kind, inputs, tmp_path / "run", *ADAPTED, "--resume auto") == 0
    assert_same_run(tmp_path / "run", runs[kind][1])


def test_training_resumes_exactly(job: Job, runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    _, whole = runs["train"]
    assert job.here(tmp_path / "run", *TRAINED, "--stop_after 2") == 0
    assert job.here(tmp_path / "run", *TRAINED, "--resume auto") == 0
    assert len(metrics(whole)) == 3
    assert metrics(tmp_path / "run") == metrics(whole)
    assert same_bits(weights(tmp_path / "run"), weights(whole))
    assert engines(whole, 3) == {"policy", "reward_critic", "cost_critic"}
    assert states(tmp_path / "run", 3) == states(whole, 3)


def test_a_checkpoint_with_adapters_is_not_one_without(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert here("sft", inputs, tmp_path / "run", *ADAPTED, "--stop_after 2") == 0
    capsys.readouterr()
    assert here("sft", inputs, tmp_path / "run", "--resume auto") == 2
    assert re.fullmatch(r"error: .*another configuration: model\.lora\.\w+ is .*\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------ activation checkpointing


def test_checkpointing_changes_no_update_of_a_score_model(inputs: Path, tmp_path: Path) -> None:
    """Three steps by plain descent: of the head, then of an adapter's second matrix, then of its first."""
    plain = ("--optimizer.learning_rate 1", "--optimizer.gradient_clip 0", "--epochs 1", *ADAPTED)
    with plain_descent(1.0):
        assert here("cost", inputs, tmp_path / "kept", *plain) == 0
        assert here("cost", inputs, tmp_path / "again", *plain, "--engine.activation_checkpointing true") == 0
    start = load_file(inputs / "policy" / "model.safetensors")
    assert norm_wise(result(tmp_path / "again"), result(tmp_path / "kept"), start) <= 1e-5


def test_checkpointing_changes_no_update_of_reinforcement_learning(inputs: Path) -> None:
    """Policy and critics; from the second update on, the adapters differ from nothing."""
    lora, ranks = LoraConfig(rank=2), start_distributed()
    gradients = {}
    for again in (False, True):
        config = learner_worker.make_config({"name": "repo", "advantage": "gae"})
        config = replace(
            config,
            policy=replace(config.policy, lora=lora),
            critics=CriticConfig(lora=lora),
            engine=replace(config.engine, activation_checkpointing=again),
        )
        torch.manual_seed(0)
        learner = learner_worker.make_learner(config, inputs / "policy", ranks, rate=1.0)
        gradients[again] = [learner_worker.one_update(learner, ranks)["gradients"] for _ in range(3)]
    for kept, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert all(".lora_" in name or "/heads." in name for name in kept)
        assert norm_wise(recomputed, kept, {}) <= 1e-5
    for stream in ("policy", "reward", "cost"):
        last = {name: value for name, value in gradients[True][-1].items() if name.startswith(stream)}
        assert last and all(value.any() for value in last.values()), stream


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "train",
            "--policy.lora.rank 2 --policy.trainable_layers 1",
            r"policy\.trainable_layers is 1 with policy",
        ),
        ("sft", "--model.lora.rank 2 --model.trainable_layers 1", r"model\.trainable_layers is 1 with model\.lora"),
        ("cost", "--model.lora.rank 2 --model.trainable_layers 1", r"model\.trainable_layers is 1 with model\.lora"),
        ("train", "--policy.lora.rank 2 --policy.lora.targets [lm_head]", r"LoRA target 'lm_head' is no linear layer"),
        ("train", "--critics.lora.rank 2 --critics.lora.targets [a_proj]", r"LoRA target 'a_proj' is no linear layer"),
        ("sft", "--model.lora.rank 2 --model.lora.targets [a_proj]", r"target 'a_proj' .* expected some of: q_proj, "),
        ("cost", "--model.lora.rank 2 --model.lora.targets [score_head]", r"LoRA target 'score_head' is no linear"),
        ("sft", "--model.lora.rank -1", r"model\.lora\.rank is -1, expected a number of at least 0"),
        ("sft", "--model.lora.rank 2 --model.lora.alpha 0", r"model\.lora\.alpha is 0\.0, expected a number above 0"),
        ("train", "--critics.lora.rank 2 --algorithm.advantage rloo", r"critics\.lora\.rank is 2 .* has no critics"),
    ],
)
def test_refused(
    inputs: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, options: str, message: str
) -> None:
    run = job.here if kind == "train" else lambda *words: here(kind, inputs, *words)
    assert run(tmp_path / "run", options) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_some_targets_only(inputs: Path, tmp_path: Path) -> None:
    options = (*ADAPTED, "--model.lora.targets [q_proj,down_proj]", "--epochs 1")
    assert here("sft", inputs, tmp_path / "run", *options) == 0
    before, after = load_file(inputs / "policy" / "model.safetensors"), result(tmp_path / "run")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    layers = ("self_attn.q_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{i}.{layer}.weight" for i in range(2) for layer in layers}
