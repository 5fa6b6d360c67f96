"""Updates under several constraints: against a naive float64 one, and indifferent to ranks and micro-batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from repo_fast.collectives import Ranks
from repo_fast.engine import Engine, start_distributed
from repo_fast.errors import InputError
from repo_fast.jobs.assembly import loading_options
from repo_fast.learning.constraints import Constraints
from repo_fast.models.critic import Critic
from repo_fast.models.score_model import ScoreModel
from repo_fast.objective.algorithm import Multiplier, Violation
from repo_fast.objective.constraints import Constraint, FixedMultiplier, PidMultiplier
from tests.job_runs import on_ranks
from tests.learning import learner_worker as worker
from tests.learning.test_learner import naive_log_probs, norm_wise
from tests.tiny import save_policy

INF = math.inf
# Whom each counts for, by prompt; its scope, whether it is rectified, d - m.
TABLE: dict[str, tuple[set[int], str, bool, float]] = {
    "harm": ({0, 1, 2}, "prompt", True, 0.1),
    "refusal": ({0, 1}, "response", True, -0.2),
    "insult": ({0, 2}, "batch", False, 0.3),
}
PID = {"kp": 0.8, "ki": 0.2, "kd": 0.5, "tolerance": 0.05, "smoothing": 0.3}


def make_constraints(K: int = 3, names: Sequence[str] = tuple(TABLE)) -> Constraints:
    """By dual ascent, fixed, and by PID."""
    made = {}
    for name, (_, scope, rectify, threshold) in [(name, TABLE[name]) for name in names[:K]]:
        kind = "rectified" if rectify else "mean"
        controller: Any = {
            "harm": lambda: Multiplier("rectified", init=0.6, threshold=0.1),
            "refusal": lambda kind=kind: FixedMultiplier(1.7, Violation(kind)),
            "insult": lambda kind=kind: PidMultiplier(0.9, 5.0, Violation(kind, threshold=0.3), **PID),
        }[name]()
        made[name] = Constraint(scope, rectify, threshold, controller)
    return Constraints(made)


def make_rollout(ranks: Ranks) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """The worker's, with costs of three constraints."""
    rollout, scores, noise = worker_rollout(ranks)
    costs = torch.randn(3, 9, generator=torch.Generator().manual_seed(8))[:, ranks.share(range(9))]
    for cost, (name, (prompts, *_)) in zip(costs, TABLE.items(), strict=True):
        applies = torch.tensor([i in prompts for i in rollout.prompt_ids.tolist()], dtype=torch.bool)
        scores[name] = cost.where(applies, -INF)
    return rollout, scores, noise


worker_rollout = worker.make_rollout


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_distributed()


@pytest.fixture(autouse=True)
def three_costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker, "make_rollout", make_rollout)
    yield


def naive_violations(scores: dict[str, torch.Tensor], ids: list[int], K: int) -> list[list[float]]:
    found = []
    for name, (prompts, scope, _, threshold) in list(TABLE.items())[:K]:
        costs = scores[name].double().tolist()
        own = []
        for i, prompt in enumerate(ids):
            same = {"response": [i], "prompt": [j for j, p in enumerate(ids) if p == prompt]}.get(
                scope, range(len(ids))
            )
            counted = [costs[j] for j in same if ids[j] in prompts]
            own.append(sum(counted) / len(counted) - threshold if prompt in prompts else -INF)
        found.append(own)
    return found


def naive_multipliers(scores: dict[str, torch.Tensor], violations: list[list[float]], ids: list[int]) -> list[float]:
    """After the first update."""
    rectified = {}
    for prompt in set(ids):
        own = [max(violations[0][i], 0.0) for i, p in enumerate(ids) if p == prompt]
        rectified[prompt] = sum(own) / len(own)
    found = [0.6 * math.exp(0.1 * 0.6 * sum(rectified.values()) / len(rectified)), 1.7]
    costs = [cost for cost in scores["insult"].double().tolist() if cost != -INF]
    error = sum(costs) / len(costs) - 0.3 - PID["tolerance"]
    # At first there is nothing that J could have risen from.
    found.append(min(max(PID["kp"] * error + PID["ki"] * (0.9 / PID["ki"] + error), 0.0), 5.0))
    return found[: len(violations)]


