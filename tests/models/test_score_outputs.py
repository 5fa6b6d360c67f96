"""Score models with several outputs: each is normalised by its own, has a name, and is written bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from repo_fast.errors import InputError
from repo_fast.models.score_checkpoint import find_output, output_names
from repo_fast.models.score_writing import convert_score_model
from tests.models.test_score_checkpoint import (
    ACTIVE,
    CLASSES,
    ROWS,
    equal_tensors,
    load,
    rewritten,
    scores,
    settings,
    tensors,
)
from tests.tiny import save_beaver, save_sequence_classifier

NAMES = ["harm", "insult", "LABEL_0"]
SEVERAL = {"outputs": 3, "normalizer": ([0.5, -1.0, 2.0], [4.0, 0.25, 1.5])}


@pytest.mark.parametrize("layout", CLASSES)
@pytest.mark.parametrize("score_type", ["reward", "cost"])
def test_several_outputs_are_normalised_each_by_its_own_and_written_bit_for_bit(tmp_path, layout, score_type):
    overrides = {"do_normalize": True, "score_type": score_type, "score_names": NAMES}
    source = save_beaver(tmp_path / "source", CLASSES[layout], bias=True, config_overrides=overrides, **SEVERAL)
    model = load(source)
    state = tensors(source)
    with torch.no_grad():
        hidden = torch.stack([model.trunk(row[None]).last_hidden_state[0, -1] for row in ROWS])
    expected = hidden @ state["score_head.weight"].T + state["score_head.bias"]
    if score_type == "reward":
        expected = expected - state["normalizer.mean"]
    torch.testing.assert_close(scores(model), expected / state["normalizer.var"].sqrt(), rtol=1e-5, atol=1e-5)
    assert output_names(str(source)) == tuple(NAMES)
    written = rewritten(model, tmp_path / "written", layout, score_type)
    assert equal_tensors(source, written) and torch.equal(scores(load(written)), scores(model))
    assert {key: settings(written)[key] for key in ("score_names", "score_dim")} == {
        "score_names": NAMES,
        "score_dim": 3,
    }


def test_plain_transformers_loads_several_outputs_under_their_names(tmp_path):
    source = save_beaver(tmp_path / "source", outputs=3, normalizer=None, config_overrides={"score_names": NAMES})
    convert_score_model(str(source), tmp_path / "converted", layout="sequence-classification")
    rewritten(load(source), tmp_path / "written", "sequence-classification")
    for folder in ("converted", "written"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.id2label == dict(enumerate(NAMES)) and model.config.num_labels == 3
        with torch.no_grad():
            logits = torch.cat([model.eval()(row[None]).logits.float() for row in ROWS])
        torch.testing.assert_close(logits, scores(load(source)), rtol=1e-5, atol=1e-5)
        assert output_names(str(tmp_path / folder)) == tuple(NAMES)


def test_outputs_without_names_go_by_their_numbers(tmp_path):
    source = save_beaver(tmp_path / "source", outputs=3, normalizer=None)
    assert output_names(str(source)) == ("0", "1", "2") and find_output(str(source), "2", "cost.head") == 2
    assert output_names(str(save_beaver(tmp_path / "one"))) == ()
    assert output_names(str(save_sequence_classifier(tmp_path / "label"))) == ()
    named = save_sequence_classifier(tmp_path / "named", id2label={0: "harmful"}, label2id={"harmful": 0})
    assert find_output(str(named), "harmful", "cost.head") == find_output(str(named), None, "cost.head") == 0


def named(path, names):
    return save_beaver(path, config_overrides={"score_names": names}, **SEVERAL)


def odd_bias(path):
    state = load_file(path / "model.safetensors") | {"score_head.bias": torch.ones(1)}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: save_beaver(p, outputs=3, bias=True, config_overrides=ACTIVE),
            "normalizer.mean of shape .1., expected .3.",
        ),
        (lambda p: odd_bias(save_beaver(p, bias=True, **SEVERAL)), "score_head.bias of shape .1., expected .3."),
        (lambda p: named(p, ["harm"]), r"has score_names \['harm'\], expected 3 different names, one for each output"),
        (lambda p: named(p, ["harm", "harm", "insult"]), "expected 3 different names"),
        (lambda p: named(p, "abc"), "has score_names 'abc', expected 3 different names"),
        (lambda p: named(p, [0, 1, 2]), "expected 3 different names"),
        (lambda p: save_beaver(p, config_overrides={"score_dim": 0}), "score_dim 0, expected a whole number of at le"),
        (
            lambda p: save_sequence_classifier(p, num_labels=2, id2label={0: "a", 1: "a"}, label2id={"a": 0}),
            r"has id2label \['a', 'a'\], expected 2 different names",
        ),
    ],
)
def test_folders_whose_outputs_are_not_what_they_say(tmp_path, make, message):
    with pytest.raises(InputError, match=message) as caught:
        load(make(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
