"""The losses of reward and cost models against hand-worked examples, in float64, gradients included."""

import math

import pytest
import torch

from repo_fast.objective.preference import mean_over_heads, preference_loss

LN3 = math.log(3)
# A pair labelled unsafe and safe; a safe single response; a pair without labels; a pair of which one is labelled; an
# unsafe single response. (score, label) of each response.
MIXED = [
    [(0.7, 1), (-0.4, -1)],
    [(0.3, -1)],
    [(-1.1, 0), (0.9, 0)],
    [(2.0, 0), (1.5, 1)],
    [(-0.6, 1)],
]


def loss_of(examples, **settings):
    """The loss of examples of (score, label), and the scores that it is a function of."""
    responses = [(i, score, label) for i, example in enumerate(examples) for score, label in example]
    scores = torch.tensor([score for _, score, _ in responses], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([i for i, _, _ in responses], dtype=torch.int64)
    labels = torch.tensor([label for _, _, label in responses], dtype=torch.float64)
    return preference_loss(scores, ids, labels, **settings), scores


def term(x, smoothing):
    """-log sigma(x), mixed with its opposite, and its derivative."""
    value = (1 - smoothing) * math.log(1 + math.exp(-x)) + smoothing * math.log(1 + math.exp(x))
    return value, 1 / (1 + math.exp(-x)) - (1 - smoothing)


def worked(examples, margin=0.0, smoothing=0.0, regularization=0.0):
    """(ranking, sign, penalty), and the gradient of the loss, by the formulas, a response at a time."""
    ranking, sign, penalty, gradient = 0.0, 0.0, 0.0, []
    for example in examples:
        slopes = [0.0] * len(example)
        if len(example) == 2:
            value, slope = term(example[0][0] - example[1][0] - margin, smoothing)
            ranking += value
            slopes = [slope, -slope]
        for i, (score, label) in enumerate(example):
            if label:
                value, slope = term(label * score, smoothing)
                sign += value
                slopes[i] += label * slope
            penalty += score**2 / len(example)
            slopes[i] += regularization * 2 * score / len(example)
        gradient += slopes
    return (ranking, sign, penalty), gradient


def test_a_reward_pair_by_hand():
    """sigma(ln 3) = 3/4."""
    loss, scores = loss_of([[(LN3, 0), (0.0, 0)]])
    loss.loss.backward()
    assert loss.loss.item() == loss.ranking.item() == pytest.approx(math.log(4 / 3), rel=1e-14)
    assert loss.sign.item() == 0
    assert scores.grad.tolist() == pytest.approx([-1 / 4, 1 / 4], rel=1e-14)


def test_a_cost_pair_by_hand():
    """sigma(ln 3 + ln 3) = 9/10, and each response on its side with 3/4."""
    loss, scores = loss_of([[(LN3, 1), (-LN3, -1)]], regularization=0.5)
    loss.loss.backward()
    assert loss.ranking.item() == pytest.approx(math.log(10 / 9), rel=1e-14)
    assert loss.sign.item() == pytest.approx(2 * math.log(4 / 3), rel=1e-14)
    assert loss.penalty.item() == pytest.approx(LN3**2, rel=1e-14)
    assert loss.loss.item() == pytest.approx(math.log(10 / 9) + 2 * math.log(4 / 3) + 0.5 * LN3**2, rel=1e-14)
    slope = -1 / 10 - 1 / 4 + 0.5 * LN3
    assert scores.grad.tolist() == pytest.approx([slope, -slope], rel=1e-14)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"margin": 0.8},
        {"smoothing": 0.1},
        {"regularization": 0.3},
        {"margin": 0.8, "smoothing": 0.2, "regularization": 0.3},
    ],
)
def test_a_mixed_batch_equals_the_formulas(settings):
    names = {"smoothing": "label_smoothing"}
    loss, scores = loss_of(MIXED, **{names.get(name, name): value for name, value in settings.items()})
    (ranking, sign, penalty), gradient = worked(MIXED, **settings)
    assert [part.item() for part in loss[1:]] == pytest.approx([ranking, sign, penalty], rel=1e-12)
    whole = ranking + sign + settings.get("regularization", 0.0) * penalty
    assert loss.loss.item() == pytest.approx(whole, rel=1e-12)
    loss.loss.backward()
    assert scores.grad.tolist() == pytest.approx(gradient, rel=1e-12)
    assert loss.loss.dtype == torch.float64
    assert not any(part.requires_grad for part in loss[1:])


def test_examples_do_not_depend_on_their_company():
    """Singles beside each other are no pair, and neither are the end and the start of a batch."""
    alone = [loss_of([example], regularization=0.3)[0] for example in MIXED]
    together = loss_of(MIXED, regularization=0.3)[0]
    for name in together._fields:
        expected = sum(getattr(loss, name).item() for loss in alone)
        assert getattr(together, name).item() == pytest.approx(expected, rel=1e-12), name
    assert loss_of([[(0.3, 1)], [(-0.7, 1)], [(2.0, -1)]])[0].ranking.item() == 0


def test_a_cost_above_0_is_unsafe():
    """A step down the gradient moves an unsafe response up, a safe one down; a wrong label costs more."""
    loss, scores = loss_of([[(0.0, 1)], [(0.0, -1)]])
    loss.loss.backward()
    assert scores.grad.tolist() == [-0.5, 0.5]
    for score, label in ((2.0, 1), (-2.0, -1)):
        right, wrong = loss_of([[(score, label)]])[0], loss_of([[(score, -label)]])[0]
        # -log sigma(-2) = 2 - log sigma(2).
        assert wrong.loss.item() == pytest.approx(right.loss.item() + 2, rel=1e-12)


