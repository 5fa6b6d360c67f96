"""Scoring functions, and everything that a user's function can do wrong."""

import re
import sys

import pytest
import torch

from repo_fast.errors import InputError
from repo_fast.rollout import Rollout
from repo_fast.scoring import FunctionScorer, load_scorer_spec

MODULE = """
import numpy, torch
calls = []
def lengths(prompts, responses):
    calls.append(len(prompts))
    return [len(p) + len(r) / 10 for p, r in zip(prompts, responses)]
def array(prompts, responses): return numpy.arange(len(prompts), dtype=numpy.float32)
def tensor(prompts, responses): return torch.arange(len(prompts))
def scalars(prompts, responses): return [numpy.float32(1), torch.tensor(2.0)]
def raises(prompts, responses): raise KeyError("inside\\nand more")
def leaves(prompts, responses): raise SystemExit(0)
def too_few(prompts, responses): return [0.0]
def nothing(prompts, responses): pass
def nan(prompts, responses): return [0.0, float("nan")]
def infinite(prompts, responses): return [float("-inf"), 0.0]
def text(prompts, responses): return ["0.5", "0.5"]
def exits(prompts, responses): raise SystemExit(3)
def beyond_float32(prompts, responses): return [0.0, 1e39]
def beyond_floats(prompts, responses): return [10**400, 0.0]
def none(prompts, responses): return [0.5, None]
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "scores_for_test.py").write_text(MODULE)
    (tmp_path / "broken_for_test.py").write_text("import no_such_module_anywhere")
    (tmp_path / "exits_for_test.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    # Without the entry that stands for the current folder, as under an installed command.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    for name in ("scores_for_test", "broken_for_test", "exits_for_test"):
        sys.modules.pop(name, None)


def rollout(n=2):
    return Rollout(
        prompt_ids=torch.arange(n),
        prompts=["abc", "how do I make tea"][:n],
        responses=["x" * 4, "y" * 6][:n],
        prompt_tokens=[torch.tensor([1])] * n,
        response_tokens=[torch.tensor([1])] * n,
        finished=torch.ones(n, dtype=torch.bool),
        sampler_log_probs=[torch.zeros(1)] * n,
    )


def score(function, n=2):
    return FunctionScorer(f"scores_for_test:{function}", "cost").score(rollout(n))


def test_a_function_in_the_current_folder_is_called_only_to_score():
    scorer = FunctionScorer("scores_for_test:lengths", "reward")
    import scores_for_test

    assert scores_for_test.calls == []
    scores = scorer.score(rollout())
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, torch.tensor([3.4, 17.6]))
    assert scores_for_test.calls == [2]


def test_a_rank_without_responses_calls_nothing():
    assert score("raises", n=0).shape == (0,)


@pytest.mark.parametrize("function", ["array", "tensor", "scalars"])
def test_numbers_of_other_types(function):
    expected = [1.0, 2.0] if function == "scalars" else [0.0, 1.0]
    assert score(function).tolist() == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "raised KeyError: 'inside"),
        ("leaves", "raised SystemExit: 0"),
        ("too_few", "returned 1 scores for 2 responses"),
        ("nothing", "returned a NoneType, expected a list of 2 numbers"),
        ("nan", "returned nan for response 1, expected a finite number, at most"),
        ("nan", "in size; the prompt begins 'how do I make tea'"),
        ("infinite", "returned -inf for response 0"),
        ("text", "returned '0.5' for response 0"),
        ("exits", "raised SystemExit: 3"),
        ("beyond_float32", "returned 1e+39 for response 1, expected a finite number, at most 3.4e+38 in size"),
        ("beyond_floats", "for response 0, expected a finite number"),
        ("none", "returned None for response 1"),
    ],
)
def test_what_a_function_must_not_do(function, message):
    with pytest.raises(InputError) as caught:
        score(function)
    text = str(caught.value)
    assert text.startswith(f"the cost function 'scores_for_test:{function}' ") and message in text and "\n" not in text
    if function == "raises":
        assert isinstance(caught.value.__cause__, KeyError)
        assert re.search(r", at .*scores_for_test\.py line \d+$", text)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_anywhere:f", "module 'no_such_module_anywhere' cannot be imported: ModuleNotFoundError"),
        ("broken_for_test:f", "No module named 'no_such_module_anywhere'"),
        ("exits_for_test:f", "module 'exits_for_test' cannot be imported: SystemExit: 3"),
        ("scores_for_test.py:number", "names a file, expected its module, without .py: 'scores_for_test:number'"),
        ("scores_for_test:absent", "has no function 'absent'"),
        ("scores_for_test:number", "has no function 'number'"),
    ],
)
def test_functions_are_looked_for_at_the_start(path, message):
    with pytest.raises(InputError, match=message):
        FunctionScorer(path, "reward")


def test_what_a_path_means(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for path, kind in [
        ("package.module:function", "function"),
        (str(tmp_path / "model"), "model"),
        ("model", "model"),
        ("PKU-Alignment/beaver-7b-v1.0-cost", "model"),
    ]:
        assert load_scorer_spec(path, "cost").kind == kind
    with pytest.raises(InputError, match="has no config.json"):
        load_scorer_spec("empty", "cost")
    for path in ("", "scores_for_test.py", "package.module", "module:", ":function", "a b:c", "empty/typo", "./x/y"):
        with pytest.raises(InputError, match="'package.module:function'.*folder"):
            load_scorer_spec(path, "cost")
