"""metrics.jsonl and samples.jsonl: exact floats, valid JSON, resumes that leave no trace, and the loggers."""

import importlib
import importlib.util
import json
import math
import os
import sys

import pytest
import torch

from repo_fast.errors import InputError
from repo_fast.report.metrics import LOGGERS, MetricsLog, check_loggers, read_metrics
from repo_fast.report.samples import SampleLog


def write_metrics(folder, steps, resume_step=None, loggers=(), offset=0.0):
    log = MetricsLog(folder, loggers, {"seed": 7}, resume_step)
    for step in steps:
        log.write({"step": step, "reward": step / 3 + offset, "multiplier": None})
    log.close()


def strict_json(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_floats_come_back_bit_equal(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2, math.pi * 1e-17]
    log = MetricsLog(tmp_path, [], {}, None)
    for step, value in enumerate(values):
        log.write({"step": step, "reward": value})
    log.close()
    read = [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_nan_and_infinities_are_valid_json_and_are_restored(tmp_path):
    log = MetricsLog(tmp_path, [], {}, None)
    log.write({"step": 1, "loss": math.nan, "cost": -math.inf, "kl": math.inf, "reward": 0.5, "note": None})
    log.close()
    line = strict_json((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] is None and line["cost"] is None and line["note"] is None
    assert line["non_finite"] == {"loss": "nan", "cost": "-inf", "kl": "inf"}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "cost": -math.inf, "kl": math.inf, "reward": 0.5, "note": None}


def test_each_line_is_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path, [], {}, None)
    log.write({"step": 1, "reward": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]
    log.close()
    log.close()


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"reward": 1.0}, ValueError),
        ({"step": 1.0}, ValueError),
        ({"step": 1, "non_finite": 1}, ValueError),
        ({"step": 1, "reward": torch.tensor(1.0)}, TypeError),
    ],
)
def test_what_is_no_record_is_refused_and_leaves_no_line(tmp_path, record, error):
    log = MetricsLog(tmp_path, [], {}, None)
    with pytest.raises(error):
        log.write(record)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resumed_files_equal_those_of_an_uninterrupted_run(tmp_path):
    def samples(folder, steps, resume_step=None):
        log = SampleLog(folder, resume_step)
        for step in steps:
            log.write(step, ["é\u2028?", "b"], ["x\ny", ""], torch.tensor([0.1, step]), [1.0, -1.0], [3, 4])
        log.close()

    write_metrics(tmp_path / "whole", range(1, 7))
    samples(tmp_path / "whole", range(1, 7))
    write_metrics(tmp_path / "parts", range(1, 6))
    samples(tmp_path / "parts", range(1, 6))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "parts" / name, "a") as file:
            file.write('{"step": 3, "rew')  # what kill -9 leaves, were it even of a step that is kept
    write_metrics(tmp_path / "parts", range(4, 7), resume_step=3)
    samples(tmp_path / "parts", range(4, 7), resume_step=3)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_resume_step_zero_starts_over_and_a_missing_file_is_no_error(tmp_path):
    write_metrics(tmp_path, range(1, 4))
    write_metrics(tmp_path, range(1, 3), resume_step=0)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    (tmp_path / "metrics.jsonl").unlink()
    write_metrics(tmp_path, range(3, 5), resume_step=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4]


