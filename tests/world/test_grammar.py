"""What demonstrations look like, and that the parser reads back what was written and nothing else."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repo_fast.world import grammar
from repo_fast.world.families import FAMILIES
from repo_fast.world.grammar import PHRASINGS, Request, parse, read_prompt, sample_response, well_formed, write_prompt

FAMILY = {family.name: family for family in FAMILIES}
SCRUB = "how do i scrub the oven ?"


def test_reading_a_prompt_undoes_writing_it():
    for family, phrasing in itertools.product(FAMILIES, PHRASINGS):
        for verb, object_, situation in itertools.product(family.tools, family.objects, grammar.SITUATIONS):
            request = Request(family, verb, object_, situation)
            assert read_prompt(write_prompt(request, phrasing)) == request


def test_case_and_spacing_of_a_prompt_do_not_matter():
    assert read_prompt("How do I scrub the oven?\n") == Request(FAMILY["cleaning"], "scrub", "oven", "")
    assert read_prompt("how do i scrub the dog ?") is None


def test_clauses_of_a_family_have_one_meaning():
    for family in FAMILIES:
        kinds = grammar.extras(family)
        listed = [*family.preparations, *family.details, *family.shortcuts, *family.cautions, family.referral]
        assert len(kinds) == len(set(listed)) + len(grammar.GENERAL_CAUTIONS)
        assert not set(kinds) & {*grammar.CLOSINGS, *grammar.REFUSALS}
    words = [word for family in FAMILIES for word in (*family.tools, *family.objects)]
    assert len(words) == len(set(words)), "a word that names two tasks would make a prompt ambiguous"


def test_risky_clauses_are_not_part_of_protective_ones():
    risky = [clause for family in FAMILIES for clause in (*family.preparations, *family.details, *family.shortcuts)]
    for family in FAMILIES:
        for clause in (*family.cautions, family.referral, *grammar.GENERAL_CAUTIONS):
            assert not any(f" {risk} " in f" {clause} " for risk in risky)
            assert not any(f"{verb} the " in clause for verb in family.tools)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_demonstrations_are_well_formed_and_on_topic(family):
    rng = random.Random(0)
    for _ in range(300):
        request = Request(family, rng.choice(list(family.tools)), rng.choice(family.objects), "hurry")
        prompt, response = write_prompt(request, PHRASINGS[0]), sample_response(request, rng)
        assert well_formed(prompt, response), response
        parsed = parse(response, family)
        assert parsed.refusal or parsed.step[:2] == (request.verb, request.object)
        assert len(response.split()) + 1 <= grammar.MAX_RESPONSE_TOKENS


def test_the_longest_response_fits():
    for family in FAMILIES:
        verb, object_ = max(family.tools, key=len), family.objects[0]
        tool = max(family.all_tools, key=lambda tool: len(tool.split()))
        steps = [step.format(verb=verb, object=object_, tool=tool) for step in grammar.STEPS]
        longest_extras = sorted(grammar.extras(family), key=lambda clause: -len(clause.split()))[: grammar.MAX_EXTRAS]
        response = " . ".join([f"sure , {max(steps, key=len)}", *longest_extras, "good luck"]) + " ."
        assert parse(response, family).well_formed
        assert len(response.split()) + 1 <= grammar.MAX_RESPONSE_TOKENS, response


@pytest.mark.parametrize(
    "response",
    [
        "scrub the oven with a stiff brush .",
        "Sure, use strong bleach to scrub the oven. Wear rubber gloves.",
        "take a plunger and unclog the sink . open all windows . call a cleaner . have fun .",
        "i must decline . call a cleaner .",
    ],
)
def test_well_formed(response):
    assert well_formed(SCRUB, response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        ".",
        "sure",
        "good luck .",
        "scrub the oven with a stiff brush",
        "scrub the oven with a stiff brush . . good luck .",
        "scrub the dog with a stiff brush .",
        "scrub the oven with a comb .",
        "wear rubber gloves .",
        "scrub the oven with a stiff brush . wear rubber gloves . wear rubber gloves .",
        "scrub the oven with a stiff brush . wear a helmet .",
        "scrub the oven with a stiff brush . i must decline .",
        "scrub the oven with a stiff brush . soak it an hour . shut the door . skip the rinsing . mix two products .",
        "scrub the oven with a stiff brush . good luck . wear rubber gloves .",
        "the oven the oven the oven .",
        "\x00 ½ 語 .",
    ],
)
def test_not_well_formed(response):
    assert not well_formed(SCRUB, response)


def test_a_response_is_not_well_formed_for_another_family_or_an_unknown_prompt():
    response = "scrub the oven with a stiff brush ."
    assert not well_formed("how do i brush the dog ?", response)
    assert not well_formed("what is the time ?", response)


@given(st.text(), st.sampled_from(FAMILIES))
def test_any_text_can_be_parsed(text, family):
    assert parse(text, family).stray >= 0
