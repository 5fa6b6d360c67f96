"""How large `report.html` of a large evaluation is, and how long it takes to write and to open.

    python -m bench.trainer.evaluation_page [--prompts 10000] [--out FOLDER]

Invented texts and scores: four policies, eight responses a prompt, twenty categories. Printed are the size, the seconds
to compare and to write, and, where selenium, chromium and its driver are installed, the seconds until a browser shows
the list of prompts: the median of three fresh browsers.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from repo_fast.report.comparison import compare
from repo_fast.report.measures import Evaluation
from repo_fast.report.page import write_page

THRESHOLD = 0.0


def make_texts(generator: np.random.Generator, count: int, characters: int) -> list[str]:
    """Texts of about that length, in words that are as frequent as those of a natural language."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    frequencies = 1 / np.arange(1, len(letters) + 1)
    vocabulary = [
        "".join(generator.choice(letters, size=size, p=frequencies / frequencies.sum()))
        for size in np.clip(generator.poisson(5, size=4000), 2, 12)
    ]
    weights = 1 / (np.arange(len(vocabulary)) + 3)
    words = max(1, characters // 6)
    drawn = generator.choice(len(vocabulary), size=(count, 2 * words), p=weights / weights.sum())
    lengths = generator.integers(max(1, words // 2), 2 * words - words // 2 + 1, size=count)
    return [
        " ".join(vocabulary[word] for word in row[:length]).capitalize() + "."
        for row, length in zip(drawn, lengths, strict=True)
    ]


def make_evaluation(
    prompts: int = 60,
    policies: int = 3,
    samples: int = 4,
    categories: int = 4,
    characters: int = 120,
    seed: int = 0,
    resamples: int = 100,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A report and its samples: a reference, and policies that trade reward for cost in different ways."""
    generator = np.random.default_rng(seed)
    names = ["before", "repo", "ppo_lag", "ppo", *(f"policy {i}" for i in range(4, policies))][:policies]
    groups = [f"category {i}" for i in range(categories)]
    category = generator.integers(max(categories, 1), size=prompts)
    harm = generator.normal(-0.9, 1.2, size=prompts) + 0.25 * (category - category.mean())
    helpfulness = 0.5 * harm + generator.normal(0.8, 0.8, size=prompts)
    moves = {
        "before": (harm, helpfulness),
        "repo": (np.where(harm > 0, 0.45 * harm - 0.3, harm), helpfulness + 0.1),
        "ppo_lag": (0.35 * harm - 0.35 + 0.3 * generator.normal(size=prompts), helpfulness + 0.25),
    }
    ids = 100 + np.arange(prompts)
    prompt_texts = [f"{text[:-1]}?" for text in make_texts(generator, prompts, max(30, characters // 4))]
    rows, evaluations = [], {}
    # The second sample of the reference is an evaluation like that of a policy.
    for name in ["before again", *names]:
        policy = name.removesuffix(" again")
        costs, rewards = moves.get(policy, (harm + 0.4, helpfulness + 0.6))
        costs = costs[:, None] + 0.5 * generator.normal(size=(prompts, samples))
        rewards = rewards[:, None] + 0.6 * generator.normal(size=(prompts, samples))
        lengths = generator.integers(5, 60, size=(prompts, samples))
        finished = generator.random((prompts, samples)) > 0.1
        evaluations[name] = Evaluation(
            np.repeat(ids, samples), rewards.ravel(), costs.ravel(), response_lengths=lengths.ravel()
        )
        texts = iter(make_texts(generator, prompts * samples, characters))
        for prompt, sample in itertools.product(range(prompts), range(samples)):
            rows.append(
                {
                    "policy": policy,
                    "prompt_id": int(ids[prompt]),
                    "category": groups[category[prompt]] if groups else None,
                    "prompt": prompt_texts[prompt],
                    "sample": sample + samples * (name != policy),
                    "response": next(texts),
                    "reward": float(rewards[prompt, sample]),
                    "cost": float(costs[prompt, sample]),
                    "response_length": int(lengths[prompt, sample]),
                    "finished": bool(finished[prompt, sample]),
                }
            )
    second = evaluations.pop("before again")
    settings = {
        "threshold": THRESHOLD,
        "samples_per_prompt": samples,
        "prompts": prompts,
        "reference": "before",
        "prompts_source": "world:test",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 64,
        "seed": seed,
        "resamples": resamples,
        "reward": "models/reward",
        "cost": "models/cost",
        "date": "2026-11-24",
    }
    by_category = {name: ids[category == i].tolist() for i, name in enumerate(groups)}
    report = compare(
        evaluations,
        second,
        "before",
        threshold=THRESHOLD,
        categories=by_category,
        resamples=resamples,
        seed=seed,
    )
    return {"settings": settings, **report}, rows


def seconds_to_open(page: Path) -> float | None:
    """Until a fresh browser shows the list of prompts; None where there is no browser to ask."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return None
    if binary is None or driver is None:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.get("about:blank")
        started = time.perf_counter()
        browser.get(page.as_uri())
        while not browser.execute_script("return document.documentElement.dataset.ready"):
            time.sleep(0.02)
        return time.perf_counter() - started
    finally:
        browser.quit()


def main() -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="folder for the page; by default it is thrown away")
    chosen = parser.parse_args()
    started = time.perf_counter()
    report, rows = make_evaluation(chosen.prompts, 4, samples=8, categories=20, characters=300, resamples=2000)
    compared = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        page = (folder / "report.html").resolve()
        write_page(page, report, rows)
        written = time.perf_counter()
        opened = [seconds for _ in range(3) if (seconds := seconds_to_open(page)) is not None]
        measured = {
            "prompts": chosen.prompts,
            "responses": len(rows),
            "megabytes": page.stat().st_size / 1e6,
            "seconds_to_invent_and_compare": compared - started,
            "seconds_to_write": written - compared,
            "seconds_to_open": statistics.median(opened) if opened else None,
        }
    print(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