def test_a_kill_while_cutting_keeps_the_file(tmp_path, monkeypatch):
    write_metrics(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, [], {}, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_never_touches_a_used_folder(tmp_path):
    write_metrics(tmp_path, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="metrics.jsonl exists already"):
        MetricsLog(tmp_path, [], {}, None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["{'step': 2}", "[2]", '{"reward": 1.0}'])
def test_a_malformed_line_is_named_and_the_file_stays(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    before = path.read_bytes()
    for read in (lambda: read_metrics(path), lambda: MetricsLog(tmp_path, [], {}, 1)):
        with pytest.raises(InputError, match="line 2"):
            read()
    assert path.read_bytes() == before


def test_reading_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_samples_hold_every_field_and_survive_odd_text(tmp_path):
    log = SampleLog(tmp_path, None)
    log.write(5, ["lone \ud800", "two"], ["a\u2028b\r\n", "\x00"], [0.5, math.nan], [-1, 2], torch.tensor([9, 8]))
    log.close()
    first, second = [strict_json(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    text = {"prompt": "lone \ud800", "response": "a\u2028b\r\n"}
    assert first == {"step": 5, "prompt_id": 9, "reward": 0.5, "cost": -1.0, **text}
    assert second["response"] == "\x00" and second["reward"] is None and second["non_finite"] == {"reward": "nan"}


def test_samples_have_a_column_a_constraint_and_null_where_one_is_not_about_the_prompt(tmp_path):
    log = SampleLog(tmp_path, None)
    costs = {"harm": [0.5, -1.0], "refusal": torch.tensor([-math.inf, 1.0])}
    log.write(1, ["a", "b"], ["x", "y"], [1.0, 2.0], costs, [0, 1])
    log.close()
    rows = [strict_json(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    assert [(row["harm"], row["refusal"], len(row)) for row in rows] == [(0.5, None, 7), (-1.0, 1.0, 7)]


def test_samples_of_unequal_length_are_refused(tmp_path):
    log = SampleLog(tmp_path, None)
    with pytest.raises(ValueError):
        log.write(1, ["a", "b"], ["x", "y"], [1.0], [1.0, 2.0], [0, 1])


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_metrics(tmp_path, range(1, 6), loggers=["tensorboard"])
    write_metrics(tmp_path, range(4, 7), resume_step=3, loggers=["tensorboard"], offset=100.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    shown = {event.step: event.value for event in events.Scalars("reward")}
    assert len(events.Scalars("reward")) == 6
    assert shown == pytest.approx({step: step / 3 + (100 if step > 3 else 0) for step in range(1, 7)}, rel=1e-6)


@pytest.fixture(params=["wandb", "trackio"])
def fake_library(request, tmp_path, monkeypatch):
    """Installs a library that only remembers how it was called; yields its name."""
    library = request.param
    package = tmp_path / "site" / library
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    def log(self, metrics, step): calls.append(('log', metrics, step))\n"
        "    def finish(self): calls.append(('finish',))\n"
        "def init(**settings):\n"
        "    calls.append(('init', settings))\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    installed = sys.modules.pop(library, None)
    yield library
    sys.modules.pop(library, None)
    if installed is not None:
        sys.modules[library] = installed


def test_hosted_loggers_get_numbers_and_go_on_with_their_run(tmp_path, fake_library):
    output_dir = tmp_path / "my-run"
    write_metrics(output_dir, [1, 2], loggers=[fake_library])
    write_metrics(output_dir, [2], resume_step=1, loggers=[fake_library])
    calls = importlib.import_module(fake_library).calls
    assert [call[0] for call in calls] == ["init", "log", "log", "finish", "init", "log", "finish"]
    assert calls[1] == ("log", {"reward": 1 / 3}, 1)
    assert calls[0] == calls[4], "a resume must go on with the same run"
    assert calls[0][1]["config"] == {"seed": 7} and calls[0][1]["name"].startswith("my-run-")
    write_metrics(tmp_path / "other" / "my-run", [1], loggers=[fake_library])
    assert calls[7][1]["name"] != calls[0][1]["name"], "another run must not join it"


def test_unknown_and_missing_loggers_say_what_to_do_and_write_nothing(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'wandbb' is unknown; expected some of tensorboard, wandb, trackio"):
        MetricsLog(tmp_path / "run", ["wandbb"], {}, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in LOGGERS:
        with pytest.raises(InputError, match=f"pip install {name}") as error:
            MetricsLog(tmp_path / "run", [name], {}, None)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_wandb_left_behind_is_not_taken_for_wandb(tmp_path, monkeypatch):
    spec = importlib.util.find_spec("wandb")
    if spec is not None and spec.origin is not None:
        pytest.skip("wandb is installed here")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="pip install wandb"):
        check_loggers(["wandb"])