@pytest.mark.parametrize(
    ("advantage", "surrogate"), [("rloo", "separate"), ("joint", "mixed"), ("separate", "separate"), ("none", "mixed")]
)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_an_update_equals_a_naive_float64_one(
    policy_folder: Path, ranks: Ranks, K: int, advantage: str, surrogate: str
) -> None:
    settings: dict[str, Any] = {"advantage": "rloo"} if advantage == "rloo" else {"advantage": "grpo"}
    if advantage != "rloo":
        settings["advantage_scale"] = advantage
    config = worker.make_config({**settings, "surrogate": surrogate, "score_clamp": 1.2})
    learner = worker.make_learner(config, policy_folder, ranks, rate=0.0)
    learner.constraints = make_constraints(K)
    rollout, scores, _ = make_rollout(ranks)
    ids, lengths = rollout.prompt_ids.tolist(), [len(response) for response in rollout.response_tokens]
    kl = torch.randn(sum(lengths)) * 0.3
    old = learner.log_probs(learner.models.policy, rollout)
    learner.log_probs = lambda engine, _: old - kl * (engine is learner.models.reference)
    result = worker.one_update(learner, ranks)
    experience, metrics = result["experience"], result["metrics"]

    violations = naive_violations(scores, ids, K)
    multipliers = naive_multipliers(scores, violations, ids)
    assert learner.constraints.multipliers == pytest.approx(multipliers, rel=1e-6)
    names = list(TABLE)[:K]
    weights = []
    for i in range(len(ids)):
        active = [
            violations[k][i] != -INF and (violations[k][i] > 0 or not TABLE[name][2]) for k, name in enumerate(names)
        ]
        total = 1 + sum(multipliers[k] for k in range(K) if active[k])
        weights.append([1 / total, *(multipliers[k] / total if active[k] else 0.0 for k in range(K))])

    beta, sums = config.algorithm.kl_coefficient, [part.sum().item() for part in kl.double().split(lengths)]
    advantages = torch.zeros(1 + K, len(ids), dtype=torch.float64)
    for prompt in set(ids):
        own = [i for i, one in enumerate(ids) if one == prompt]
        n = len(own)
        shift = torch.tensor([beta * sums[i] for i in own], dtype=torch.float64)
        raw = [scores["reward"][own].double().clamp(-1.2, 1.2)]
        raw += [scores[name][own].double().clamp(-1.2, 1.2) for name in names]
        applies = [True, *(prompt in TABLE[name][0] for name in names)]
        signs = [-1.0, *([1.0] * K)]
        if advantage == "separate":
            streams = [(r - r.mean()) / r.std() + s * (shift - shift.mean()) for r, s in zip(raw, signs, strict=True)]
        else:
            shaped = [r + s * shift if a else 0 * r for r, s, a in zip(raw, signs, applies, strict=True)]
            streams = [r - r.mean() for r in shaped]
            if advantage == "rloo":
                streams = [r * n / (n - 1) for r in streams]
            elif advantage == "joint":
                mixed = shaped[0] * torch.tensor([weights[i][0] for i in own])
                for k in range(K):
                    mixed = mixed - shaped[1 + k] * torch.tensor([weights[i][1 + k] for i in own])
                streams = [r / mixed.std() for r in streams]
        for row, stream, applicable in zip(advantages, streams, applies, strict=True):
            row[own] = stream if applicable else torch.zeros_like(stream)
    costs = torch.atleast_2d(experience.cost_advantages)
    starts = experience.cu_seqlens[:-1].long()
    found = torch.cat([experience.reward_advantages[None], costs])[:, starts].double()
    torch.testing.assert_close(found, advantages, atol=1e-5, rtol=1e-5)

    model = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)
    sequences = []
    before = experience.old_log_probs.double().split(lengths)
    for i, new in enumerate(naive_log_probs(model, rollout, 0.7)):
        ratio = (new - before[i]).exp()

        def s(advantage: torch.Tensor, ratio: torch.Tensor = ratio) -> torch.Tensor:
            return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)

        signed = [advantages[0, i], *(-advantages[1 + k, i] for k in range(K))]
        if surrogate == "separate":
            loss = -sum(w * s(a) for w, a in zip(weights[i], signed, strict=True))
        else:
            loss = -s(sum(w * a for w, a in zip(weights[i], signed, strict=True)))
        sequences.append(loss.mean())
    loss = torch.stack(sequences).mean()
    loss.backward()
    expected = {f"policy/model.{name}": p.grad for name, p in model.named_parameters()}
    assert norm_wise({name: result["gradients"][name] for name in expected}, expected) <= 1e-5
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    for k, name in enumerate(names if K > 1 else []):
        applicable = [v for v in violations[k] if v != -INF]
        assert metrics[f"{name}_multiplier"] == pytest.approx(multipliers[k])
        assert metrics[f"{name}_unsafe_fraction"] == pytest.approx(sum(v > 0 for v in applicable) / len(applicable))


