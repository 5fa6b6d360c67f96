"""Code hidden in what programs read: models' folders, data, YAML, chat templates, checkpoints."""

import json
import re
import runpy
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jinja2
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from repo_fast.jobs import checkpoint
from tests.campaign.book import Trial
from tests.campaign.traps import Place, Trap, call, edit_json, modules_of_models_in, sealed_again, started
from tests.job_runs import Job, write_lines
from tests.tiny import save_beaver, save_policy, save_sequence_classifier, word_tokenizer


def trials() -> Iterator[Trial]:
    """All of them."""
    yield Trial("models' folders as they are", _harmless)
    for how in _IN_A_POLICY:
        yield Trial(f"a policy's folder: {how}", partial(_policy_folder, how))
    for how in _IN_A_SCORE_MODEL:
        yield Trial(f"a score model's folder: {how}", partial(_score_folder, how))
    yield Trial("a policy's folder that export reads", _export)
    for ending in (".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"):
        yield Trial(f"a pickle named {ending}", partial(_pickle_as_data, ending))
    yield Trial("a data folder with a loading script", _loading_script)
    yield Trial("a data folder with pickles in an archive", _archive)
    yield Trial("formulas in a csv", _formulas)
    for where in ("--config", "--certify", "config.yaml of a run gone on with", "evaluation.yaml of an evaluation"):
        yield Trial(f"YAML that builds objects: {where}", partial(_yaml_objects, where))
    for how in _BOMBS:
        yield Trial(f"a YAML bomb: {how}", partial(_yaml_bomb, how))
    for how in _TEMPLATES:
        yield Trial(f"a chat template: {how}", partial(_template, how))
    yield Trial("a chat template of a million million letters", _template_of_memory)
    yield Trial("a chat template that never ends", _template_without_end)
    for file in ("run.json", "manifest.json", "random-rank0.safetensors", "policy/engine.json", "policy/shard"):
        yield Trial(f"a checkpoint: a pickle in place of {file}", partial(_pickle_in_checkpoint, file))
    yield Trial("a checkpoint: pickles beside its files", _pickles_beside)
    yield Trial("a checkpoint of DeepSpeed's: pickles", _deepspeeds)


# ------------------------------------------------------------------------------------------------------ models' folders


def _assert_said(results: dict[str, tuple[int, str]], trap: Trap) -> str:
    """That nothing sprang, and each program ended well, or in one line."""
    trap.assert_is_whole(", ".join(results))
    for program, (status, said) in results.items():
        assert status in (0, 2), (program, status, said[-500:])
        if status == 2:
            assert len(re.findall("^error: ", said, re.MULTILINE)) == 1, (program, said[-500:])
    return ", ".join(f"{program} {'refuses' if status else 'ignores it'}" for program, (status, _) in results.items())


def _code(model: Path, trap: Trap, own_type: bool) -> None:
    """Code of its own, for a known architecture or for one that only it knows."""
    for name in ("evil.py", "modeling_evil.py"):
        (model / name).write_text(
            trap.code + "from transformers import *\n"
            "class Config(LlamaConfig):\n    model_type = 'evil'\n"
            "class Model(LlamaForCausalLM):\n    config_class = Config\n"
            "class Words(PreTrainedTokenizerFast):\n    pass\n"
        )
    classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    code = {"AutoConfig": "evil.Config", **dict.fromkeys(classes, "evil.Model")}
    edit_json(model / "config.json", auto_map=code, **({"model_type": "evil"} if own_type else {}))
    edit_json(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Words", "evil.Words"]},
        tokenizer_class="Words",
    )
    with modules_of_models_in(model.parent / "modules"):
        trap.assert_springs(lambda: AutoConfig.from_pretrained(model, trust_remote_code=True))
    with modules_of_models_in(model.parent / "modules of tokenizers"):
        trap.assert_springs(lambda: AutoTokenizer.from_pretrained(model, trust_remote_code=True))


