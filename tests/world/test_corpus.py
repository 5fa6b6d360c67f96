"""The sets: sizes, labels, balance, and that held-out prompts are new combinations of known words."""

import time
from collections import Counter, defaultdict

import pytest

from repo_fast.world import corpus, rules
from repo_fast.world.families import FAMILIES
from repo_fast.world.grammar import MAX_RESPONSE_TOKENS, normalize, read_prompt


def pairs(rows):
    return {(request.verb, request.object) for request in (read_prompt(row["prompt"]) for row in rows)}


def test_every_family_has_its_share():
    names = [family.name for family in FAMILIES]
    assert len(names) == 12
    train, test = corpus.train_prompts(), corpus.test_prompts()
    assert Counter(row["category"] for row in train) == dict.fromkeys(names, 20)
    assert Counter(row["category"] for row in test) == dict.fromkeys(names, 8)
    certify = corpus.certify_prompts()
    assert Counter(row["category"] for row in certify) == dict.fromkeys(names, 24)
    for row in train + test + certify:
        assert read_prompt(row["prompt"]).family.name == row["category"]
    assert len({row["prompt"] for row in train + test + certify}) == len(train) + len(test) + len(certify)


def test_held_out_prompts_combine_known_words_in_an_unseen_way():
    demonstrations = corpus.demonstrations(4000, seed=1)
    seen = pairs(corpus.train_prompts()) | pairs(demonstrations)
    seen |= pairs(corpus.preferences(2000, seed=1, held_out=False))
    held_out = pairs(corpus.test_prompts() + corpus.certify_prompts()) | pairs(
        corpus.demonstrations(500, seed=1, held_out=True)
    )
    held_out |= pairs(corpus.preferences(500, seed=1, held_out=True))
    assert not seen & held_out
    assert {verb for verb, _ in held_out} <= {verb for verb, _ in seen}
    assert {object_ for _, object_ in held_out} <= {object_ for _, object_ in seen}


def test_demonstrations_depend_on_the_seed_alone():
    assert corpus.demonstrations(20, seed=1) == corpus.demonstrations(30, seed=1)[:20]
    assert corpus.demonstrations(20, seed=1) != corpus.demonstrations(20, seed=2)


def test_callers_can_change_their_rows():
    corpus.train_prompts()[0]["prompt"] = "changed"
    assert corpus.train_prompts()[0]["prompt"] != "changed"


@pytest.fixture(scope="module")
def preferences():
    start = time.process_time()
    rows = corpus.preferences(20480, seed=0, held_out=False)
    assert time.process_time() - start < 20
    return rows


def test_preferences_depend_on_the_seed_alone(preferences):
    assert corpus.preferences(20, seed=0, held_out=False) == preferences[:20]
    assert corpus.preferences(20, seed=1, held_out=False) != preferences[:20]


def test_preferences_are_the_rules(preferences):
    prompts = [row["prompt"] for row in preferences]
    responses = [[row[f"response_{i}"] for row in preferences] for i in range(2)]
    rewards = [rules.reward(prompts, side) for side in responses]
    costs = [rules.cost(prompts, side) for side in responses]
    for n, row in enumerate(preferences):
        better, safer = row["better_response_id"], row["safer_response_id"]
        assert rewards[better][n] > rewards[1 - better][n] + 1e-6
        assert costs[safer][n] < costs[1 - safer][n] - 1e-6
        assert [row["is_response_0_safe"], row["is_response_1_safe"]] == [costs[0][n] <= 0, costs[1][n] <= 0]
        assert type(better) is int and type(safer) is int
        for i in range(2):
            cost, severity = costs[i][n], row[f"response_{i}_severity_level"]
            # 1 up to a cost of 1, 2 up to 2, 3 above.
            assert severity == (cost > 0) + (cost > 1) + (cost > 2) and type(severity) is int


def test_preferences_are_balanced(preferences):
    unsafe = defaultdict(list)
    for row in preferences:
        tier = read_prompt(row["prompt"]).family.tier
        unsafe[tier] += [not row["is_response_0_safe"], not row["is_response_1_safe"]]
    shares = {tier: sum(labels) / len(labels) for tier, labels in unsafe.items()}
    # Hardly anything is unsafe in a harmless family.
    assert shares.pop("harmless") < 0.1
    assert all(0.3 < share < 0.75 for share in shares.values())
    assert 0.4 < sum(map(sum, unsafe.values())) / (2 * len(preferences)) < 0.6
    for field in ("better_response_id", "safer_response_id"):
        assert 0.45 < sum(row[field] for row in preferences) / len(preferences) < 0.55
    # The two models learn different things.
    agreeing = sum(row["better_response_id"] == row["safer_response_id"] for row in preferences) / len(preferences)
    assert 0.2 < agreeing < 0.5


def test_preferences_hold_malformed_text_that_a_policy_could_write(preferences):
    prompts = [row["prompt"] for row in preferences for _ in range(2)]
    responses = [row[f"response_{i}"] for row in preferences for i in range(2)]
    assert all(response.strip() and response == normalize(response) for response in responses)
    assert max(len(response.split()) for response in responses) < MAX_RESPONSE_TOKENS
    malformed = rules.well_formed(prompts, responses).count(False) / len(responses)
    assert 0.12 < malformed < 0.3
    open_ended = sum(not response.endswith(".") for response in responses) / len(responses)
    short = sum(len(response.split()) <= 3 for response in responses) / len(responses)
    assert open_ended > 0.04 and short > 0.02
