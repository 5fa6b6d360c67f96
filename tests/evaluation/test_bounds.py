"""The bounds of certificates: textbook values, SciPy's, hand-worked ones, and how often they err."""

import numpy as np
import pytest
from scipy import stats

from experiments.coverage import cells
from repo_fast.evaluation import bounds


@pytest.mark.parametrize(
    ("count", "n", "bound"),
    # None of n: 1 - 0.05^(1/n), "the rule of three"; one of 20: the root of (1 - u)^20 + 20 u (1 - u)^19 = 0.05.
    [(0, 100, 0.0295), (0, 10, 0.2589), (1, 20, 0.2161), (20, 20, 1.0)],
)
def test_the_binomial_bound_is_clopper_and_pearsons(count: int, n: int, bound: float) -> None:
    assert bounds.binomial_bound(count, n, 0.05) == pytest.approx(bound, abs=5e-5)
    # SciPy's two-sided interval at twice the level has the same upper end.
    exact = stats.binomtest(count, n).proportion_ci(0.9, method="exact").high
    assert bounds.binomial_bound(count, n, 0.05) == pytest.approx(exact, abs=1e-12)


def test_binomial_p_values_are_those_of_scipys_test() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        n = int(generator.integers(1, 300))
        count, limit = int(generator.integers(0, n + 1)), float(generator.random())
        less, greater = (stats.binomtest(count, n, limit, side).pvalue for side in ("less", "greater"))
        assert bounds.binomial_p(count, n, limit) == pytest.approx(less, abs=1e-12)
        assert bounds.binomial_reverse_p(count, n, limit) == pytest.approx(greater, abs=1e-12)
        bound = bounds.binomial_bound(count, n, 0.05)
        if count < n:
            assert bounds.binomial_p(count, n, bound) == pytest.approx(0.05)


def test_students_p_values_and_bounds_are_scipys() -> None:
    values = np.random.default_rng(1).normal(1.0, 2.0, 40)
    expected = stats.ttest_1samp(values, 1.5, alternative="less")
    assert bounds.student_p(values, 1.5) == pytest.approx(expected.pvalue)
    assert bounds.student_bound(values, 0.05) == pytest.approx(expected.confidence_interval(0.95).high)
    # 0.1 three times is not its mean to the last bit.
    for equal in ([1.0] * 40, [0.1] * 3):
        assert np.isnan(bounds.student_p(equal, 2.0)) and np.isnan(bounds.student_bound(equal, 0.05))


def test_betting_by_hand() -> None:
    # No value is known before the first: variance 1/4, bet sqrt(2 ln 20 / (n / 4)), at most 0.75 / (1 - limit).
    first = min(np.sqrt(2 * np.log(20) / (2 * 0.25)), 0.75 / 0.5)
    assert first == 1.5
    # After a 0: mean (1/2 + 0) / 2 = 1/4, variance (1/4 + 1/16) / 2; the largest bet again.
    assert bounds.betting_p([0.0, 0.0], 0.5, 0.05) == pytest.approx(1 / (1 + 1.5 * 0.5) ** 2)
    # The second loses; the best capital was the first's.
    assert bounds.betting_p([0.0, 1.0], 0.5, 0.05) == pytest.approx(1 / (1 + 1.5 * 0.5))
    # The first loses, then a 0 wins it back in part: never above 1.
    assert bounds.betting_p([1.0, 0.0], 0.5, 0.05) == 1.0
    # A small bet where the limit is low and much is known: n = 100, no cap reached at the first.
    bet = np.sqrt(2 * np.log(20) / (100 * 0.25))
    assert bet < 0.75 / 0.9
    assert bounds.betting_p([0.0] + [1.0] * 99, 0.1, 0.05) == pytest.approx(1 / (1 + bet * 0.1))


def test_at_the_ends_of_what_can_be() -> None:
    assert bounds.betting_p([0.2, 1.0], 1.0, 0.05) == 0.0 and bounds.betting_p([1.0, 1.0], 1.0, 0.05) == 1.0
    assert bounds.betting_p([0.0] * 50, 0.0, 0.05) == 1.0
    # "The mean is at most 0" is refuted by anything above 0.
    assert bounds.betting_reverse_p([0.0, 0.1], 0.0, 0.05) == 0.0
    assert bounds.betting_reverse_p([0.0, 0.0], 0.0, 0.05) == 1.0


def test_the_betting_bound_is_where_the_p_value_is_delta() -> None:
    generator = np.random.default_rng(2)
    for n in (5, 50, 400):
        values = generator.beta(0.5, 3.0, n)
        bound = bounds.betting_bound(values, 0.05)
        grid = np.linspace(0, 1, 201)
        p = np.array([float(bounds.betting_p(values, limit, 0.05)) for limit in grid])
        assert (np.diff(p) <= 1e-12).all()
        assert ((p <= 0.05) == (grid >= bound)).all()


def test_what_comes_later_changes_no_bet() -> None:
    values = np.random.default_rng(3).random(30)
    other = values.copy()
    other[20:] = 1.0
    n_fixed = [bounds._bets(each, 0.05)[:20] for each in (values, other)]
    assert (n_fixed[0] == n_fixed[1]).all()


def test_holm_by_hand() -> None:
    assert bounds.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert bounds.holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert bounds.holm([0.02]).tolist() == [0.02]
    assert bounds.holm([float("nan"), 0.01]).tolist() == pytest.approx([1.0, 0.02])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.binomial_p(3, 2, 0.1), "count is 3 of n 2"),
        (lambda: bounds.binomial_p(0, 0, 0.1), "count is 0 of n 0"),
        (lambda: bounds.binomial_p(0, 2, 1.1), "limit is 1.1"),
        (lambda: bounds.binomial_bound(0, 2, 0.0), "delta is 0.0"),
        (lambda: bounds.betting_p([], 0.1, 0.05), "shape \\[0\\]"),
        (lambda: bounds.betting_p([0.1, 1.1], 0.1, 0.05), "0.1 to 1.1"),
        (lambda: bounds.betting_p([0.1, float("nan")], 0.1, 0.05), "within"),
        (lambda: bounds.betting_p([0.1], -0.1, 0.05), "limit is -0.1"),
        (lambda: bounds.student_p([1.0], 0.0), "at least two"),
        (lambda: bounds.student_p([1.0, float("inf")], 0.0), "finite"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_few_cells_hold_their_level_and_what_does_not_is_found() -> None:
    some = [cell for cell in cells.CELLS if cell.n <= 200][::4]
    assert {cell.bound for cell in some} == {"binomial", "betting"}
    for cell in some:
        assert cells.passes(cell, 400) <= cells.allowed(400), cell.name
    for cell in cells.PLANTED:
        assert cells.passes(cell, 400) > cells.allowed(400), cell.name


@pytest.mark.slow
def test_every_cell_holds_its_level_and_has_the_power_that_was_asked_for() -> None:
    assert len(cells.CELLS) <= 40
    for cell in cells.CELLS:
        assert cells.passes(cell, 2000) <= cells.allowed(2000), cell.name
    for cell in cells.POWER:
        assert cells.passes(cell, 2000) >= 0.8 * 2000, cell.name
    for cell in cells.PLANTED:
        assert cells.passes(cell, 2000) > cells.allowed(2000), cell.name