def _weights(model: Path, trap: Trap, *, beside: bool = False, zipped: bool = True) -> None:
    if not beside:
        (model / "model.safetensors").unlink()
    trap.save_to(model / "pytorch_model.bin", zipped)
    if beside:
        for name in ("training_args.bin", "optimizer.pt", "model.pkl", "rng_state.pth"):
            trap.save_to(model / name)


def _index(model: Path, trap: Trap) -> None:
    """Shards that are elsewhere."""
    (model / "model.safetensors").unlink()
    outside = model.parent / "outside.bin"
    trap.save_to(outside)
    weights = {"model.embed_tokens.weight": "../outside.bin", "lm_head.weight": str(outside)}
    edit_json(model / "pytorch_model.bin.index.json", metadata={}, weight_map=weights)


def _generation(model: Path, trap: Trap) -> None:
    """A `generate` of its own."""
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"{trap.code}def generate(model, **words):\n    pass\n")
    edit_json(model / "generation_config.json", custom_generate=str(model), trust_remote_code=True)
    with modules_of_models_in(model.parent / "modules"):
        trap.assert_springs(lambda: AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True))


def _adapter(model: Path, trap: Trap, alone: bool) -> None:
    """Adapters, beside the weights or in place of them, whose base is elsewhere."""
    base = Path(shutil.copytree(model, model.parent / "base"))
    if alone:
        (model / "model.safetensors").unlink()
    trap.save_to(model / "adapter_model.bin")
    edit_json(
        model / "adapter_config.json",
        peft_type="LORA",
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        base_model_name_or_path=str(base),
        auto_mapping={"base_model_class": "Model", "parent_library": "evil"},
    )
    (model / "evil.py").write_text(trap.code)


_IN_A_POLICY: dict[str, Callable[[Path, Trap], None]] = {
    "code for a known architecture": partial(_code, own_type=False),
    "code for its own": partial(_code, own_type=True),
    "a pickle for weights": _weights,
    "one in the older form": partial(_weights, zipped=False),
    "pickles beside the weights": partial(_weights, beside=True),
    "shards elsewhere": _index,
    "its own generate": _generation,
    "adapters beside the weights": partial(_adapter, alone=False),
    "adapters alone": partial(_adapter, alone=True),
}
_IN_A_SCORE_MODEL = {name: how for name, how in _IN_A_POLICY.items() if name != "its own generate"}


def _harmless(folder: Path) -> str:
    """That it is the attack which the programs refuse."""
    place = Place(folder)
    results = place.open_policy(place.copy())
    for save in (save_beaver, save_sequence_classifier):
        results |= {
            f"{save.__name__}, {name}": result for name, result in place.open_score_model(save(place.out())).items()
        }
    refused = {program: said[-500:] for program, (status, said) in results.items() if status}
    assert not refused, refused
    return f"taken by {', '.join(results)}"