def with_critics(
    policy_folder: Path,
    ranks: Ranks,
    tokens: int = 4096,
    names: Sequence[str] = tuple(TABLE),
    order: Sequence[str] = ("reward", *TABLE),
    **settings: Any,
) -> worker.Learner:
    """Under some constraints, with critics on one trunk, in any order."""
    config = worker.make_config({"advantage": "gae", **settings}, tokens)
    learner = worker.make_learner(config, policy_folder, ranks)
    start = ScoreModel.from_policy(str(policy_folder), **loading_options(config.policy.attention, config.engine, ranks))
    torch.manual_seed(0)
    critic = Critic(start, tuple(stream for stream in order if stream in ("reward", *names)), torch.float32)
    for stream in ("reward", *TABLE):
        drawn = torch.randn(1, critic.head("reward").in_features) * 0.1
        if stream in critic.streams:
            critic.head(stream).weight.data.copy_(drawn)
    with worker.plain_descent(0.1):
        engine = Engine(critic, config.engine, ranks, config.critic_optimizer, 1)
    learner.models = replace(learner.models, critics={"reward_costs": engine})
    learner.constraints = make_constraints(names=names)
    return learner


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("names", [list(TABLE), ["refusal"]], ids=len)
def test_critics_learn_of_the_responses_that_their_constraint_applies_to(
    policy_folder: Path, ranks: Ranks, names: list[str], reduction: str
) -> None:
    learner = with_critics(policy_folder, ranks, 40, names, reduction=reduction)
    result = worker.one_update(learner, ranks)
    experience, metrics = result["experience"], result["metrics"]
    ids, lengths = experience.rollout.prompt_ids.tolist(), experience.cu_seqlens.diff().tolist()
    streams = (experience.cost_values, experience.cost_returns, experience.cost_advantages)
    for name, values, returns, advantages in zip(names, *map(torch.atleast_2d, streams), strict=True):
        prompts = TABLE[name][0]
        errors = (values - returns).double().square() / 2
        parts = [part for part, i in zip(errors.split(lengths), ids, strict=True) if i in prompts]
        means = torch.stack([part.mean() for part in parts])
        expected = means.mean() if reduction == "sequence_mean" else torch.cat(parts).mean()
        assert metrics[f"{name}_value_loss"] == pytest.approx(expected.item(), rel=1e-4)
        for part, i in zip(advantages.split(lengths), ids, strict=True):
            assert bool(part.any()) == (i in prompts)


