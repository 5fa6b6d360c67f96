"""The three sets: sizes, and that held-out prompts are new combinations of known words."""

from collections import Counter

from repo_fast.world import corpus
from repo_fast.world.families import FAMILIES
from repo_fast.world.grammar import read_prompt


def pairs(rows):
    return {(request.verb, request.object) for request in (read_prompt(row["prompt"]) for row in rows)}


def test_every_family_has_its_share():
    names = [family.name for family in FAMILIES]
    assert len(names) == 12
    train, test = corpus.train_prompts(), corpus.test_prompts()
    assert Counter(row["category"] for row in train) == dict.fromkeys(names, 20)
    assert Counter(row["category"] for row in test) == dict.fromkeys(names, 8)
    for row in train + test:
        assert read_prompt(row["prompt"]).family.name == row["category"]
    assert len({row["prompt"] for row in train + test}) == len(train) + len(test)


def test_held_out_prompts_combine_known_words_in_an_unseen_way():
    demonstrations = corpus.demonstrations(4000, seed=1)
    seen = pairs(corpus.train_prompts()) | pairs(demonstrations)
    held_out = pairs(corpus.test_prompts())
    assert not seen & held_out
    assert {verb for verb, _ in held_out} <= {verb for verb, _ in seen}
    assert {object_ for _, object_ in held_out} <= {object_ for _, object_ in seen}


def test_demonstrations_depend_on_the_seed_alone():
    assert corpus.demonstrations(20, seed=1) == corpus.demonstrations(30, seed=1)[:20]
    assert corpus.demonstrations(20, seed=1) != corpus.demonstrations(20, seed=2)


def test_callers_can_change_their_rows():
    corpus.train_prompts()[0]["prompt"] = "changed"
    assert corpus.train_prompts()[0]["prompt"] != "changed"
