"""YAML of others is plain values, or one line that says what is wrong with it."""

import datetime

import pytest

from repo_fast.report.plain_yaml import load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("", None), ("a: [1, 2.5, yes]\n", {"a": [1, 2.5, True]}), ("a: 2026-11-29", {"a": datetime.date(2026, 11, 29)})],
)
def test_plain_values(text: str, value: object) -> None:
    assert load_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\0", "special characters are not allowed"),
        ("a: \ud800", "special characters are not allowed"),
        ("!!int ''", r"a value does not fit its tag \(IndexError\)"),
        ("!!bool maybe", r"a value does not fit its tag \(KeyError\)"),
        ("!!timestamp x", r"a value does not fit its tag \(AttributeError\)"),
        ("!!map [1]", r"a value does not fit its tag \(TypeError\)"),
        ("!!set 3", "not enough values"),
        (f"!!int {'9' * 5000}", "4300 digits"),
        ("a: 2026-13-45", "month must be in"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("? [1]\n: 2", "unhashable key"),
        ("- &a\n- *b", "undefined alias"),
        ("&a [*a]", "its aliases stand for more than 100,000 values"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(text)
    assert "\n" not in str(caught.value)
