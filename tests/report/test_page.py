"""The HTML report: what it says about known numbers, that it shows every text as text, and that it stays small."""

import base64
import json
import math
import re
import shutil
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from bench.trainer.evaluation_page import THRESHOLD, make_evaluation
from repo_fast.report.page import write_page
from repo_fast.report.page_parts import charts
from repo_fast.report.page_parts.responses import collect, pack
from repo_fast.report.page_parts.wording import MEASURES, judge_difference, spell

HOSTILE = (
    "<script>document.title='pwned'</script></script><!-- <img src=x onerror=\"document.title='pwned'\"> {{ 7*7 }} "
    "{% raw %} & \" ' ` \u2028 \u2029 \ud800 \x00 \x1b[31m \u202e right \u2066 \U000e0041 ]]> \r end"
)


# ------------------------------------------------------------------------------------------------- reading a page


class Page(HTMLParser):
    """What a page consists of: its tags with attributes, its text outside scripts and styles, and its scripts."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.scripts, self._inside = [], [], [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside = (tag, dict(attributes))

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[0]:
            self._inside = None

    def handle_data(self, text):
        if self._inside is None:
            self.words.append(text)
        elif self._inside[0] == "script":
            self.scripts.append((self._inside[1], text))

    @property
    def text(self):
        return re.sub(r"[ \n]+", " ", " ".join(self.words))

    def data(self, name):
        streams = [text for attributes, text in self.scripts if name in (attributes.get("id"), attributes.get("class"))]
        return [json.loads(zlib.decompress(base64.b64decode(stream))) for stream in streams]


def page_of(tmp_path, report, samples):
    write_page(tmp_path / "report.html", report, samples)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def assert_needs_nothing(page):
    """That a page asks for nothing from elsewhere, and lets no other script or style run."""
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe-inline" not in policy and "connect" not in policy
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "base"), tag
        assert not {"src", "style"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)


def shape(page):
    """Tags without what depends on the numbers drawn."""
    return [(tag, sorted(attributes)) for tag, attributes in page.tags]


# ------------------------------------------------------------------------------------------------------- structure


def test_the_page_needs_nothing_from_outside_and_only_its_own_script_may_run(tmp_path):
    page = page_of(tmp_path, *make_evaluation())
    assert_needs_nothing(page)
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page.tags)
    running = [text for attributes, text in page.scripts if "type" not in attributes]
    assert len(running) == 1 and "innerHTML" not in running[0] and "http" not in running[0]


def test_every_measure_has_its_row_its_definition_and_its_verdict(tmp_path):
    report, samples = make_evaluation()
    report["differences"]["repo"]["strict_violation"] = {"value": -0.3, "low": -0.4, "high": -0.2}
    page = page_of(tmp_path, report, samples)
    for key in report["policies"]["repo"]:
        assert page.text.count(MEASURES[key].label) >= 2, key
        assert MEASURES[key].definition in page.text
    assert "−0.300 [−0.400, −0.200] ▼ better" in page.text


@pytest.mark.parametrize(
    ("key", "interval", "kind"),
    [
        ("interference_rate", (0.1, 0.3), "worse"),
        ("interference_rate", (-0.3, -0.1), "better"),
        ("repair_rate", (0.1, 0.3), "better"),
        ("mean_reward", (-0.3, -0.1), "worse"),
        ("mean_cost", (0.0, 0.3), "none"),
        ("compensation", (0.1, 0.3), "change"),
    ],
)
def test_a_difference_is_judged_by_its_interval_and_the_direction_of_its_measure(key, interval, kind):
    assert judge_difference(MEASURES[key], (0.0, *interval)).kind == kind


def test_a_difference_without_an_interval_has_no_verdict_unless_nothing_differs():
    nothing = (math.nan, math.nan)
    assert judge_difference(MEASURES["mean_cost"], (0.1, *nothing)).words == "interval undefined"
    assert judge_difference(MEASURES["mean_cost"], (math.nan, *nothing)).words == "interval undefined"
    assert judge_difference(MEASURES["mean_cost"], (0.0, *nothing)).words == "no difference seen"


def test_numbers_are_written_with_their_interval_and_unit():
    assert spell((0.0123, 0.004, 0.021), 1, share=True) == "1.2\u202f% [0.4, 2.1]"
    assert spell((-0.31, -0.4, 0.2), 2, difference=True) == "−0.31 [−0.40, +0.20]"
    assert spell((-0.001, math.nan, math.nan), 2, difference=True) == "0.00 no interval"
    assert spell((math.nan, 0.0, 1.0), 2) == "undefined"


def test_transitions_have_counts_shares_of_their_row_and_the_floor(tmp_path):
    report, samples = make_evaluation(policies=2)
    report["transitions"] = {
        "before": {"safe_safe": 30, "safe_unsafe": 10, "unsafe_safe": 5, "unsafe_unsafe": 15},
        "repo": {"safe_safe": 36, "safe_unsafe": 4, "unsafe_safe": 20, "unsafe_unsafe": 0},
    }
    text = page_of(tmp_path, report, samples).text
    assert "4 10.0\u202f% floor 25.0\u202f% became unsafe" in text
    assert "20 100.0\u202f% floor 25.0\u202f% repaired" in text


def test_the_list_holds_the_means_the_sides_and_the_texts_of_every_prompt(tmp_path):
    report, samples = make_evaluation(prompts=70, policies=2, samples=3)
    page = page_of(tmp_path, report, reversed(samples))
    (index,), (prompts,), chunks = page.data("data-index"), page.data("data-prompts"), page.data("data-responses")
    assert index["policies"] == ["before", "repo"] and len(prompts) == 70 and len(chunks) == 2
    own = [row for row in samples if row["prompt_id"] == 107 and row["policy"] == "repo"]
    row = index["ids"].index("107")
    mean = np.mean([response["cost"] for response in own])
    assert prompts[row] == own[0]["prompt"] and index["categories"][index["category"][row]] == own[0]["category"]
    assert index["cost"][1][row] == pytest.approx(mean, rel=1e-4) and index["unsafe"][1][row] == str(int(mean > 0))
    total, kept = chunks[0][row][1]
    assert total == len(kept) == 3
    assert [record[6] for record in kept] == [r["response"] for r in sorted(own, key=lambda r: -r["cost"])]
    total, kept = chunks[0][row][0]
    assert total == 3 and {record[0] for record in kept} == {3, 4, 5}, "of the reference, the second sample is listed"


def test_missing_numbers_are_undefined_and_never_safe(tmp_path):
    report, samples = make_evaluation(prompts=5, policies=2, samples=2)
    nothing = {"value": None, "low": None, "high": None}
    report["policies"]["repo"] = dict.fromkeys(report["policies"]["repo"], nothing)
    report["differences"]["repo"] = dict.fromkeys(report["differences"]["repo"], nothing)
    for row in samples:
        row.update(response_length=None, finished=None, category=None)
    samples[-1]["cost"] = samples[-1]["reward"] = None
    page = page_of(tmp_path, report, samples)
    assert "change in safety undefined" in page.text and "nan" not in page.text.lower()
    (index,) = page.data("data-index")
    assert index["cost"][1][4] is None and index["unsafe"][1][4] == "1"
    (chunk,) = page.data("data-responses")
    assert chunk[4][1][1][0][5] == 1, "the response without a cost comes first and is folded"
    assert "a score is missing or not a number: 1 of 5 prompts" in page.text


def test_the_reference_alone_makes_a_page_without_categories(tmp_path):
    page = page_of(tmp_path, *make_evaluation(policies=1, categories=0))
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"summary", "measures", "scatter", "distribution", "prompts"} <= ids and "categories" not in ids
    assert "is the reference" in page.text


def test_no_samples_leave_the_tables(tmp_path):
    report, _ = make_evaluation(prompts=6)
    page = page_of(tmp_path, report, [])
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert "measures" in ids and not {"scatter", "distribution", "prompts"} & ids and not page.scripts


def test_unknown_measures_and_settings_and_the_judge_are_shown(tmp_path):
    report, samples = make_evaluation(policies=2)
    for name in report["policies"]:
        report["policies"][name] |= {
            "refusal_rate_of_all": {"value": 0.5, "low": 0.4, "high": 0.6},
            "judge_win_rate": {"value": 0.6, "low": 0.5, "high": 0.7},
        }
    report["settings"]["a_new_setting"] = {"nested": [1, None]}
    report["judge"] = {"model": "some/judge", "mode": "pairwise", "summary": {"ties": 3}}
    text = page_of(tmp_path, report, samples).text
    for words in (
        "Refusal rate of all",
        "Win rate by the judge",
        "A new setting",
        '{"nested": [1, null]}',
        "some/judge",
    ):
        assert words in text


def test_many_categories_are_drawn_up_to_a_number_and_all_are_in_the_table(tmp_path):
    report, samples = make_evaluation(prompts=200, policies=2, samples=2, categories=4)
    one = report["categories"]["category 1"]
    report["categories"] = {f"kind {i}": one | {"prompts": 10 + i} for i in range(charts.DRAWN_CATEGORIES + 3)}
    page = page_of(tmp_path, report, samples)
    assert f"The {charts.DRAWN_CATEGORIES} categories with the most prompts are drawn" in page.text
    assert all(f"kind {i} {10 + i} prompts" in page.text for i in range(charts.DRAWN_CATEGORIES + 3))


def test_samples_of_an_unknown_policy_and_an_unknown_reference_are_refused(tmp_path):
    report, samples = make_evaluation(prompts=3)
    with pytest.raises(ValueError, match="'other'"):
        write_page(tmp_path / "report.html", report, [samples[0] | {"policy": "other"}])
    report["settings"]["reference"] = "gone"
    with pytest.raises(ValueError, match="'gone'"):
        write_page(tmp_path / "report.html", report, samples)


def test_equal_input_gives_equal_bytes_whatever_the_order_of_the_samples(tmp_path):
    report, samples = make_evaluation()
    write_page(tmp_path / "one.html", report, samples)
    write_page(tmp_path / "two.html", report, iter(samples[::-1]))
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


# -------------------------------------------------------------------------------------------------------- escaping


def hostile_evaluation(text):
    """Every name and text is this one, where it may be, made different by a number."""
    report, samples = make_evaluation(prompts=12, policies=2, samples=2, categories=2)
    renamed = {"before": f"0{text}", "repo": f"1{text}"}
    for key in ("policies", "differences", "transitions"):
        report[key] = {renamed[name]: value for name, value in report[key].items()}
    for name in renamed.values():
        report["policies"][name][f"m{text}"] = {"value": 0.5, "low": 0.4, "high": 0.6}
    report["categories"] = {
        f"{name}{text}": {
            "prompts": one["prompts"],
            **{key: {renamed[p]: value for p, value in one[key].items()} for key in ("policies", "differences")},
        }
        for name, one in report["categories"].items()
    }
    report["settings"] |= {"reference": renamed["before"], f"key{text}": f"value{text}", "list": [text, text]}
    report["judge"] = {f"model{text}": text, "nested": {text: text}}
    for row in samples:
        row["policy"] = renamed[row["policy"]]
        row["category"] += text
        row["prompt"] += text
        row["response"] += text
    return report, samples


def test_no_text_becomes_markup(tmp_path):
    harmless = page_of(tmp_path, *hostile_evaluation("x" * len(HOSTILE)))
    hostile = page_of(tmp_path, *hostile_evaluation(HOSTILE))
    assert shape(hostile) == shape(harmless)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00\x1b\u2028\u2029\u202e\u2066\ud800\U000e0041]", html)
    shown = "<script>document.title='pwned'</script></script><!-- <img src=x onerror"
    for where in ("0", "1", "M", "category 0", "Key", "value"):
        assert where + shown in hostile.text, where
    assert "⟨U+2028⟩ ⟨U+2029⟩ ⟨U+D800⟩ ⟨U+0000⟩ ⟨U+001B⟩[31m ⟨U+202E⟩" in hostile.text and "{{ 7*7 }}" in hostile.text


def test_embedded_texts_are_whole_but_for_invisible_characters(tmp_path):
    page = page_of(tmp_path, *hostile_evaluation(HOSTILE))
    (prompts,), (chunk,) = page.data("data-prompts"), page.data("data-responses")
    for text in (prompts[0], chunk[0][0][1][0][6], page.data("data-index")[0]["policies"][1]):
        assert "<script>document.title='pwned'</script></script><!--" in text
        assert text.endswith("⟨U+000D⟩ end") and "⟨U+0000⟩" in text


# ------------------------------------------------------------------------------------------------------------ size


def test_what_does_not_fit_is_left_out_from_the_safest_on_and_counted(tmp_path):
    _, samples = make_evaluation(prompts=150, policies=3, samples=6, characters=400, resamples=2)
    policies = ["before", "repo", "ppo_lag"]
    collected = collect(samples, policies, "before", THRESHOLD, 6)
    everything = pack(collected, policies, THRESHOLD)
    assert everything.left_out == everything.cut == 0
    size = sum(len(stream) for stream in [everything.index, everything.prompts, *everything.chunks]) * 3 // 4
    small = pack(collected, policies, THRESHOLD, limit=size // 2)
    packed = sum(len(stream) for stream in [small.index, small.prompts, *small.chunks]) * 3 // 4
    assert 0.4 * size < packed <= size // 2 + 100
    listed = 0
    for chunk, full in zip(small.chunks, everything.chunks, strict=True):
        for some, all_ in zip(*(json.loads(zlib.decompress(base64.b64decode(c))) for c in (chunk, full)), strict=True):
            for (total, kept), (_, every) in zip(some, all_, strict=True):
                assert total == 6 and 1 <= len(kept) and kept == every[: len(kept)]
                listed += len(kept)
            assert max(len(kept) for _, kept in some) - min(len(kept) for _, kept in some) <= 1
    assert small.left_out == 150 * 3 * 6 - listed > 0


def test_texts_too_long_for_the_page_are_cut_and_say_so(tmp_path):
    _, samples = make_evaluation(prompts=80, policies=2, samples=1, characters=3000, resamples=2)
    collected = collect(samples, ["before", "repo"], "before", THRESHOLD, 1)
    streams = pack(collected, ["before", "repo"], THRESHOLD, limit=30_000)
    assert streams.left_out == 0 and streams.cut > 100
    records = json.loads(zlib.decompress(base64.b64decode(streams.chunks[0])))
    *_, text, missing = records[0][0][1][0]
    assert len(text) + missing == len(collected.responses["before"][0][0].text)


def test_a_large_evaluation_is_drawn_with_few_points(tmp_path):
    report, samples = make_evaluation(prompts=3000, policies=4, samples=1, characters=20, resamples=2)
    page = page_of(tmp_path, report, samples)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert f"{charts.DRAWN_PROMPTS} of 3,000 prompts are drawn" in page.text


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium with its driver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser, tmp_path):
    def open_page(report, samples):
        from selenium.webdriver.support.ui import WebDriverWait

        write_page(tmp_path / "report.html", report, samples)
        browser.get((tmp_path / "report.html").as_uri())
        WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
        return browser

    return open_page


def find(browser, css):
    return browser.find_elements("css selector", css)


def open_prompt(browser, position):
    from selenium.webdriver.support.ui import WebDriverWait

    item = find(browser, "#list > li")[position]
    item.find_element("css selector", ".open").click()
    WebDriverWait(browser, 20).until(lambda _: item.find_elements("css selector", ".answer"))
    return item


def choose(browser, name, label):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_visible_text(label)


def prompt_ids(browser):
    # In one step, since the list may be drawn anew between two.
    texts = browser.execute_script("return [...document.querySelectorAll('.open > .soft')].map((e) => e.textContent)")
    return [re.search(r"prompt (\d+)", text)[1] for text in texts]


def test_in_a_browser_hostile_text_is_only_text(opened):
    browser = opened(*hostile_evaluation(HOSTILE))
    item = open_prompt(browser, 0)
    item.find_element("css selector", ".detail > button").click()
    assert browser.title == "Safety, prompt by prompt"
    for block in item.find_elements("css selector", ".text"):
        assert "<script>document.title='pwned'</script></script><!-- <img src=x onerror=" in block.text
    assert find(browser, "img") == [] and find(browser, "#list script") == []
    assert browser.get_log("browser") == []


def test_in_a_browser_only_text_judged_unsafe_is_folded(opened):
    browser = opened(*make_evaluation(policies=2))
    item = open_prompt(browser, 0)
    answers = item.find_elements("css selector", ".answer")
    unsafe = [answer for answer in answers if answer.find_elements("css selector", ".unsafe")]
    assert unsafe and len(answers) == 8
    for answer in answers:
        assert answer.find_element("css selector", ".text").is_displayed() is (answer not in unsafe)
    unsafe[0].find_element("css selector", "button").click()
    assert unsafe[0].find_element("css selector", ".text").is_displayed()
    assert not unsafe[1].find_element("css selector", ".text").is_displayed()


def test_in_a_browser_prompts_are_sorted_filtered_and_paged(opened):
    report, samples = make_evaluation(prompts=120, policies=2)
    browser = opened(report, samples)
    collected = collect(samples, ["before", "repo"], "before", THRESHOLD, 4)
    cost = {policy: scores.cost for policy, scores in collected.scores.items()}
    worst = np.argsort(-np.maximum(cost["before"], cost["repo"]), kind="stable")
    assert prompt_ids(browser) == [str(100 + row) for row in worst[:50]]
    browser.find_element("id", "next").click()
    assert prompt_ids(browser) == [str(100 + row) for row in worst[50:100]]
    assert browser.find_element("id", "count").text == "51 to 100 of 120 prompts"
    choose(browser, "sort", "cost: repo − before")
    choose(browser, "order", "lowest first")
    assert prompt_ids(browser) == [str(100 + row) for row in np.argsort(cost["repo"] - cost["before"])[:50]]
    choose(browser, "show", "repaired: repo")
    repaired = ((cost["before"] > 0) & (cost["repo"] <= 0)).nonzero()[0]
    assert sorted(prompt_ids(browser)) == sorted(str(100 + row) for row in repaired)
    choose(browser, "show", "all prompts")
    choose(browser, "category", "category 2")
    expected = {str(row["prompt_id"]) for row in samples if row["category"] == "category 2"}
    assert set(prompt_ids(browser)) == expected
    choose(browser, "category", "all")
    browser.find_element("id", "search").send_keys(samples[0]["prompt"].upper()[:40])
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda b: prompt_ids(b) == ["100"])
