"""The update against a naive float64 one, and its indifference to ranks and micro-batches."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from repo_fast.config import DataConfig
from repo_fast.engine import start_distributed
from repo_fast.errors import InputError
from repo_fast.objective.algorithm import ALGORITHMS
from tests.learning import learner_worker as worker
from tests.tiny import save_policy

REDUCTIONS = ("sequence_mean", "token_mean", "sum")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def ranks():
    return start_distributed()


def naive_log_probs(model, rollout, temperature):
    """Token log-probabilities of each response, one sequence at a time, by full logits."""
    results = []
    for prompt, response in zip(rollout.prompt_tokens, rollout.response_tokens, strict=True):
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0] / temperature
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
        results.append(picked)
    return results


def naive_violations(costs, ids, scope, threshold):
    if scope == "response":
        return [c - threshold for c in costs]
    if scope == "batch":
        return [sum(costs) / len(costs) - threshold] * len(costs)
    mean = {i: sum(c for c, j in zip(costs, ids, strict=True) if j == i) / ids.count(i) for i in set(ids)}
    return [mean[i] - threshold for i in ids]


def bounded(weight, settings):
    low, high = settings.importance_mask or (0.0, math.inf)
    return min(weight, settings.importance_cap or math.inf) if low <= weight <= high else 0.0


def naive_loss(model, rollout, experience, costs, row, settings, multiplier, temperature):
    """The policy loss of algorithm.md, written as its loops."""
    new = naive_log_probs(model, rollout, temperature)
    lengths = [len(response) for response in rollout.response_tokens]
    old, reward, cost = (
        getattr(experience, name).double().split(lengths)
        for name in ("old_log_probs", "reward_advantages", "cost_advantages")
    )
    violations = naive_violations(
        costs.double().tolist(),
        rollout.prompt_ids.tolist(),
        settings.scope or row.scope,
        settings.threshold - settings.margin,
    )
    surrogate = settings.surrogate or row.surrogate
    total, sequences = 0.0, []
    for i in range(len(lengths)):
        w_r, w_c = 1 / (1 + multiplier), multiplier / (1 + multiplier)
        if row.rectify and violations[i] <= 0:
            w_r, w_c = 1.0, 0.0
        losses = []
        for t in range(lengths[i]):
            ratio = (new[i][t] - old[i][t]).exp()
            clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)

            def s(advantage, ratio=ratio, clipped=clipped):
                return torch.minimum(ratio * advantage, clipped * advantage)

            if surrogate == "separate":
                losses.append(-(w_r * s(reward[i][t]) + w_c * s(-cost[i][t])))
            else:
                losses.append(-s(w_r * reward[i][t] - w_c * cost[i][t]))
            if settings.importance:
                # The policy has not moved.
                drawn = new[i].detach() if settings.importance_level == "sequence" else new[i][t].detach()
                losses[-1] = losses[-1] * bounded(math.exp(float((drawn - worker.SAID).sum())), settings)
        sequences.append(torch.stack(losses))
        total = total + sequences[-1].sum()
    if settings.reduction == "sum":
        return total
    if settings.reduction == "token_mean":
        return total / sum(lengths)
    return torch.stack([losses.mean() for losses in sequences]).mean()


def rows():
    cases = [
        {"name": name, "surrogate": surrogate, "reduction": reduction, "advantage": "rloo"}
        for name in ALGORITHMS
        for surrogate in ("separate", "mixed")
        for reduction in REDUCTIONS
    ]
    cases += [{"name": "repo", "scope": "response", "advantage": kind, "margin": 0.4} for kind in ("grpo", "rloo")]
    cases += [{"name": "repo", "advantage": "rloo", "importance_cap": cap} for cap in (0.5, 2.0)]
    # What counts 0 stays in every denominator.
    cases += [
        {"advantage": "rloo", "reduction": reduction, "importance_level": level, "importance_mask": mask}
        for reduction in REDUCTIONS
        for level, mask in (("token", (0.5, 5.0)), ("sequence", (0.5, 50.0)))
    ]
    return cases


def test_every_row_surrogate_reduction_and_scope_equals_a_naive_float64_update(policy_folder, ranks):
    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)
    learner = worker.make_learner(worker.make_config({"advantage": "rloo"}), policy_folder, ranks, rate=0.0)
    for case in rows():
        # One engine for all cases, for speed; its learning rate is 0, so all of them start from the same weights.
        config = worker.make_config(case)
        fresh = worker.Learner(config, learner.models, ranks)
        learner.models.policy.__dict__.pop("step", None)
        result = worker.one_update(fresh, ranks)
        rollout, scores, _ = worker.make_rollout(ranks)
        loss = naive_loss(
            model,
            rollout,
            result["experience"],
            scores["cost"],
            fresh.row,
            config.algorithm,
            fresh.multiplier.value,
            0.7,
        )
        model.zero_grad()
        loss.backward()
        scale = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        difference = sum(
            (result["gradients"][f"policy/model.{name}"].double() - p.grad).square().sum()
            for name, p in model.named_parameters()
        ).sqrt()
        assert difference <= 1e-5 * scale, (case, float(difference / scale))
        assert abs(result["metrics"]["loss"] - loss.item()) <= 1e-5 * max(1.0, abs(loss.item())), case
        if config.algorithm.importance_mask is not None:
            assert 0.2 < result["metrics"]["importance_masked_share"] < 0.8, case


def test_experience_with_critics_equals_a_naive_one(policy_folder, ranks):
    settings = {"name": "repo", "advantage": "gae", "score_clamp": 1.5}
    learner = worker.make_learner(worker.make_config(settings), policy_folder, ranks)
    torch.manual_seed(1)
    rollout, scores, _ = worker.make_rollout(ranks)
    # A reference that differs from the policy, and critics with a head, so that no term vanishes.
    kl = torch.randn(sum(len(r) for r in rollout.response_tokens)) * 0.3
    values = {stream: torch.randn_like(kl) for stream in ("reward", "cost")}
    old = learner.log_probs(learner.models.policy, rollout)
    learner.log_probs = lambda engine, _: old - kl * (engine is learner.models.reference)
    learner.values = lambda engine, _: values[engine.module.streams[0]][None]
    experience, metrics = learner.experience(rollout, scores)

    starts = [0]
    for response in rollout.response_tokens:
        starts.append(starts[-1] + len(response))
    for stream, beta in (("reward", 0.1), ("cost", -0.1)):
        for i in range(len(rollout.responses)):
            advantage, advantages = 0.0, []
            for t in reversed(range(starts[i], starts[i + 1])):
                last = t == starts[i + 1] - 1
                r = -beta * kl[t].item() + (scores[stream][i].item() if last else 0.0)
                r = max(-1.5, min(1.5, r))
                following = 0.0 if last else values[stream][t + 1].item()
                advantage = r + following - values[stream][t].item() + 0.95 * advantage * (not last)
                advantages.insert(0, advantage)
            actual = getattr(experience, f"{stream}_advantages")[starts[i] : starts[i + 1]]
            torch.testing.assert_close(actual, torch.tensor(advantages), atol=2e-5, rtol=1e-5)
            returns = getattr(experience, f"{stream}_returns")[starts[i] : starts[i + 1]]
            expected = torch.tensor(advantages) + values[stream][starts[i] : starts[i + 1]]
            torch.testing.assert_close(returns, expected, atol=2e-5, rtol=1e-5)
    assert math.isclose(metrics["kl"], kl.sum().item() / len(rollout.responses), rel_tol=1e-4)


def test_shaping_subtracts_the_weighted_cost_from_the_reward(policy_folder, ranks):
    base = worker.make_config({"name": "reward_shaping", "shaping_weight": 0.5, "advantage": "rloo"})
    learner = worker.make_learner(base, policy_folder, ranks)
    rollout, scores, _ = worker.make_rollout(ranks)
    shaped, _ = learner.experience(rollout, scores)
    plain_config = replace(base, algorithm=replace(base.algorithm, name="ppo"))
    plain = worker.Learner(plain_config, learner.models, ranks)
    combined = {"reward": scores["reward"] - 0.5 * scores["cost"], "cost": scores["cost"]}
    expected, _ = plain.experience(rollout, combined)
    torch.testing.assert_close(shaped.reward_advantages, expected.reward_advantages)
    assert not shaped.cost_advantages.any() and shaped.reward_advantages.any()


@pytest.mark.parametrize(
    "budget", [pytest.param(4096, marks=pytest.mark.slow), 30, pytest.param(1, marks=pytest.mark.slow)]
)
def test_sharing_prompts_changes_no_gradient(policy_folder, ranks, budget):
    results = {}
    for share in (False, True):
        config = worker.make_config({"advantage": "gae"}, budget)
        learner = worker.make_learner(
            replace(config, update=replace(config.update, share_prompts=share)), policy_folder, ranks
        )
        results[share] = worker.one_update(learner, ranks)
        rows = learner._rows(results[share]["experience"].rollout, range(9))
        assert sorted(i for row in rows for i in row) == list(range(9))
    assert norm_wise(results[True]["gradients"], results[False]["gradients"]) <= 1e-5
    for name, value in results[False]["metrics"].items():
        assert results[True]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_sharing_prompts_needs_packed_attention(policy_folder, ranks):
    config = worker.make_config({"advantage": "rloo"})
    config = replace(
        config,
        update=replace(config.update, share_prompts=True),
        policy=replace(config.policy, attention="sdpa"),
    )
    with pytest.raises(InputError, match="update.share_prompts is true with attention 'sdpa'"):
        worker.make_learner(config, policy_folder, ranks)


def test_the_sampler_s_log_probs_spare_a_forward_and_change_no_gradient(policy_folder, ranks, monkeypatch):
    results = {}
    for source in ("trainer", "sampler"):
        config = worker.make_config({"advantage": "rloo"})
        learner = worker.make_learner(
            replace(config, update=replace(config.update, old_log_probs=source)), policy_folder, ranks
        )
        rollout, scores, _ = worker.make_rollout(ranks)
        drawn = learner.log_probs(learner.models.policy, rollout)
        drawn = drawn.split([len(response) for response in rollout.response_tokens])
        forwards = mock.Mock(wraps=learner.log_probs)
        monkeypatch.setattr(learner, "log_probs", forwards)
        experience, metrics = learner.experience(replace(rollout, sampler_log_probs=list(drawn)), scores)
        metrics |= learner.update(experience)
        models = [call.args[0] for call in forwards.call_args_list]
        assert (learner.models.policy in models) == (source == "trainer") and learner.models.reference in models
        results[source] = learner.models.policy.whole_state(), metrics
    (plain, metrics), (spared, spared_metrics) = results["trainer"], results["sampler"]
    for name, weight in plain.items():
        torch.testing.assert_close(spared[name], weight, rtol=1e-6, atol=1e-7)
    assert metrics.keys() == spared_metrics.keys()
    for name in ("loss", "kl", "entropy", "gradient_norm"):
        assert spared_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6)
    assert spared_metrics["sampler_gap_absolute"] < 1e-6


def test_log_probs_of_tokens_that_another_distribution_drew_show_as_a_gap(policy_folder, ranks):
    config = worker.make_config({"advantage": "rloo"})
    config = replace(config, update=replace(config.update, old_log_probs="sampler"))
    learner = worker.make_learner(config, policy_folder, ranks)
    rollout, scores, _ = worker.make_rollout(ranks)
    true = learner.log_probs(learner.models.policy, rollout)
    experience, _ = learner.experience(rollout, scores)
    metrics = learner.update(experience)
    assert metrics["sampler_gap"] == pytest.approx(worker.SAID - float(true.mean()), rel=1e-4)


@pytest.mark.parametrize("scale", ["joint", "separate", "none"])
def test_grpo_s_scales_and_a_capped_reward_equal_naive_ones(policy_folder, ranks, scale):
    settings = {"advantage": "grpo", "advantage_scale": scale, "reward_cap": 0.3, "score_clamp": 1.5}
    config = worker.make_config(settings)
    learner = worker.make_learner(config, policy_folder, ranks)
    rollout, scores, _ = worker.make_rollout(ranks)
    kl = torch.randn(sum(len(r) for r in rollout.response_tokens)) * 0.3
    old = learner.log_probs(learner.models.policy, rollout)
    learner.log_probs = lambda engine, _: old - kl * (engine is learner.models.reference)
    experience, metrics = learner.experience(rollout, scores)

    lengths, ids = [len(response) for response in rollout.response_tokens], rollout.prompt_ids.tolist()
    sums = torch.stack([part.sum() for part in kl.double().split(lengths)])
    reward, cost = scores["reward"].double().clamp(max=0.3).clamp(min=-1.5), scores["cost"].double().clamp(-1.5, 1.5)
    beta, multiplier = config.algorithm.kl_coefficient, learner.multiplier.value
    expected = torch.zeros(2, len(ids), dtype=torch.float64)
    for prompt in set(ids):
        own = [i for i, one in enumerate(ids) if one == prompt]
        unsafe = scores["cost"][own].mean() > 0
        w_r, w_c = (1 / (1 + multiplier), multiplier / (1 + multiplier)) if unsafe else (1.0, 0.0)
        r, c, k = reward[own] - beta * sums[own], cost[own] + beta * sums[own], beta * (sums[own] - sums[own].mean())
        if scale == "separate":
            r, c = (reward[own] / reward[own].std()) - k, (cost[own] / cost[own].std()) + k
        shared = (w_r * r - w_c * c).std() if scale == "joint" else 1.0
        expected[0, own], expected[1, own] = (r - r.mean()) / shared, (c - c.mean()) / shared
    starts = experience.cu_seqlens[:-1].long()
    found = torch.stack([experience.reward_advantages[starts], experience.cost_advantages[starts]])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    full = [
        prompt for prompt in set(ids) if all(scores["reward"][i] >= 0.3 for i, one in enumerate(ids) if one == prompt)
    ]
    assert metrics["capped_prompts"] == pytest.approx(len(full) / len(set(ids)))


def test_prompts_wholly_above_the_cap_are_said_once(policy_folder, ranks, caplog):
    config = worker.make_config({"advantage": "grpo", "reward_cap": -9.0})
    learner = worker.make_learner(config, policy_folder, ranks)
    rollout, scores, _ = worker.make_rollout(ranks)
    for _ in range(2):
        assert learner.experience(rollout, scores)[1]["capped_prompts"] == 1
    said = [record.getMessage() for record in caplog.records if "reward_cap" in record.getMessage()]
    assert len(said) == 1 and "advantage_scale separate or none" in said[0]


def norm_wise(actual, expected):
    difference = sum((actual[key].double() - expected[key].double()).square().sum() for key in expected)
    scale = sum(expected[key].double().square().sum() for key in expected)
    return float((difference / scale).sqrt())


@pytest.mark.slow
def test_every_backend_of_the_ops_learns_the_same(policy_folder, ranks):
    """Policy, critics and PTX under ZeRO-3, in several micro-batches; Triton in its interpreter."""
    results = {}
    for backend in ("torch", "cpp", "triton"):
        config = worker.make_config(worker.SETTINGS["gae"], 40, data=DataConfig(ptx="given"))
        config = replace(config, engine=replace(config.engine, ops_backend=backend))
        results[backend] = worker.one_update(worker.make_learner(config, policy_folder, ranks), ranks)
    for backend in ("cpp", "triton"):
        for part in ("gradients", "weights"):
            assert norm_wise(results[backend][part], results["torch"][part]) <= 1e-5, (backend, part)


def test_checkpointing_and_a_frozen_head_change_no_gradient(policy_folder, ranks):
    base = worker.make_config(worker.SETTINGS["gae"], 40, data=DataConfig(ptx="given"))
    plain = worker.one_update(worker.make_learner(base, policy_folder, ranks), ranks)["gradients"]
    checkpointed = replace(base, engine=replace(base.engine, activation_checkpointing=True))
    frozen = replace(base, policy=replace(base.policy, trainable_layers=1))
    last_layer = {name for name in plain if not name.startswith("policy/") or ".layers.1." in name or ".norm." in name}
    for config, trained in ((checkpointed, set(plain)), (frozen, last_layer)):
        gradients = worker.one_update(worker.make_learner(config, policy_folder, ranks), ranks)["gradients"]
        assert set(gradients) == trained
        assert norm_wise(gradients, {name: plain[name] for name in gradients}) <= 1e-5


def test_the_update_does_not_depend_on_ranks_or_micro_batches(policy_folder, ranks, tmp_path):
    """1 rank x 1 micro-batch, 1 x several, 2 ranks x several; a prompt's responses lie on both ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.learning.learner_worker", str(policy_folder), str(tmp_path / "two.pt"), "30"]
    two = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one = {}
    for tokens in (4096, 40):
        for name, settings in worker.SETTINGS.items():
            data = {"data": DataConfig(ptx="given")} if "ptx_coefficient" in settings else {}
            learner = worker.make_learner(worker.make_config(settings, tokens, **data), policy_folder, ranks)
            one[name, tokens] = worker.one_update(learner, ranks)
    output, _ = two.communicate(timeout=240)
    assert two.returncode == 0, output[-3000:]
    results = torch.load(tmp_path / "two.pt")
    capped, masked = (one["grpo", 4096]["metrics"][f"importance_{cut}_share"] for cut in ("capped", "masked"))
    assert capped > 0 and masked > 0 and capped + masked < 1
    for name in worker.SETTINGS:
        whole = one[name, 4096]
        for other in (one[name, 40], results[name]):
            assert norm_wise(other["gradients"], whole["gradients"]) <= 1e-5, name
            assert norm_wise(other["weights"], whole["weights"]) <= 1e-5, name
            for key, value in whole["metrics"].items():
                assert math.isclose(other["metrics"][key], value, rel_tol=1e-4, abs_tol=1e-6), (name, key)
