"""Command lines and configuration files that are not right, as users write them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.given import EVALUATE, PIPELINE, PLAN, SCORE, SFT, TRAIN, Bad

Change = Callable[[Path], object]


def bad() -> Iterator[Bad]:
    yield from _words()
    yield from _scorers()
    yield from _configurations()
    yield from _combinations()
    yield from _evaluations()
    yield from _other_programs()


def _words() -> Iterator[Bad]:
    for job, words in {"train": TRAIN, "sft": SFT, "score": SCORE, "evaluate": EVALUATE}.items():
        yield Bad(f"{job}: a word without an option", (*words, "tiny"), "tiny")
        yield Bad(f"{job}: an option without a value", (*words, "--seed"), "seed")
        yield Bad(f"{job}: one hyphen", (*words, "-seed", "1"), "-seed")
        yield Bad(
            f"{job}: a hyphen for an underscore", (*words, "--output-dir", "a"), "unknown option 'output-dir'.*'out"
        )
        yield Bad(f"{job}: a long dash", (*words, "—seed", "1"), "—seed")
        yield Bad(f"{job}: a colon", (*words, "--seed:1"), "seed:1")
        yield Bad(f"{job}: a section as an option", (*words, "--engine", "1"), "engine|unknown option 'engine'")
        yield Bad(
            f"{job}: an option of another program", (*words, "--num_train_epochs", "3"), "unknown option 'num_train"
        )
        yield Bad(f"{job}: an empty name", (*words, "--", "1"), "''|--")
        yield Bad(f"{job}: an equals sign alone", (*words, "--=1"), "''|--")
        yield Bad(f"{job}: a part of a name", (*words, "--outp", "a"), "unknown option 'outp'")
        yield Bad(f"{job}: --config without a value", (words[0], "--config"), "config")
        yield Bad(f"{job}: --config of nothing", (*words, "--config="), "--config ''")
        yield Bad(f"{job}: no such --config", (*words, "--config", "tinny"), "--config 'tinny' is neither a file nor")
        yield Bad(
            f"{job}: --config a folder", (*words, "--config", "policy"), "--config 'policy' is neither a file nor"
        )
    yield Bad("train: an option of sft", (*TRAIN, "--model.path", "policy"), "unknown option 'model.path'")
    yield Bad("train: a number of 5,000 digits", (*TRAIN, "--seed", "9" * 5000), "seed")
    yield Bad("train: a text of 100,000 letters", (*TRAIN, "--engine.dtype", "x" * 100_000), "engine.dtype")
    yield Bad("train: a text of several lines", (*TRAIN, "--engine.dtype", "float\n32"), "engine.dtype")
    yield Bad("train: a path of several lines", (*TRAIN, "--data.prompts", "a\nb.jsonl"), "no such file")
    yield Bad("train: a path with bytes that are no text", (*TRAIN, "--data.prompts", "a\udcff.jsonl"), "no such file")
    yield Bad("train: 1e3 steps", (*TRAIN, "--total_steps", "1e-3"), "total_steps")
    yield Bad("train: a comma in a number", (*TRAIN, "--algorithm.margin", "0,5"), "algorithm.margin.*0,5")
    yield Bad("train: a unit behind a number", (*TRAIN, "--rollout.max_new_tokens", "1k"), "max_new_tokens.*1k")
    yield Bad("train: a date that is none", (*TRAIN, "--date", "2026-02-30"), "date is '2026-02-30', expected a day")
    yield Bad("train: a date the other way round", (*TRAIN, "--date", "30.11.2026"), "date is '30.11.2026'")


def _scorers() -> Iterator[Bad]:
    def writes(text: str) -> Change:
        return lambda folder: (folder / "mine.py").write_text(text)

    cases: list[tuple[str, str, str, Change]] = [
        ("of no module", "nowhere:reward", "module 'nowhere' cannot be imported", _nothing),
        ("of no function", "tests.scorers:nowhere", "has no function 'nowhere'", _nothing),
        ("a module alone", "tests.scorers", "tests.scorers", _nothing),
        ("a path of a file", "mine.py:reward", "mine.py", writes("def reward(p, r): return []")),
        ("a colon alone", ":", "':'", _nothing),
        ("no function's name", "tests.scorers:", "tests.scorers:", _nothing),
        ("a guard without a folder", "guard:", "path is 'guard:'", _nothing),
        ("a judge without a name", "judge:", "judge:", _nothing),
        ("a judge without a url", "judge:gpt", "judge.url is None", _nothing),
        ("a syntax error", "mine:cost", "mine.*cannot be imported", writes("def cost(p, r) return []")),
        ("raises when imported", "mine:cost", "mine.*cannot be imported", writes("raise KeyError('here')")),
        ("exits when imported", "mine:cost", "mine.*cannot be imported", writes("raise SystemExit(3)")),
        ("a number", "mine:cost", "mine", writes("cost = 7")),
    ]
    for what, path, says, change in cases:
        words = (*TRAIN, "--cost.path", path)
        yield Bad(f"a cost {what}: {path}", words, says, change)
    # What a function gives is known once there are responses.
    for what, text, says in (
        ("raises several lines", "raise OSError('gone\\n\\nfor ever')", "raised OSError: gone"),
        ("exits", "raise SystemExit(3)", "SystemExit"),
        ("returns nothing", "return None", "returned a NoneType, expected a list of"),
        ("returns infinity", "return [float('inf')] * len(r)", "returned inf"),
        ("returns 10**400", "return [10**400] * len(r)", "returned"),
        ("returns 1e39", "return [1e39] * len(r)", "returned 1e\\+39 for response 0, expected a finite number"),
        ("returns too many", "return [1.0] * (len(r) + 1)", "scores for"),
    ):
        words = (*TRAIN, "--cost.path", "mine:cost")
        says = f"'mine:cost'.*{says}"
        change = writes(f"def cost(p, r):\n    {text}\n")
        yield Bad(f"a cost that {what}", words, says, change, leaves=_STARTED)


# What a run has once its first step begins.
_STARTED = r"out(/.*)?|__pycache__(/.*)?|mine\.py"


def _nothing(folder: Path) -> None:
    """The command alone is wrong."""


def _configurations() -> Iterator[Bad]:
    def holds(content: str | bytes) -> Change:
        content = content.encode() if isinstance(content, str) else content
        return lambda folder: (folder / "wrong.yaml").write_bytes(content)

    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    cases: list[tuple[str, str | bytes, str]] = [
        ("empty", "", "NoneType, expected a mapping"),
        ("comments alone", "# nothing\n", "NoneType, expected a mapping"),
        ("a list", "- seed: 1\n", "holds a list, expected a mapping"),
        ("a word", "seed\n", "holds a str, expected a mapping"),
        ("a tab", "engine:\n\tdtype: auto\n", "is not valid YAML"),
        ("a bracket left open", "seed: [1\n", "is not valid YAML"),
        ("wrong indentation", "engine:\n    dtype: auto\n  zero_stage: 1\n", "is not valid YAML"),
        ("two documents", "seed: 1\n---\nseed: 2\n", "is not valid YAML"),
        ("a key twice", "seed: 1\nseed: 2\n", "'seed' is there twice"),
        ("an unknown key", "sede: 1\n", "unknown option 'sede'"),
        ("an unknown key in a section", "engine: {zero: 1}\n", "unknown option 'engine.zero'.*'engine.zero_stage'"),
        ("a dotted key of a wrong value", "engine.dtype: float7\n", "engine.dtype.*float7"),
        ("a section that is a number", "engine: 3\n", "engine is 3, expected a mapping"),
        ("a section that is null", "engine:\n", "engine is None, expected a mapping|engine is null"),
        ("a section that is a list", "engine: [dtype, auto]\n", "engine is .*expected a mapping"),
        ("a section inside that is a text", "policy: {lora: yes please}\n", "policy.lora is .*expected a mapping"),
        ("a number as a key", "1: 2\n", "unknown option '1'"),
        ("null as a key", "~: 2\n", "unknown option 'None'"),
        ("a list as a key", "? [a, b]\n: 2\n", "wrong.yaml"),
        ("a mapping as a key", "? {a: b}\n: 2\n", "wrong.yaml"),
        ("a Python object", "seed: !!python/object/apply:os.getpid []\n", "is not valid YAML"),
        ("an unknown tag", "seed: !mine 1\n", "is not valid YAML"),
        ("an unknown alias", "seed: *one\n", "is not valid YAML"),
        ("an alias of itself", "seed: &a [*a]\n", "aliases stand for more"),
        ("an alias of its own mapping", "&a\nengine: *a\n", "wrong.yaml|engine"),
        ("lists of lists of lists", bomb, "aliases stand for more"),
        ("10,000 brackets", "seed: " + "[" * 10_000, "wrong.yaml"),
        ("a byte that is no UTF-8", b"seed: \xff\n", "is not valid YAML"),
        ("a zero byte", b"seed: 1\x00\n", "is not valid YAML"),
        ("a picture", b"\x89PNG\r\n\x1a\n\x00\x00", "is not valid YAML"),
        ("a date for a number", "seed: 2026-01-01\n", "seed"),
        ("a time for a date", "date: 2026-01-01 10:00:00\n", "date"),
        ("hexadecimal that is none", "seed: 0xZZ\n", "seed"),
        ("a number with a leading sign of equality", "seed = 1\n", "holds a str, expected a mapping"),
        ("binary", "output_dir: !!binary aGVsbG8=\n", "output_dir|wrong.yaml"),
        ("merged with what is no mapping", "<<: 3\n", "is not valid YAML"),
        ("a folder with a zero byte", 'output_dir: "a\\0b"\n', "output_dir is .*zero byte"),
        ("prompts with a zero byte", 'data: {prompts: "a\\0.jsonl"}\n', "data.prompts is .*zero byte"),
        ("a name with a dot", "constraints: {a.b: {path: x:y}}\n", "a.b"),
        ("a name that is a number", "reward: {path: m:f}\nconstraints: {1: {path: m:f}}\n", "name.*1"),
        ("constraints that are a list", "constraints: [{path: x:y}]\n", "constraints"),
        ("a constraint that is a text", "constraints: {a: x:y}\n", "constraints.a"),
        ("an unknown key in a constraint", "constraints: {a: {pth: x}}\n", "unknown option 'constraints.a.pth'"),
    ]
    for what, content, says in cases:
        words = ("repo_fast.train", "--config", "wrong.yaml")
        words += () if "folder" in what else ("--output_dir", "out")
        yield Bad(f"a configuration: {what}", words, says, holds(content))
    words = ("repo_fast.train", "--config", "wrong.yaml", "--output_dir", "out")

    def closed(folder: Path) -> None:
        holds("seed: 1\n")(folder)
        (folder / "wrong.yaml").chmod(0o000)

    yield Bad("a configuration: no right to read it", words, r"wrong\.yaml", closed, as_nobody=True)
    pipe = Bad("a configuration: a pipe", words, r"wrong\.yaml", lambda folder: os.mkfifo(folder / "wrong.yaml"))
    yield pipe


def _combinations() -> Iterator[Bad]:
    cases: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
        (TRAIN, ("--rollout.prompts_per_step", "6"), r"prompts_per_step is 6, expected at most the 5 prompts of"),
        (TRAIN, ("--update.minibatches", "100"), "minibatches is 100, expected at most the 6 responses"),
        (TRAIN, ("--update.ptx_batch_size", "9"), "has 4 demonstrations.*ptx_batch_size"),
        (TRAIN, ("--data.max_prompt_tokens", "2"), "all 5 prompts are longer than the limit of 2 tokens"),
        (TRAIN, ("--data.ptx_max_tokens", "2"), "all 4 demonstrations are longer than 2 tokens"),
        (TRAIN, ("--data.ptx", "null"), "ptx_coefficient is 0.1 and data.ptx is None"),
        (TRAIN, ("--profile", "7"), "profile is 7, expected a step of the run"),
        (TRAIN, ("--evaluation.every", "1"), "evaluation.every is 1 with data.eval_prompts null"),
        (TRAIN, ("--checkpoint.keep_best", "mean_reward"), "keep_best"),
        (TRAIN, ("--policy.trainable_layers", "9"), "trainable_layers is 9|9"),
        (TRAIN, ("--policy.lora.rank", "4", "--policy.lora.targets", '["nowhere"]'), "nowhere"),
        (TRAIN, ("--policy.lora.alpha", "3"), "policy.lora.alpha is 3.0 with policy.lora.rank 0"),
        (TRAIN, ("--policy.quantize", "nf4"), "policy.quantize is 'nf4' with policy.lora.rank 0"),
        (TRAIN, ("--policy.pad_token", ""), "the pad token is '', expected a token"),
        (TRAIN, ("--rollout.vllm.tensor_parallel", "2"), "rollout.vllm.tensor_parallel is 2, expected its default"),
        (TRAIN, ("--cost.guard.preset", "qwen3guard"), "cost.guard.preset is 'qwen3guard', expected its default"),
        (TRAIN, ("--rollout.engine", "vllm"), "vllm"),
        (TRAIN, ("--policy.attention", "flash_attention_2"), "flash_attention_2"),
        (TRAIN, ("--log.loggers", '["wandb"]'), "wandb"),
        (TRAIN, ("--engine.ops_backend", "triton"), "engine.ops_backend is 'triton'"),
        (TRAIN, ("--engine.offload_parameters", "true", "--engine.zero_stage", "1"), "offload_parameters is true with"),
        (TRAIN, ("--algorithm.importance_mask", "[2, 3]"), "importance_mask is"),
        (TRAIN, ("--policy_optimizer.betas", "[0.9, 1]"), "policy_optimizer.betas is"),
        (TRAIN, ("--policy_optimizer.learning_rate", ".inf"), "learning_rate is inf, expected a finite number"),
        (
            TRAIN,
            ("--constraints.a.path", "tests.scorers:cost"),
            "cost.path is .* with constraints a, expected one form",
        ),
        (TRAIN, ("--constraints", '{"a": {}}'), "--constraints with a whole mapping"),
        (TRAIN, ("--data.template", "chat", "--policy.path", "cost"), "cost"),
        (TRAIN, ("--reward.expect", '["tea", 1]'), "reward.expect is given with 'tests.scorers:reward'"),
        (TRAIN, ("--reward.expect", "tea"), "reward.expect"),
        (TRAIN, ("--rollout.stop", '[""]'), "rollout.stop"),
        (SFT, ("--data.max_tokens", "2"), "are longer than 2 tokens"),
        (SFT, ("--model.trainable_layers", "3"), "trainable_layers"),
        (SCORE, ("--kind", "rewards"), "kind"),
        (SCORE, ("--expect", "tea"), "expect"),
        (SCORE, ("--expect", "tea", "one"), "--expect has the score 'one', expected a number"),
        (SCORE, ("--expect", "tea", "nan"), "expect"),
        (SCORE, ("--heads.weapons.severity", "4"), "heads.weapons.severity is 4"),
        (SCORE, ("--heads.weapons.categories", '["Violance"]'), "'Violance'.*nearest is 'Violence'"),
        (SCORE, ("--kind", "reward", "--heads.harm.severity", "1"), "kind is 'reward', expected cost with heads"),
        (SCORE, ("--layout", "scores"), "layout"),
    ]
    for words, options, says in cases:
        job = words[0].removeprefix("repo_fast.")
        yield Bad(f"{job} {' '.join(options)}", (*words, *options), says)


def _evaluations() -> Iterator[Bad]:
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--policy", "policy"), "--policy is 'policy', expected NAME=PATH"),
        (("--policy", "before=wide"), "--policy before=wide: the name is given twice"),
        (("--policy", "=policy"), "the policy name is ''"),
        (("--policy", "a b=policy"), "the policy name is 'a b'"),
        (("--policy", "after="), "the path of policy 'after' is ''"),
        (("--policy",), "--policy is ''"),
        (("--policies.before", "wide"), "--policies"),
        (("--reference", "start"), "reference is 'start', expected the name of a policy: before"),
        (("--claim", "unsafe_prompts"), "--claim is 'unsafe_prompts', expected NAME=LIMIT"),
        (("--claim", "unsafe_prompts=few"), "--claim unsafe_prompts is 'few', expected a number"),
        (("--claim", "unsafe_prompts=nan"), "--claim unsafe_prompts is 'nan', expected a number"),
        (("--claim", "unsafe_prompts=2"), "unsafe_prompts.limit is 2.0, expected a share"),
        (("--claim", "unsafe_prompts=-0.1"), "unsafe_prompts.limit is -0.1, expected a share"),
        (("--claim", "safe=0.1"), "the claim's name 'safe' is not one of"),
        (("--claim", "a b=0.1"), "the claim's name is 'a b'"),
        (("--claim", "interference=0.1"), "interference is of the reference itself"),
        (("--claim", "attack_success=0.1"), "without suites, expected a --suite"),
        (("--claim", "unsafe_prompts=0.1", "--claim", "unsafe_prompts=0.2"), "the name is given twice"),
        (("--claim", "unsafe_prompts=0.1", "--certify.delta", "0"), "certify.delta is 0.0"),
        (("--claim", "unsafe_prompts=0.1", "--certify.policy", "after"), "certify.policy is 'after'"),
        (("--accept-asymptotic",), "certify.accept_asymptotic is True without claims"),
        (("--certify", "nowhere.yaml"), r"--certify 'nowhere\.yaml' is no file"),
        (("--certify",), "--certify '' is no file"),
        (("--certify", "train.yaml"), r"train\.yaml"),
        (("--certify", "prompts.jsonl"), r"prompts\.jsonl"),
        (("--suite", "harmbanch"), "has the suite 'harmbanch', expected"),
        (("--suite", "xstest,xstest"), "the suite is given twice"),
        (("--suite", "xstest=nowhere.csv"), "prompts is 'prompts.jsonl' with suites"),
        (("--sampling.temperature", "0"), "sampling.temperature is 0.0, expected a number above 0"),
        (("--judge.url", "localhost:8000", "--judge.model", "m"), "judge.url is 'localhost:8000'"),
        (("--judge.model", "gpt"), "judge.model is 'gpt', expected judge.url as well"),
        (("--judge.url", "http://127.0.0.1:9/v1", "--judge.model", "m", "--judge.retries", "0"), "127.0.0.1:9"),
        (("--prompts_limit", "0"), "prompts_limit is 0"),
        (("--max_prompt_tokens", "2"), r"longer than max_prompt_tokens \(2\)"),
        (("--threshold", "nan"), "threshold.*nan"),
        (("--reward.path", "nowhere:reward"), "module 'nowhere' cannot be imported"),
        (("--prompts_fields.prompt", "category"), "prompts_fields.prompt is 'category'"),
        (("--config", "train.yaml"), r"train\.yaml is a configuration of `repo-fast train`, expected"),
    ]
    for options, says in cases:
        # The cache is in a folder that is made first.
        leaves = "out(/.*)?" if "127.0.0.1" in " ".join(options) else "(?!)"
        yield Bad(f"evaluate {' '.join(options)}", (*EVALUATE, *options), says, leaves=leaves)
    suites = (*EVALUATE[:3], *EVALUATE[5:])
    xstest = "xstest.csv"
    for what, content, says in (
        ("no such file", None, r"xstest\.csv"),
        ("empty", "", r"xstest\.csv"),
        ("of other columns", "text\ntea\n", r"xstest\.csv"),
        ("of an unknown label", "id,prompt,type,label\n1,tea,homonyms,maybe\n", r"xstest\.csv"),
        ("no CSV", "\x00\x01", r"xstest\.csv"),
    ):

        def write(folder: Path, content: str | None = content) -> None:
            if content is not None:
                (folder / xstest).write_text(content)

        yield Bad(f"evaluate --suite xstest: {what}", (*suites, "--suite", f"xstest={xstest}"), says, write)
    yield Bad("evaluate without a policy", EVALUATE[:1], "policies is {}, expected at least one")
    without = ("repo_fast.evaluate", "--policy", "before=policy", "--prompts", "prompts.jsonl", "--output_dir", "out")
    yield Bad("evaluate without a reward", without, "reward.path is ''")


def _other_programs() -> Iterator[Bad]:
    stages = "--sft.option, --reward.option, --cost.option, --repo.option"
    cases: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
        (PLAN[:3], (), "--gpus"),
        (PLAN, ("--gpus", "0"), "--gpus.*0, expected a whole number of at least 1"),
        (PLAN, ("--gpus", "many"), "--gpus.*many"),
        (PLAN, ("--gpus", "-1"), "--gpus"),
        (PLAN, ("--gpus", "1.5"), "--gpus.*1.5"),
        (PLAN, ("--gpus", "²"), "--gpus"),
        (PLAN, ("--device", "h200x"), "--device.*'h200x'"),
        (PLAN, ("--response_tokens", "0"), "--response_tokens.*0, expected"),
        (PLAN, ("--rollout.temprature", "1"), "unknown option 'rollout.temprature'"),
        (PLAN, ("--cost.path", "./nowhere"), r"\./nowhere"),
        (PLAN, ("--config", "tinny"), "--config 'tinny'"),
        (PLAN, ("--total_steps", "0"), "total_steps is 0"),
        (PIPELINE, ("--ranks", "0"), "--ranks is 0, expected at least 1"),
        (PIPELINE, ("--ranks", "two"), "--ranks.*'two'"),
        (PIPELINE, ("--until", "ppo"), "--until is 'ppo', expected a stage: sft, reward, cost, repo"),
        (PIPELINE, ("--seed", "1"), f"unknown option '--seed'.*{stages}"),
        (PIPELINE, ("--rewards.seed", "1"), "unknown option '--rewards.seed'"),
        (PIPELINE, ("--sft.", "1"), "unknown option '--sft.'"),
        (PIPELINE, ("--sft.sede", "1"), "unknown option 'sede'"),
        (PIPELINE, ("--sft.seed", "one"), "seed.*one"),
        (PIPELINE, ("--sft.output_dir", "a"), "'--sft.output_dir' is the pipeline's to choose"),
        (PIPELINE, ("sft",), "unexpected word 'sft', expected an option"),
        (PIPELINE, ("--repo.data.eval_prompts", "null"), "--repo.data.eval_prompts is null"),
        (PIPELINE, ("--ranks",), "--ranks"),
        (SCORE[:1], ("--check",), "--check"),
        (SCORE[:1], ("--check", "cost", "--convert", "cost"), "not allowed with argument"),
        (SCORE[:1], ("--convert", "cost"), "--convert FOLDER and --to FOLDER belong together"),
        (SCORE[:1], ("--check", "cost", "--layout", "score"), "--layout belongs to --convert"),
        (SCORE[:1], ("--convert", "cost", "--to", "new", "--head", "a"), "--head 'a' belongs to"),
        (SCORE[:1], ("--convert", "cost", "--to", "new", "--layout", "hf"), "--layout.*'hf'"),
        (SCORE[:1], ("--check", "cost", "--kind", "costs"), "--kind.*'costs'"),
        (SCORE[:1], ("--check", "cost", "--expect", "tea"), "--expect"),
        (SCORE[:1], ("--check", "cost", "--expect", "tea", "nan"), "--expect"),
        (SCORE[:1], ("--check", "cost", "--seed", "1"), "--seed"),
    ]
    for words, options, says in cases:
        program = words[0].removeprefix("repo_fast.")
        yield Bad(f"{program} {' '.join(options) or 'without --gpus'}", (*words, *options), says)

    def holds(content: str) -> Change:
        def change(folder: Path) -> None:
            (folder / "out/sft").mkdir(parents=True)
            (folder / "out/sft/pipeline.json").write_text(content)

        return change

    record = '{"config": {"seed": 1}, "inputs": {}, "ranks": 1, "id": "a"}'
    for what, content, says in (
        ("that is not JSON", "{", "pipeline.json is not JSON"),
        ("that is a list", "[]", "pipeline.json"),
        ("that is a number", "7", "pipeline.json"),
        ("that lacks the configuration", '{"id": "a"}', "pipeline.json"),
        ("in UTF-16", "{}", "pipeline.json"),
        ("of another configuration", record, "stage sft in out/sft has .*, this command has"),
    ):
        change = holds(content)
        if what == "in UTF-16":

            def change(folder: Path) -> None:
                holds("")(folder)
                (folder / "out/sft/pipeline.json").write_bytes("{}".encode("utf-16"))

        yield Bad(f"pipeline, a record {what}", PIPELINE, says, change)