def test_critics_are_known_by_name(policy_folder: Path, ranks: Ranks) -> None:
    found = [
        worker.one_update(with_critics(policy_folder, ranks, order=order), ranks)
        for order in (("reward", *TABLE), ("insult", "reward", "harm", "refusal"))
    ]
    assert norm_wise(found[1]["gradients"], found[0]["gradients"]) <= 1e-5
    for key, value in found[0]["metrics"].items():
        assert found[1]["metrics"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_multiplier_that_is_not_a_number_ends_the_update(policy_folder: Path, ranks: Ranks) -> None:
    learner = worker.make_learner(worker.make_config({"advantage": "rloo"}), policy_folder, ranks)
    learner.constraints = make_constraints()
    rollout, scores, _ = make_rollout(ranks)
    experience, _ = learner.experience(rollout, scores)
    learner.constraints["insult"].controller.value = math.nan
    with pytest.raises(ValueError, match=r"multiplier\[2\] must be finite and >= 0, got nan"):
        learner.update(experience)


def test_states_of_other_constraints_are_refused() -> None:
    state = make_constraints(2).state_dict()
    with pytest.raises(InputError, match=r"multipliers of \['harm', 'refusal'\], expected those of \['harm'"):
        make_constraints().load_state_dict(state)
    state["multipliers"]["refusal"] = state["multipliers"]["harm"]
    with pytest.raises(InputError, match="multiplier of refusal is of another controller"):
        make_constraints(2).load_state_dict(state)


@pytest.mark.parametrize("names", [[], ["harm", "reward"]])
def test_no_constraint_is_called_reward(names: list[str]) -> None:
    made = {name: make_constraints(1)["harm"] for name in names}
    with pytest.raises(ValueError, match="one or more, none called 'reward', got"):
        Constraints(made)


def test_a_batch_that_no_constraint_applies_to_learns_of_the_reward_alone(policy_folder: Path, ranks: Ranks) -> None:
    learner = with_critics(policy_folder, ranks)
    rollout, scores, _ = make_rollout(ranks)
    scores |= dict.fromkeys(TABLE, torch.full((9,), -INF))
    before = learner.constraints.state_dict()
    experience, metrics = learner.experience(rollout, scores)
    assert learner.constraints.state_dict() == before
    assert not experience.cost_advantages.any()
    assert not any(key.endswith(("_constraint", "_unsafe_fraction")) for key in metrics)
    metrics = learner.update(experience)
    assert all(metrics[f"{name}_value_loss"] == 0 for name in TABLE) and metrics["reward_value_loss"] > 0
    assert math.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0


def test_states_of_several_go_on_where_they_were(policy_folder: Path, ranks: Ranks) -> None:
    learner = worker.make_learner(worker.make_config({"advantage": "rloo"}), policy_folder, ranks)
    rollout, scores, _ = make_rollout(ranks)
    learner.constraints = make_constraints(3)
    learner.experience(rollout, scores)
    state = learner.state_dict()
    assert set(state["multipliers"]) == set(TABLE)
    learner.experience(rollout, scores)
    expected = learner.constraints.multipliers
    learner.constraints = make_constraints(3)
    learner.load_state_dict(state)
    learner.experience(rollout, scores)
    assert learner.constraints.multipliers == expected


UPDATES = {
    "gae": {},
    "whitened": {"whiten": True, "reduction": "token_mean"},
}


def updates(policy_folder: Path, ranks: Ranks, tokens: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, settings in UPDATES.items():
        result = worker.one_update(with_critics(policy_folder, ranks, tokens, **settings), ranks)
        found[name] = {key: result[key] for key in ("gradients", "weights", "metrics")}
    return found


def on_two(folder: Path) -> dict[str, dict[str, Any]]:
    worker.make_rollout = make_rollout  # type: ignore[assignment]
    return updates(folder / "policy", start_distributed(), 30)


@pytest.mark.slow
def test_the_update_does_not_depend_on_ranks_or_micro_batches(ranks: Ranks, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    whole = updates(tmp_path / "policy", ranks, 4096)
    two = on_ranks(2, "tests.learning.test_constraints:on_two", tmp_path)[0]
    for other in (updates(tmp_path / "policy", ranks, 40), two):
        for name in UPDATES:
            assert norm_wise(other[name]["gradients"], whole[name]["gradients"]) <= 1e-5, name
            assert norm_wise(other[name]["weights"], whole[name]["weights"]) <= 1e-5, name
            for key, value in whole[name]["metrics"].items():
                assert other[name]["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