@pytest.mark.parametrize("labels", [(0, 0), (1, -1)])
def test_swapping_a_pair_raises_its_loss(labels):
    right, wrong = (1.5, labels[0]), (-0.5, labels[1])
    swapped = [(wrong[0], labels[0]), (right[0], labels[1])]
    assert loss_of([swapped])[0].loss > loss_of([[right, wrong]])[0].loss + 1.9


def test_the_margin_is_part_of_the_ranking_alone():
    plain = loss_of([[(1.0, 1), (0.5, -1)]])[0]
    shifted = loss_of([[(1.0, 1), (0.5, -1)]], margin=0.5)[0]
    # The difference just reaches it: sigma(0).
    assert shifted.ranking.item() == pytest.approx(math.log(2), rel=1e-14) and plain.ranking < shifted.ranking
    assert shifted.sign == plain.sign


def test_label_smoothing_at_its_ends():
    plain, none = loss_of(MIXED)[0], loss_of(MIXED, label_smoothing=0.0)[0]
    assert none == plain
    # With half of the labels wrong the order and the labels say nothing.
    half = loss_of(MIXED, label_smoothing=0.5)[0].loss.item()
    turned = [[(score, -label) for score, label in example[::-1]] for example in MIXED]
    assert loss_of(turned, label_smoothing=0.5)[0].loss.item() == pytest.approx(half, rel=1e-12)
    assert loss_of(turned)[0].loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)


def test_the_penalty_is_the_mean_over_an_examples_responses():
    pair, single = loss_of([[(3.0, 0), (1.0, 0)]])[0], loss_of([[(3.0, 1)]])[0]
    assert (pair.penalty.item(), single.penalty.item()) == (5.0, 9.0)
    assert loss_of([[(3.0, 1)]], regularization=2.0)[0].loss.item() == pytest.approx(single.loss.item() + 18.0)


def test_responses_without_labels_have_no_sign_term():
    """As with a reward model; a label on one side counts for that side alone."""
    pair = [(0.7, 0), (-0.4, 0)]
    assert loss_of([pair])[0].sign.item() == 0
    half = loss_of([[(0.7, 0), (-0.4, 1)]])[0]
    assert half.sign.item() == pytest.approx(math.log(1 + math.exp(0.4)), rel=1e-14)
    assert half.ranking == loss_of([pair])[0].ranking


def test_an_empty_batch_is_0_and_differentiable():
    """What a rank without responses computes: its backward must run."""
    score = torch.ones(1, requires_grad=True)
    none = torch.empty(0)
    loss = preference_loss(score[:0], none.long(), none, margin=0.3, label_smoothing=0.1, regularization=0.2)
    assert [part.item() for part in loss] == [0.0] * 4
    loss.loss.backward()
    assert score.grad.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_do_not_overflow(dtype):
    """exp(1000) is infinite in both."""
    scores = torch.tensor([-1000.0, 1000.0, -1000.0, 1000.0], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype)
    loss = preference_loss(scores, torch.tensor([0, 0, 1, 2]), labels)
    loss.loss.backward()
    assert loss.loss.dtype == dtype
    assert (loss.ranking.item(), loss.sign.item()) == (2000.0, 1000.0)
    assert scores.grad.tolist() == [-1.0, 1.0, -1.0, 0.0]


def test_gradients_by_differences():
    ids, labels = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0]).double()

    def loss(scores):
        return preference_loss(scores, ids, labels, margin=0.2, label_smoothing=0.1, regularization=0.3).loss

    scores = torch.tensor([0.3, -0.2, 1.1, -0.7, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (scores,))


@pytest.mark.parametrize("heads", [1, 3])
def test_several_heads_have_the_mean_of_their_losses(heads):
    """Against a loop over heads, examples and responses; orders either way, and pairs without one."""
    settings = {"margin": 0.8, "smoothing": 0.2, "regularization": 0.3}
    generator = torch.Generator().manual_seed(0)
    sizes = [2, 1, 2, 2, 1]
    scores = torch.randn(sum(sizes), heads, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(-1, 2, (sum(sizes), heads), generator=generator).double()
    orders = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)[:, :heads]
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    given = {"margin": 0.8, "label_smoothing": 0.2, "regularization": 0.3}
    loss = mean_over_heads(
        [preference_loss(scores[:, k], ids, labels[:, k], orders[:, k], **given) for k in range(heads)]
    )
    loss.loss.backward()
    expected, parts = torch.zeros(sum(sizes), heads, dtype=torch.float64), [0.0] * 3
    for k in range(heads):
        pair, place = 0, 0
        for size in sizes:
            own = [(float(scores[place + i, k]), float(labels[place + i, k])) for i in range(size)]
            order = float(orders[pair, k]) if size == 2 else 0.0
            # A pair without an order has the terms of its responses, and half of their penalties.
            turned = own[::-1] if order < 0 else own
            found, slopes = worked([turned], **settings)
            if size == 2 and order == 0:
                value, slope = term(turned[0][0] - turned[1][0] - settings["margin"], settings["smoothing"])
                found, slopes = (found[0] - value, *found[1:]), [slopes[0] - slope, slopes[1] + slope]
            for i, slope in enumerate(slopes[::-1] if order < 0 else slopes):
                expected[place + i, k] = slope / heads
            parts = [whole + part / heads for whole, part in zip(parts, found, strict=True)]
            pair, place = pair + (size == 2), place + size
    assert [part.item() for part in loss[1:]] == pytest.approx(parts, rel=1e-12)
    assert loss.loss.item() == pytest.approx(parts[0] + parts[1] + 0.3 * parts[2], rel=1e-12)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-12, atol=1e-14)
    assert loss.loss.dtype == torch.float64 and not any(part.requires_grad for part in loss[1:])
