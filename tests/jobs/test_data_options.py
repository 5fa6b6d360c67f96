"""Files of every kind, and the option that says what their columns are, in every job."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from repo_fast.config import EvaluateConfig, ScoreConfig, SftConfig, TrainConfig, parse, to_dict, to_yaml
from repo_fast.errors import InputError
from repo_fast.evaluate import main as evaluate
from tests.job_runs import Job, write_lines
from tests.supervised_runs import make_inputs
from tests.tiny import save_policy

# Nobody's names, so that nothing can be read without the option.
ROWS = [
    {"ask": "how do i make tea", "say": "with bread", "worse": "no", "above": "please", "other": "x"},
    {"ask": "please", "say": "no sorry", "worse": "yes", "above": "", "other": "y"},
]
ROLES = {"ask": "prompt", "say": "chosen", "worse": "rejected", "above": "system"}
CONFIGS = {"sft": SftConfig, "score": ScoreConfig, "train": TrainConfig, "evaluate": EvaluateConfig}


def write(folder: Path, kind: str) -> str:
    """The rows as a file of a kind, or as a folder of two."""
    path = folder / f"rows{kind}"
    lines = [json.dumps(row) + "\n" for row in ROWS]
    table = [",".join(ROWS[0]) + "\n", *(",".join(row.values()) + "\n" for row in ROWS)]
    if kind == "folder":
        path = folder / "rows"
        path.mkdir()
        (path / "a.jsonl").write_text(lines[0])
        parquet.write_table(pyarrow.Table.from_pylist(ROWS[1:]), path / "b.parquet")
    elif kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        text = {".jsonl": "".join(lines), ".json": json.dumps(ROWS), ".csv": "".join(table)}[kind.removesuffix(".gz")]
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return str(path)


def read(job: str, policy: Path, source: str, folder: Path, *options: str, roles: dict[str, str] | None = None) -> list:
    """The tokens of everything that a job reads of a source."""
    from repo_fast.evaluation.inputs import read_inputs as evaluate_inputs
    from repo_fast.jobs.finetuning import read_inputs as sft_inputs
    from repo_fast.jobs.inputs import read_inputs as train_inputs
    from repo_fast.jobs.score_training import read_inputs as score_inputs

    roles = ROLES if roles is None else roles
    key = "prompts_fields" if job == "evaluate" else "data.fields"
    words = [word for column, role in roles.items() for word in (f"--{key}.{column}", role)]
    words += ["--output_dir", str(folder / "out"), *options]
    scorers = ["--reward.path", "tests.scorers:reward", "--cost.path", "tests.scorers:cost"]
    if job in ("sft", "score"):
        words += ["--model.path", str(policy), "--data.train", source, "--data.eval", source]
        inputs = (sft_inputs if job == "sft" else score_inputs)(parse(words, CONFIGS[job]))
        rows = [*inputs.examples, *inputs.held_out]
        return [[part.tolist() for part in (row if job == "sft" else row.sequences)] for row in rows]
    if job == "evaluate":
        words += ["--policies", json.dumps({"one": str(policy)}), "--prompts", source, *scorers]
        inputs = evaluate_inputs(parse(words, EvaluateConfig))
        return sorted(request.tokens.tolist() for request in inputs.policies["one"].requests)
    words += ["--policy.path", str(policy), *scorers, "--rollout.prompts_per_step", "2", "--update.minibatches", "1"]
    words += ["--data.prompts", source, "--data.eval_prompts", source, "--data.ptx", source]
    words += ["--algorithm.ptx_coefficient", "1", "--update.ptx_batch_size", "2"]
    inputs = train_inputs(parse(words, TrainConfig))
    requests = [*inputs.requests, *inputs.eval_requests]
    shown = [[part.tolist() for part in row] for row in inputs.demonstrations]
    return [*(request.tokens.tolist() for request in requests), *shown]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("job", CONFIGS)
def test_every_kind_of_file_in_every_job(policy: Path, tmp_path: Path, job: str) -> None:
    # For demonstrations, the one that was preferred is what is shown.
    roles = ROLES if job == "score" else ROLES | {"say": "response"}
    plain = [
        {
            {"ask": "prompt", "above": "system", "worse": "rejected"}.get(
                name, "chosen" if job == "score" else "response"
            ): text
            for name, text in row.items()
            if name != "other"
        }
        for row in ROWS
    ]
    expected = read(job, policy, str(write_lines(tmp_path / "plain.jsonl", plain)), tmp_path, roles={})
    assert expected
    for kind in (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", "folder"):
        assert read(job, policy, write(tmp_path, kind), tmp_path, roles=roles) == expected, kind


@pytest.mark.parametrize("job", CONFIGS)
def test_a_wrong_role_or_column_is_one_line_in_every_job(policy: Path, tmp_path: Path, job: str) -> None:
    source = write(tmp_path, ".csv")
    key = "prompts_fields" if job == "evaluate" else "data.fields"
    with pytest.raises(
        InputError, match=rf"^{key}\.other is 'promt', expected one of prompt, response, chosen, .*ignore$"
    ):
        read(job, policy, source, tmp_path, roles=ROLES | {"other": "promt"})
    with pytest.raises(
        InputError, match=rf"^{key}\.absent is 'ignore', and no row of .*rows\.csv.* has a column 'absent'"
    ):
        roles = ROLES if job == "score" else ROLES | {"say": "response"}
        read(job, policy, source, tmp_path, roles=roles | {"absent": "ignore"})
    with pytest.raises(InputError, match=r"rows\.csv line 2: no .* found ask, say, worse, above, other; .*"):
        read(job, policy, source, tmp_path, roles={})
    if job != "score":
        with pytest.raises(
            InputError, match=rf"line 2: no (prompt|response) field: .*, or --{key}\.COLUMN (prompt|response)$"
        ):
            read(job, policy, source, tmp_path, roles={})


@pytest.mark.parametrize("job", CONFIGS)
def test_the_option_on_the_command_line_and_in_files(tmp_path: Path, job: str) -> None:
    kind, section = CONFIGS[job], "" if job == "evaluate" else "data"
    option = "prompts_fields" if job == "evaluate" else "fields"
    key = f"{section}.{option}" if section else option
    common = ["--config", "tiny"] + (["--policies", '{"a": "world:tiny"}'] if job == "evaluate" else [])

    def fields(words: list[str]) -> dict:
        config = parse(words, kind)
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert parse(["--config", str(tmp_path / "again.yaml")], kind) == config
        options = to_dict(config)
        return (options[section] if section else options)[option]

    assert fields(common) == {}
    assert fields([*common, f"--{key}.my col", "prompt", f"--{key}.history=ignore"]) == {
        "my col": "prompt",
        "history": "ignore",
    }
    assert fields([*common, f"--{key}", '{"a.b": "prompt"}']) == {"a.b": "prompt"}
    values = {option: {"a": "prompt", "b": "ignore"}} | ({"policies": {"a": "world:tiny"}} if job == "evaluate" else {})
    base = yaml.safe_load(to_yaml(parse(common, kind)))
    (base[section] if section else base).update(values)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(base))
    assert fields(["--config", str(tmp_path / "mine.yaml")]) == {"a": "prompt", "b": "ignore"}
    with pytest.raises(InputError, match=rf"unknown option '{key[:-1]}\.a' .* nearest valid name is"):
        parse([*common, f"--{key[:-1]}.a", "prompt"], kind)
    with pytest.raises(InputError) as caught:
        parse([*common, f"--{key}", "prompt"], kind)
    assert "\n" not in str(caught.value) and option in str(caught.value)


def test_an_evaluation_keeps_dialogues_apart_from_texts_that_read_like_them(tmp_path: Path, caplog) -> None:
    policy = save_policy(tmp_path / "policy")
    texts = [
        {"prompt": "\n\nHuman: tea\n\nAssistant: no\n\nHuman: bread"},
        {"prompt": "bread", "history": [["tea", "no"]]},
    ]
    for number, row in enumerate(texts):
        source = write_lines(tmp_path / "prompts.jsonl", [row])
        words = [
            "--policy",
            f"one={policy}",
            "--prompts",
            str(source),
            "--samples_per_prompt",
            "2",
            "--resamples",
            "10",
        ]
        words += ["--output_dir", str(tmp_path / f"out-{number}"), "--cache_dir", str(tmp_path / "cache")]
        words += ["--sampling.max_new_tokens", "4", "--cost.path", "tests.scorers:cost"]
        assert evaluate([*words, "--reward.path", "tests.evaluation.test_evaluate:reward"]) == 0
        # The reference draws two more, and nothing of the other's is taken for its own.
        assert "policy one: 4 responses, 0 of them in the cache" in caplog.text
        caplog.clear()
        (sample, *_) = (tmp_path / f"out-{number}" / "samples.jsonl").read_text().splitlines()
        assert json.loads(sample)["prompt"] == texts[0]["prompt"]


def test_columns_are_named_in_the_log_of_a_run(job: Job, tmp_path: Path, caplog) -> None:
    source = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "tea", "note": "x"}, {"prompt": "bread", "note": "y"}])
    options = (f"--data.prompts {source}", "--rollout.prompts_per_step 2", "--total_steps 1")
    assert job.here(tmp_path / "run", *options) == 0
    assert caplog.text.count(f"{source}: columns not used: note") == 1


def test_supervised_jobs_read_a_folder(tmp_path: Path) -> None:
    """Through the whole of both jobs, from a folder of a table and of compressed lines."""
    from tests.supervised_runs import here

    inputs = make_inputs(tmp_path / "inputs")
    source = write(tmp_path, "folder")
    roles = [f"--data.fields.{column} {role}" for column, role in ROLES.items()]
    assert here("reward", inputs, tmp_path / "reward", f"--data.train {source}", f"--data.eval {source}", *roles) == 0
    roles = [word.replace(" chosen", " response") for word in roles]
    assert here("sft", inputs, tmp_path / "sft", f"--data.train {source}", "--data.eval null", *roles) == 0
