"""Folders of models, of runs and of results that are not right."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from repo_fast.jobs.checkpoint import checkpoints
from tests.campaign.given import EVALUATE, PIPELINE, PLAN, SCORE, SFT, TRAIN, Bad
from tests.job_runs import edited_run

_WEIGHTS, _CONFIG, _TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_LAST = "run/checkpoints/step-000002"
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
# Commands that load the model in `policy`, and the score model in `cost`.
_CHECK = ("repo_fast.score", "--check", "cost", "--kind", "cost", "--expect", "how do i make tea", "1.0")
_CONVERT = ("repo_fast.score", "--convert", "cost", "--to", "converted", "--layout", "model-for-score")
_COST = (*TRAIN, "--cost.path", "cost")
_CHECKPOINT = "repo_fast.checkpoint"
# Weights are read once there are ranks: an evaluation, which goes on where it was, has begun.
_STARTED = r"out|out/evaluation\.yaml|out/lock|out/cache(/.*)?"

Change = Callable[[Path], object]


def bad() -> Iterator[Bad]:
    yield from _models()
    yield from _paths()
    yield from _score_models()
    yield from _runs()
    yield from _outputs()
    yield from _certificates()


# --------------------------------------------------------------------------------------------------------- changes


def _gone(path: str) -> Change:
    return lambda folder: (folder / path).unlink()


def _holds(path: str, content: str | bytes) -> Change:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / path).write_bytes(content)


def _cut(path: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: len(content) * 2 // 3])

    return change


def _with(path: str, **values: Any) -> Change:
    """A JSON file with other values."""

    def change(folder: Path) -> None:
        content = json.loads((folder / path).read_text()) | values
        (folder / path).write_text(json.dumps(content))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], object], model: str = "policy") -> Change:
    def changed(folder: Path) -> None:
        path = folder / model / _WEIGHTS
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return changed


def _pickled(folder: Path) -> None:
    torch.save({"a": 1}, folder / "policy" / _WEIGHTS)


def _a_file(path: str) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / path, ignore_errors=True)
        (folder / path).write_text("")

    return change


def _shard_gone(folder: Path) -> None:
    state = load_file(folder / "policy" / _WEIGHTS)
    (folder / "policy" / _WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00002.safetensors")}
    (folder / "policy" / f"{_WEIGHTS}.index.json").write_text(json.dumps(index))


def _token_beyond(folder: Path) -> None:
    path = folder / "policy" / _TOKENIZER
    content = json.loads(path.read_text())
    content["model"]["vocab"]["beyond"] = 4000
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------- models


def _models() -> Iterator[Bad]:
    config, weights = f"policy/{_CONFIG}", f"policy/{_WEIGHTS}"
    tokenizer, settings = f"policy/{_TOKENIZER}", "policy/tokenizer_config.json"
    embedding = "model.embed_tokens.weight"
    layer = "model.layers.1.mlp.up_proj.weight"
    # What is wrong, and whether more than the settings have to be read for it.
    cases: list[tuple[str, Change, bool]] = [
        ("no config.json", _gone(config), False),
        ("config.json is empty", _holds(config, ""), False),
        ("config.json is cut off", _cut(config), False),
        ("config.json is a list", _holds(config, "[]"), False),
        ("config.json is {}", _holds(config, "{}"), False),
        ("config.json in UTF-16", _holds(config, "{}".encode("utf-16")), False),
        ("config.json is a folder", lambda f: ((f / config).unlink(), (f / config).mkdir()), False),
        ("of an unknown architecture", _with(config, model_type="abacus", architectures=["Abacus"]), False),
        (
            "of an architecture with code of its own",
            _with(config, model_type="x", auto_map={"AutoConfig": "a.B"}),
            False,
        ),
        ("an encoder", _with(config, model_type="bert", architectures=["BertModel"]), True),
        ("hidden_size is a text", _with(config, hidden_size="wide"), False),
        ("hidden_size is null", _with(config, hidden_size=None), False),
        ("num_attention_heads is 0", _with(config, num_attention_heads=0), False),
        ("num_attention_heads is 5", _with(config, num_attention_heads=5), False),
        ("num_hidden_layers is -1", _with(config, num_hidden_layers=-1), False),
        ("vocab_size is -5", _with(config, vocab_size=-5), False),
        ("vocab_size is a text", _with(config, vocab_size="64"), False),
        ("vocab_size is too small", _with(config, vocab_size=8), False),
        ("hidden_act is unknown", _with(config, hidden_act="swoosh"), False),
        ("torch_dtype is unknown", _with(config, torch_dtype="float7", dtype="float7"), False),
        ("rope_scaling is a text", _with(config, rope_scaling="yes", rope_parameters="yes"), False),
        ("generation_config.json is not JSON", _holds("policy/generation_config.json", "{"), False),
        ("generation_config.json is a list", _holds("policy/generation_config.json", "[]"), False),
        ("no weights", _gone(weights), True),
        ("weights are empty", _holds(weights, ""), True),
        ("weights are cut off", _cut(weights), True),
        ("weights are text", _holds(weights, "no weights " * 100), True),
        ("weights are a Git LFS pointer", _holds(weights, _POINTER), True),
        ("weights are a pickle", _pickled, True),
        ("weights are a folder", lambda f: ((f / weights).unlink(), (f / weights).mkdir()), True),
        ("a shard is missing", _shard_gone, True),
        ("a weight is missing", _weights(lambda state: state.pop(layer)), True),
        ("a weight is of another shape", _weights(lambda s: s.update({layer: s[layer][:5].clone()})), True),
        ("a weight of integers", _weights(lambda s: s.update({layer: s[layer].to(torch.int8)})), True),
        ("a weight is NaN", _weights(lambda s: s[layer].fill_(float("nan"))), True),
        ("embeddings are infinite", _weights(lambda s: s[embedding].fill_(float("inf"))), True),
        ("all weights have other names", _weights(lambda s: [s.update({f"a.{k}": s.pop(k)}) for k in list(s)]), True),
        ("no tokenizer", lambda f: [(f / path).unlink() for path in (tokenizer, settings)], False),
        ("tokenizer.json is empty", _holds(tokenizer, ""), False),
        ("tokenizer.json is cut off", _cut(tokenizer), False),
        ("tokenizer.json is {}", _holds(tokenizer, "{}"), False),
        ("tokenizer.json is a list", _holds(tokenizer, "[]"), False),
        ("tokenizer_config.json is cut off", _cut(settings), False),
        ("tokenizer_config.json is a list", _holds(settings, "[]"), False),
        ("tokenizer_config.json has no end token", _with(settings, eos_token=None), False),
        ("a tokenizer with a token beyond the model", _token_beyond, False),
        ("a chat template that is not Jinja", _template("{% for %}"), False),
        ("a chat template that raises", _template("{{ raise_exception('no chats') }}"), False),
        ("a chat template that says nothing", _template("hello"), False),
        ("a chat template of an unknown filter", _template("{{ messages | abacus }}"), False),
        ("a chat template without an end", _template("{% set ns.a = 1 %}{{ messages[0].content }}"), False),
        ("a file", _a_file("policy"), False),
        ("empty", lambda f: (shutil.rmtree(f / "policy"), (f / "policy").mkdir()), False),
        ("adapters alone", lambda f: (f / config).rename(f / "policy/adapter_config.json"), False),
    ]
    jobs = {"train": TRAIN, "sft": SFT, "evaluate": EVALUATE, "score": SCORE, "plan": PLAN}
    for i, (what, change, read) in enumerate(cases):
        # In turn; the plan reads configurations alone.
        names = list(jobs)[:4] if read or "token" in what or "template" in what else list(jobs)
        job = names[i % len(names)]
        # Plain transformers draws with these settings, and they are of no use to others.
        job = ("train", "evaluate")[i % 2] if "generation" in what else job
        yield Bad(f"{job}, a policy: {what}", jobs[job], "'?policy/?", change, leaves=_STARTED if read else "(?!)")
    # Each of these at every job: that a kind is found by one of them says little of the others.
    for what, change, read in (case for case in cases if case[0] in _EVERYWHERE):
        for job, words in jobs.items():
            if not (read and job == "plan"):
                yield Bad(f"every job, {job}, a policy: {what}", words, "'?policy/?", change, leaves=_STARTED)


def _paths() -> Iterator[Bad]:
    """Paths that are no folder of a model."""
    options = {"train": "--policy.path", "sft": "--model.path", "plan": "--policy.path", "evaluate": "--policy"}
    for job, option in options.items():
        words = {"train": TRAIN, "sft": SFT, "plan": PLAN, "evaluate": EVALUATE}[job]
        for path in (
            "./nowhere",
            "~no-such-user/model",
            "./" + "x" * 300,
            "prompts.jsonl",
            "a b",
            "/dev/null",
            "a/b/c",
        ):
            given = path if job != "evaluate" else f"after={path}"
            shown = path if len(path) < 100 else "a name that is too long"
            yield Bad(f"{job} {option} {shown}", (*words, option, given), re.escape(path.removeprefix("./")[:50]))
    for path in ("~no-such-user/model", "./" + "x" * 300, "prompts.jsonl"):
        shown = path if len(path) < 100 else "a name that is too long"
        says = re.escape(path.removeprefix("./")[:50])
        yield Bad(f"train --cost.path {shown}", (*TRAIN, "--cost.path", path), says)
        yield Bad(f"score --check {shown}", ("repo_fast.score", "--check", path), says)
        guard = ("--cost.path", f"guard:{path}", "--cost.guard.preset", "qwen3guard")
        yield Bad(f"train --cost.path guard:{shown}", (*TRAIN, *guard), says)

    denied = "policy.*cannot be read: .*Permission denied"

    def close(folder: Path) -> None:
        (folder / "policy/model.safetensors").chmod(0o000)

    for job, words in {"train": TRAIN, "sft": SFT, "evaluate": EVALUATE}.items():
        # An evaluation looks at weights when their policy's turn to draw has come.
        leaves = _STARTED if job == "evaluate" else "(?!)"
        yield Bad(f"{job}: no right to read the policy's weights", words, denied, close, leaves=leaves, as_nobody=True)
        closed = lambda folder: (folder / "policy").chmod(0o000)  # noqa: E731 - a change like the others
        yield Bad(f"{job}: no right to read the policy's folder", words, denied, closed, as_nobody=True)


_EVERYWHERE = ("no config.json", "config.json is a list", "weights are cut off", "weights are a Git LFS pointer")


def _template(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "policy/chat_template.jinja").write_text(text)

    return change


# To convert a model, it need not be used: the layout that it is converted to does not say what its score means.
_NOT_READ = ("no tokenizer", "a reward model", "score_type is unknown")


def _score_models() -> Iterator[Bad]:
    head = "score_head.weight"
    config, weights = f"cost/{_CONFIG}", f"cost/{_WEIGHTS}"
    cases: list[tuple[str, Change, str]] = [
        ("no config.json", _gone(config), ""),
        ("config.json is cut off", _cut(config), ""),
        ("config.json is a list", _holds(config, "[1]"), ""),
        ("no weights", _gone(weights), ""),
        ("weights are cut off", _cut(weights), ""),
        ("weights are a Git LFS pointer", _holds(weights, _POINTER), ""),
        ("no head", _weights(lambda state: state.pop(head), "cost"), "head"),
        ("a head of another width", _weights(lambda s: s.update({head: s[head][:, :5].clone()}), "cost"), ""),
        ("a head of two outputs", _weights(lambda s: s.update({head: s[head].repeat(2, 1)}), "cost"), ""),
        ("score_dim is 0", _with(config, score_dim=0), "score_dim 0"),
        ("score_dim is a text", _with(config, score_dim="one"), "score_dim 'one'"),
        ("score_type is unknown", _with(config, score_type="abacus"), "score_type.*'abacus'"),
        ("a reward model", _with(config, score_type="reward"), "reward"),
        ("a policy", lambda f: (shutil.rmtree(f / "cost"), shutil.copytree(f / "policy", f / "cost")), ""),
        ("no tokenizer", lambda f: [path.unlink() for path in (f / "cost").glob("tokenizer*")], "tokenizer"),
        ("a weight is missing", _weights(lambda s: s.pop("model.norm.weight"), "cost"), "model.norm.weight|norm"),
        ("a file", _a_file("cost"), ""),
    ]
    for i, (what, change, says) in enumerate(cases):
        jobs = {"train": _COST, "check": _CHECK, "convert": _CONVERT}
        names = [name for name in jobs if name != "convert" or what not in _NOT_READ]
        for job in (names[i % len(names)], names[(i + 1) % len(names)]):
            yield Bad(f"{job}, a score model: {what}", jobs[job], f"'?cost/?.*({says})", change)
    yield Bad("check: no such folder", ("repo_fast.score", "--check", "./nowhere"), r"\./nowhere")
    words = ("repo_fast.score", "--convert", "./nowhere", "--to", "new")
    yield Bad("convert: no such folder", words, r"\./nowhere")
    yield Bad("convert: onto another model", (*_CONVERT[:4], "policy"), "the target 'policy' exists")
    yield Bad("convert: onto a file", (*_CONVERT[:4], "train.yaml"), r"the target 'train\.yaml' exists")
    yield Bad("convert: below a file", (*_CONVERT[:4], "train.yaml/new"), r"train\.yaml/new")
    yield Bad("convert: onto itself", (*_CONVERT[:4], "cost"), "the target 'cost' exists")
    yield Bad("convert: another score than expected", (*_CONVERT, "--expect", "tea", "-7"), "-7")
    yield Bad("check: another score than expected", (*_CHECK[:-1], "123"), "123")
    yield Bad("check: another kind", ("repo_fast.score", "--check", "cost", "--kind", "reward"), "cost.*reward")
    yield Bad("check: a head that it has not", (*_CHECK, "--head", "harm"), "head.*'harm'")
    yield Bad("check: score below zero that is no number", (*_CHECK[:-1], "-minus"), "--expect.*'-minus'")
    yield Bad(
        "convert: no right to write", (*_CONVERT[:4], "closed/new"), "closed/new", _closed("closed"), as_nobody=True
    )


def _closed(path: str) -> Change:
    def change(folder: Path) -> None:
        (folder / path).mkdir()
        (folder / path).chmod(0o000)

    return change


# ------------------------------------------------------------------------------------------------------------ runs


def _runs() -> Iterator[Bad]:
    manifest, state = f"{_LAST}/manifest.json", f"{_LAST}/run.json"

    def both_gone(folder: Path) -> None:
        for path in checkpoints(folder / "run"):
            (path / "manifest.json").unlink()

    def tensors(folder: Path) -> str:
        return str(next(iter(sorted((folder / _LAST).glob("*/*.safetensors")))).relative_to(folder))

    def later(folder: Path) -> None:
        with edited_run(folder / "run", 2) as run:
            run["config"]["seed"] = 5

    auto, named = (*TRAIN[:-1], "run", "--resume", "auto"), (*TRAIN[:-1], "run", "--resume", _LAST)
    step = "step-000002"
    cases: list[tuple[str, tuple[str, ...], Change, str]] = [
        ("no such checkpoint", (*TRAIN, "--resume", "run/checkpoints/step-000009"), _nothing, "step-000009"),
        ("a folder that is none", (*TRAIN, "--resume", "run"), _nothing, "--resume 'run' is not a complete checkpoint"),
        ("a file", (*TRAIN, "--resume", "train.yaml"), _nothing, r"--resume 'train\.yaml' is not a complete"),
        ("misspelt", (*TRAIN, "--resume", "Auto"), _nothing, "--resume 'Auto' is not a complete checkpoint"),
        ("true", (*TRAIN, "--resume", "true"), _nothing, "--resume 'true' is not a complete checkpoint"),
        ("no manifest", named, _gone(manifest), f"{step} is damaged.*manifest.json is missing"),
        ("a manifest that is not JSON", named, _cut(manifest), f"{step} is damaged.*manifest.json cannot be read"),
        ("a manifest that is a list", named, _holds(manifest, "[]"), f"{step} is damaged.*manifest.json"),
        ("a manifest that was changed", named, _with(manifest, format=2), f"{step}.*manifest.json"),
        ("no run.json", named, _gone(state), f"{step} is damaged.*run.json is missing"),
        ("run.json cut off", named, _cut(state), f"{step} is damaged.*run.json has"),
        ("run.json changed", named, lambda f: _flip(f / state), f"{step} is damaged.*run.json is not what was written"),
        ("a file of weights gone", named, lambda f: (f / tensors(f)).unlink(), f"{step} is damaged.*is missing"),
        ("a file of weights cut off", named, lambda f: _cut(tensors(f))(f), f"{step} is damaged.*bytes, expected"),
        ("weights changed", named, lambda f: _flip(f / tensors(f)), f"{step} is damaged.*is not what was written"),
        ("all damaged", auto, both_gone, "--resume 'auto' finds damaged checkpoints alone"),
        ("another option", (*auto, "--total_steps", "3"), _nothing, f"{step}.*total_steps is 2 there and 3 here"),
        ("another seed", (*auto, "--seed", "7"), _nothing, f"{step}.*seed is 0 there and 7 here"),
        ("of another seed", auto, later, f"{step}.*seed is 5 there and 0 here"),
        ("another algorithm", (*auto, "--algorithm.kl_coefficient", "0.3"), _nothing, "algorithm.kl_coefficient is"),
        ("another policy", (*auto, "--policy.path", "wide"), _nothing, "policy.path is 'policy' there and 'wide' here"),
        (
            "other weights in the policy",
            auto,
            _weights(lambda s: s["model.norm.weight"].add_(1)),
            "policy.*changed|chang",
        ),
        ("another width of the policy", auto, _widened, "policy"),
        ("other prompts", auto, _holds("prompts.jsonl", '{"prompt": "tea"}\n' * 3), r"prompts\.jsonl"),
        ("another job's", (*SFT, "--resume", _LAST), _nothing, f"{step}"),
        ("another run's folder", (*TRAIN[:-1], "run", "--resume", "run/checkpoints/step-000001"), _nothing, "--resume"),
    ]
    for what, words, change, says in cases:
        yield Bad(f"resume: {what}", words, says, change)
    list_, verify = (_CHECKPOINT, "run"), (_CHECKPOINT, "run", "--verify")
    export = (_CHECKPOINT, "run", "--export", "2", "new")
    none = "has no checkpoints, expected the output_dir of a run"
    yield Bad("checkpoint: no folder given", (_CHECKPOINT,), "folder")
    yield Bad("checkpoint: no such folder", (_CHECKPOINT, "nowhere"), f"'nowhere' {none}")
    yield Bad("checkpoint: a file", (_CHECKPOINT, "train.yaml"), rf"'train\.yaml' {none}")
    yield Bad("checkpoint: a folder without any", (_CHECKPOINT, "policy"), f"'policy' {none}")
    yield Bad("checkpoint: an unknown option", (*list_, "--repair"), "--repair")
    yield Bad("checkpoint: two actions", (*verify, "--convert"), "not allowed with argument")
    yield Bad("checkpoint: two folders", (*list_, "policy"), "unrecognized arguments: policy")
    yield Bad("checkpoint: nothing to convert", (*list_, "--convert"), "--convert finds no checkpoint that DeepSpeed")
    yield Bad("checkpoint: a step that is none", (*list_, "--export", "two", "new"), "--export 'two' is no step")
    yield Bad("checkpoint: a step that is not there", (*list_, "--export", "9", "new"), "--export '9' is no step.*1, 2")
    yield Bad("checkpoint: export without a folder", (*list_, "--export", "2"), "--export: expected 2 arguments")
    yield Bad("checkpoint: export onto a folder", (*export[:-1], "policy"), "'policy' exists, expected a new folder")
    yield Bad("checkpoint: export onto a file", (*export[:-1], "train.yaml"), r"'train\.yaml' exists")
    yield Bad(
        "checkpoint: export below a file", (*export[:-1], "train.yaml/new"), r"'train\.yaml/new' cannot be written"
    )
    yield Bad("checkpoint: export without the policy", export, "policy", lambda f: shutil.rmtree(f / "policy"))
    yield Bad("checkpoint: export with another policy", export, "policy", _widened)
    cut = lambda f: _cut(tensors(f))(f)  # noqa: E731 - a change like the others
    yield Bad("checkpoint: export of a damaged one", export, f"{step} is damaged", cut, status=3)
    closed = (*export[:-1], "closed/new")
    yield Bad("checkpoint: export, no right to write", closed, "closed/new", _closed("closed"), as_nobody=True)


def _nothing(folder: Path) -> None:
    """The command alone is wrong."""


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _widened(folder: Path) -> None:
    shutil.rmtree(folder / "policy")
    shutil.copytree(folder / "wide", folder / "policy")


# --------------------------------------------------------------------------------------------------------- outputs


def _outputs() -> Iterator[Bad]:
    jobs = {"train": TRAIN, "sft": SFT, "score": SCORE, "evaluate": EVALUATE, "pipeline": PIPELINE}
    for job, words in jobs.items():
        at = words.index("out")
        for path, says in (("train.yaml", ""), ("train.yaml/out", ""), ("x" * 300, ""), ("/proc/out", "")):
            to = (*words[:at], path, *words[at + 1 :])
            shown = path if len(path) < 100 else "a name that is too long"
            yield Bad(f"{job} --output_dir {shown}", to, re.escape(path[:80]) + says)
        to = (*words[:at], "closed/out", *words[at + 1 :])
        yield Bad(f"{job} --output_dir in a folder without a right", to, "closed", _closed("closed"), as_nobody=True)
        to = (*words[:at], "", *words[at + 1 :])
        if job != "pipeline":
            yield Bad(f"{job} --output_dir ''", to, "output_dir is ''")
    for job in ("train", "sft", "score"):
        to = (*jobs[job][:-1], ".")
        yield Bad(f"{job} into the folder of the policy", to, r"--output_dir '\.' holds 'policy' and no run")
    yield Bad("train into a run", (*TRAIN[:-1], "run"), "'run' holds a run already, expected a new folder")
    yield Bad("sft into another's run", (*SFT[:-1], "run"), "'run' holds a run already")
    yield Bad("sft, going on with another's run", (*SFT[:-1], "run", "--resume", "auto"), "step-000002")
    others = ("--samples_per_prompt", "3")
    at = EVALUATE.index("out")
    certified = (*EVALUATE[:at], "certificate", *EVALUATE[at + 1 :])
    yield Bad("evaluate into another evaluation", (*certified, *others), "certificate")
    into_run = (*EVALUATE[:at], "run", *EVALUATE[at + 1 :])
    yield Bad("evaluate into a run", into_run, "run")
    cache = (*EVALUATE, "--cache_dir", "train.yaml")
    yield Bad("evaluate --cache_dir train.yaml", cache, r"train\.yaml", leaves=_STARTED)


# ---------------------------------------------------------------------------------------------------- certificates


def _certificates() -> Iterator[Bad]:
    verify = ("repo_fast.evaluate", "--verify", "certificate/certificate.json")
    names = ("certificate", "claims", "samples")
    for name in names:
        path = f"certificate/{name}.json{'l' * (name == 'samples')}"
        cases: list[tuple[str, Change]] = [
            ("is gone", _gone(path)),
            ("is cut off", _cut(path)),
            ("is empty", _holds(path, "")),
            ("is a list", _holds(path, "[]")),
            ("is in UTF-16", _holds(path, "{}".encode("utf-16"))),
            ("is {}", _holds(path, "{}")),
            ("is a folder", lambda f, path=path: ((f / path).unlink(), (f / path).mkdir())),
        ]
        for what, change in cases:
            yield Bad(f"verify: {path.split('/')[1]} {what}", verify, "certificate/", change)
    changed = _with("certificate/certificate.json", verdict="PASS?")
    yield Bad("verify: another verdict", verify, "verdict", changed)
    changed = _with("certificate/claims.json", delta=0.5)
    yield Bad("verify: another level", verify, "claims.json was changed", changed)
    yield Bad("verify: no file given", verify[:-1], "expected --verify certificate.json")
    yield Bad("verify: a folder", (*verify[:-1], "certificate"), "certificate")
    yield Bad("verify: no such file", (*verify[:-1], "nowhere.json"), "nowhere.json")
    yield Bad("verify: with another option", (*verify, "--seed", "1"), "expected --verify certificate.json and nothing")
