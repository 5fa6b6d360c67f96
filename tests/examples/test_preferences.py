"""The example's split, statistics and baseline. No model is loaded and nothing downloaded."""

import math

import pytest

from examples.preferences import compare, prepare
from repo_fast.data import Candidate, Preference


def test_the_split_is_fixed_and_keeps_every_line_once():
    lines = [f"{i}\n" for i in range(2312)]
    train, held_out = prepare.split(lines)
    assert (len(train), len(held_out)) == (1850, 462)
    assert sorted([*train, *held_out], key=int) == lines
    assert prepare.split(lines) == (train, held_out)
    # Drawn at random rather than cut off at an end.
    assert 0.4 < sum(int(line) < 1156 for line in held_out) / 462 < 0.6


def test_wilson_of_a_known_case():
    # 15 of 20, from the formula with z = 1.96 worked by hand: (0.75 + 0.09604 +- 0.20497...) / 1.19208
    low, high = compare.wilson(15, 20)
    assert low == pytest.approx(0.5313, abs=5e-4) and high == pytest.approx(0.8881, abs=5e-4)


def test_mcnemar_counts_only_pairs_that_one_alone_gets_right():
    ours = [True] * 8 + [False] + [True, False] * 5
    theirs = [False] * 8 + [True] + [True, False] * 5
    only_ours, only_theirs, p = compare.mcnemar(ours, theirs)
    assert (only_ours, only_theirs) == (8, 1)
    assert p == pytest.approx(2 * (1 + 9) / 2**9)
    assert compare.mcnemar([True], [True])[2] == 1.0


def test_the_paired_interval_is_that_of_the_difference():
    ours, theirs = [True, True, False, False] * 100, [True, False, True, False] * 100
    low, high = compare.paired_interval(ours, theirs)
    # Gains of +1, -1 and 0 with variance 1/2: a standard error of sqrt(1 / 800).
    assert low == pytest.approx(-1.96 * math.sqrt(1 / 800), abs=0.01)
    assert high == pytest.approx(1.96 * math.sqrt(1 / 800), abs=0.01)


def test_the_baseline_learns_which_words_are_preferred():
    pytest.importorskip("sklearn", reason="needs examples/preferences/requirements.txt")

    def pairs(count: int) -> list[Preference]:
        rows = [
            (f"thing {i % 7}", f"i will not help with thing {i % 5}", f"sure do thing {i % 5}") for i in range(count)
        ]
        return [Preference((Candidate((a,), better), Candidate((a,), worse))) for a, better, worse in rows]

    assert all(compare.baseline(pairs(60), pairs(9)))
    turned = [Preference(pair.candidates[::-1]) for pair in pairs(9)]
    assert not any(compare.baseline(pairs(60), turned))