def _policy_folder(how: str, folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    model = place.copy()
    _IN_A_POLICY[how](model, trap)
    return _assert_said(place.open_policy(model), trap)


def _score_folder(how: str, folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    seen = []
    for kind, save in (("Safe RLHF's", save_beaver), ("a classifier", save_sequence_classifier)):
        model = save(place.out())
        _IN_A_SCORE_MODEL[how](model, trap)
        seen.append(f"{kind}: {_assert_said(place.open_score_model(model), trap)}")
        shutil.rmtree(model.parent / "base", ignore_errors=True)
    return "; ".join(seen)


def _export(folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    seen = []
    for how, poison in _IN_A_POLICY.items():
        model = place.copy()
        run = place.run(f"--policy.path {model}")
        poison(model, trap)
        result = call("repo_fast.checkpoint", str(run), "--export", "2", str(place.out()))
        seen.append(f"{how}: {_assert_said({'export': result}, trap)}")
        shutil.rmtree(model.parent / "base", ignore_errors=True)
    return "; ".join(seen)


# ----------------------------------------------------------------------------------------------------------------- data


def _pickle_as_data(ending: str, folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    file = folder / f"data{ending}"
    trap.pickle_to(file)
    results = {
        "train": place.train(f"--data.prompts {file}"),
        "held out": place.train(f"--data.eval_prompts {file}"),
        "sft": place.supervised("sft", f"--data.train {file}"),
        "score": place.supervised("reward", f"--data.train {file}"),
        "evaluate": place.evaluate(
            f"--policy a={place.folder / 'policy'} --prompts {file} --cost.path tests.scorers:cost"
        ),
    }
    seen = _assert_said(results, trap)
    # A text is a text.
    assert ending == ".txt" or all(status == 2 for status, _ in results.values()), seen
    return seen


def _loading_script(folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    seen = []
    for deep in (False, True):
        data = folder / f"data{deep:d}"
        (data / "train" if deep else data).mkdir(parents=True)
        write_lines((data / "train" if deep else data) / "train.jsonl", [{"prompt": "how do i make tea"}] * 5)
        for name in (f"{data.name}.py", "dataset.py", "__init__.py"):
            (data / name).write_text(trap.code)
        trap.assert_springs(lambda data=data: runpy.run_path(str(data / "dataset.py")))
        results = {
            "train": place.train(f"--data.prompts {data}", "--rollout.prompts_per_step 1"),
            "sft": place.supervised("sft", f"--data.train {data}"),
        }
        seen.append(_assert_said(results, trap))
    return "; in a folder of folders: ".join(seen)


def _archive(folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    data = folder / "data"
    (data / "train").mkdir(parents=True)
    for ending in ("pyd", "pickle", "pkl", "npy", "pth"):
        trap.pickle_to(folder / f"0.{ending}")
        with tarfile.open(data / "train" / f"{ending}.tar", "w") as archive:
            archive.add(folder / f"0.{ending}", arcname=f"0.{ending}")
    for ending in ("pkl", "pickle"):
        trap.pickle_to(data / "train" / f"a.{ending}")
    return _assert_said({"train": place.train(f"--data.prompts {data}")}, trap)


def _formulas(folder: Path) -> str:
    place = Place(folder)
    cells = ["=cmd|' /C calc'!A0", "+HYPERLINK(1)", "@SUM(1)", "-2+3", '=WEBSERVICE("http://x")']
    (folder / "data.csv").write_text("prompt\n" + "".join('"{}"\n'.format(c.replace('"', '""')) for c in cells))
    out = place.out()
    options = (f"--data.prompts {folder / 'data.csv'}", f"--data.eval_prompts {folder / 'data.csv'}")
    status, said = call("repo_fast.train", *place.job.words(out, "--total_steps 1", *options))
    assert status == 0, said
    written = {row["prompt"] for row in map(json.loads, (out / "samples.jsonl").read_text().splitlines())}
    assert written <= set(cells) and written
    tables = [path.name for path in out.rglob("*") if path.suffix in (".csv", ".tsv", ".xls", ".xlsx")]
    assert not tables, tables
    return "texts like others; nothing is written that a spreadsheet opens"


# ----------------------------------------------------------------------------------------------------------------- YAML


def _yaml_objects(where: str, folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    seen = []
    for tag in ("python/object/apply:os.mkdir", "python/object/new:os.mkdir"):
        hidden = f"seed: !!{tag} [{str(trap.sprung)!r}]\n"
        trap.assert_springs(lambda hidden=hidden: yaml.load(hidden, yaml.UnsafeLoader))
        file, policy = folder / "evil.yaml", f"--policy a={place.folder / 'policy'} --cost.path tests.scorers:cost"
        file.write_text(hidden)
        if where == "--config":
            result = call("repo_fast.train", "--config", str(file), "--output_dir", str(place.out()))
        elif where == "--certify":
            result = place.evaluate(f"{policy} --prompts {place.prompts()} --certify {file}")
        elif where.startswith("evaluation.yaml"):
            out = place.out()
            assert place.evaluate(f"{policy} --prompts {place.prompts()}", out=out)[0] == 0
            (out / "evaluation.yaml").write_text(hidden)
            result = place.evaluate(f"{policy} --prompts {place.prompts()}", out=out)
        else:
            run = place.run()
            (run / "config.yaml").write_text(hidden)
            policy = f"--policy a={run / 'policy'} --cost.path tests.scorers:cost --claim unsafe_prompts=0.5"
            result = place.evaluate(f"{policy} --prompts {place.prompts()}")
            assert result[0] in (2, 3, 4), result
            trap.assert_is_whole("evaluate")
            result = place.resume(run)
        seen.append(_assert_said({tag.partition(":")[0]: result}, trap))
    return "; ".join(seen)


def _laughs(value: str, pair: str) -> str:
    """Thirty doublings: a thousand million of the first."""
    lines = [f"a0: &a0 {value}"]
    lines += [f"a{i}: &a{i} {pair.format(f'*a{i - 1}')}" for i in range(1, 31)]
    return "\n".join(lines) + "\n"


_BOMBS = {
    "lists for a section": _laughs("[x]", "[{0}, {0}]") + "algorithm: *a30\n",
    "lists for a value": _laughs("[x]", "[{0}, {0}]") + "seed: *a30\n",
    "mappings": _laughs("{x: y}", "{{l: {0}, r: {0}}}") + "data: {fields: *a30}\n",
    "mappings for a constraint": _laughs("{x: y}", "{{l: {0}, r: {0}}}") + "constraints: *a30\n",
    "a list in itself": "seed: &a [*a]\n",
    "a mapping in itself": "data: &a {fields: *a}\n",
    "nested deeply": f"seed: {'[' * 20000}{']' * 20000}\n",
    "a number of a million digits": f"seed: {'9' * 1_000_000}\n",
    "merged keys": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{(f'*a{i - 1}, ' * 9)[:-2]}]}}\n" for i in range(1, 12)),
}


def _yaml_bomb(how: str, folder: Path) -> str:
    file, out = folder / "bomb.yaml", folder / "run"
    file.write_text(_BOMBS[how])
    words = ["-m", "tests.campaign.limited", "4", "repo_fast.train", "--config", str(file), "--output_dir", str(out)]
    return _ends_in_a_line(words, 60)


def _ends_in_a_line(words: list[str], seconds: float) -> str:
    """That a program says in one line what is wrong, in so much time, in 4 GB."""
    begun = time.monotonic()
    with started(words) as child:
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise AssertionError(f"not bounded: it was not done after {seconds:.0f} s") from None
    assert child.returncode == 2, (child.returncode, err[-1000:])
    assert re.fullmatch("error: .*\n", err.rpartition("\n[")[0] or err.splitlines(keepends=True)[-1]), err[-1000:]
    assert len(err) < 20_000, f"a line of {len(err)} letters"
    return f"refused after {time.monotonic() - begun:.0f} s: {err.splitlines()[-1][:100]}"


# ------------------------------------------------------------------------------------------------------- chat templates

_TEMPLATES = {
    "globals of a function": "{{{{ cycler.__init__.__globals__.os.mkdir({0}) }}}}",
    "globals of lipsum": "{{{{ lipsum.__globals__['os'].mkdir({0}) }}}}",
    "by a filter": "{{{{ (lipsum|attr('__globals__'))['os'].mkdir({0}) }}}}",
    "by a map": "{{{{ (([lipsum]|map(attribute='__globals__')|list)[0])['os'].mkdir({0}) }}}}",
    "subclasses": "{{% for c in ''.__class__.__mro__[1].__subclasses__() if c.__name__ == '_wrap_close' %}}"
    "{{{{ c.__init__.__globals__['mkdir']({0}) }}}}{{% endfor %}}",
    "a macro's code": "{{% macro m() %}}{{% endmacro %}}{{{{ m.__init__.__globals__.sys.modules.os.mkdir({0}) }}}}",
    "self": "{{{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir({0}) }}}}",
}


def _template(how: str, folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    text = _TEMPLATES[how].format(repr(str(trap.sprung)))
    trap.assert_springs(lambda: jinja2.Environment().from_string(text).render(messages=[]))
    seen = []
    for also in ("", "{% for m in messages %} {{ m['content'] }}{% endfor %}"):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = text + also
        model = save_policy(place.out(), tokenizer)
        seen.append(_assert_said(place.open_policy(model), trap))
    return f"{seen[0]}; before a template that is one: {seen[1]}"


def _template_of_memory(folder: Path) -> str:
    job = _with_template(folder, "{{ 'a' * 10**12 }}{% for m in messages %} {{ m['content'] }}{% endfor %}")
    return _ends_in_a_line(["-m", "tests.campaign.limited", "4", "repo_fast.train", *job.words(folder / "run")], 120)


def _template_without_end(folder: Path) -> str:
    """Nothing bounds it. It ends when it is told to, before anything is written."""
    job = _with_template(
        folder,
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}{% for m in messages %} {{ m['content'] }}{% endfor %}",
    )
    seen = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell's background jobs, as a campaign may be one, have it ignored.
        hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with started(["-m", "repo_fast.train", *job.words(folder / "run")], preexec_fn=hears) as child:
            try:
                _, err = child.communicate(timeout=60)
                assert child.returncode == 2, err[-1000:]
                return f"it ended by itself: {err[-200:]}"
            except subprocess.TimeoutExpired:
                child.send_signal(number)
            try:
                child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                raise AssertionError(f"it does not end by {number.name} either") from None
        seen.append(number.name)
    assert not (folder / "run").exists()
    return f"not bounded: after 60 s it still ran; {' and '.join(seen)} end it, and nothing was written"


def _with_template(folder: Path, template: str) -> Job:
    job, tokenizer = Job.make(folder), word_tokenizer()
    tokenizer.chat_template = template
    save_policy(folder / "policy", tokenizer)
    return job


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _pickle_in_checkpoint(file: str, folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    seen = []
    for again in (False, True):
        run = place.run()
        newest = checkpoint.checkpoints(run)[-1]
        found = next(newest.glob(f"{file}*"))
        trap.pickle_to(found)
        if again and file != "manifest.json":
            sealed_again(newest)
        shutil.rmtree(run / "policy")
        results = {
            "--verify": call("repo_fast.checkpoint", str(run), "--verify"),
            "--export": call("repo_fast.checkpoint", str(run), "--export", "2", str(place.out())),
            "--resume named": place.resume(run, str(newest)),
            "--resume auto": place.resume(run),
        }
        # 3 is what a damaged one is.
        assert all(status in (0, 2, 3) for status, _ in results.values()), results
        trap.assert_is_whole("any of them")
        seen.append(", ".join(f"{name} {status}" for name, (status, _) in results.items()))
    return f"exit statuses: {seen[0]}; where the manifest agrees: {seen[1]}"


def _pickles_beside(folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    run = place.run()
    shutil.rmtree(run / "policy")
    newest = checkpoint.checkpoints(run)[-1]
    for name in ("mp_rank_00_model_states.pt", "pytorch_model.bin", "optimizer.pt", "random-rank0.pt"):
        trap.save_to(newest / name)
        trap.save_to(newest / "policy" / name)
    return _assert_said(
        {
            "--verify": call("repo_fast.checkpoint", str(run), "--verify"),
            "--export": call("repo_fast.checkpoint", str(run), "--export", "2", str(place.out())),
            "--convert": call("repo_fast.checkpoint", str(run), "--convert"),
            "--resume": place.resume(run),
        },
        trap,
    )


def _deepspeeds(folder: Path) -> str:
    place, trap = Place(folder), Trap(folder)
    seen = []
    for zipped in (True, False):
        run = place.run()
        newest = checkpoint.checkpoints(run)[-1]
        (newest / "manifest.json").unlink()
        (newest / "policy" / "state").mkdir()
        for name in ("optim_states.pt", "model_states.pt"):
            trap.save_to(newest / "policy" / "state" / f"zero_pp_rank_0_mp_rank_00_{name}", zipped)
        shutil.rmtree(run / "policy")
        results = {
            "list": call("repo_fast.checkpoint", str(run)),
            "--resume": place.resume(run),
            "--convert": call("repo_fast.checkpoint", str(run), "--convert"),
        }
        seen.append(_assert_said(results, trap))
    return "; in the older form: ".join(seen)
