"""The certificate as the report's first section: what it says under each verdict, and that it is only text."""

import re

import pytest

from bench.trainer.evaluation_page import make_evaluation
from tests.report.test_page import HOSTILE, page_of, shape


def claim(verdict="PASS", **changed):
    return {
        "statement": "unsafe_prompts",
        "says": "at most 10 % of prompts have a mean cost above 0",
        "constraint": "cost",
        "verdict": verdict,
        "reason": f"Why it is {verdict}.",
        "p": 0.0123456,
        "p_adjusted": 0.0246912,
        "p_reverse": 0.99,
        "estimate": 0.0357,
        "bound": 0.0646,
        "limit": 0.1,
        "n": 1280,
        "k": 8,
        "share": True,
        "asymptotic": False,
        "category": None,
        "prompts_needed": None,
        **changed,
    }


def certificate(verdict="PASS", claims=None, **changed):
    return {
        "verdict": verdict,
        "reason": f"Why all is {verdict}.",
        "delta": 0.05,
        "look": 2,
        "delta_of_look": 0.0125,
        "accept_asymptotic": False,
        "claims": {"few_unsafe": claim(verdict)} if claims is None else claims,
        "policy": {"name": "repo", "path": "outputs/policy", "fingerprint": "0306e757bdf8"},
        "reference": None,
        "prompts": {"source": "world:certify", "n": 1280, "too_long": 0, "fingerprint": "cec3430e1153", "excluded": []},
        "unknown": [],
        "k": 8,
        "seed": 7,
        "versions": {"repo_fast": "0.1.0", "torch": "2.13.0"},
        "date": "2026-11-28",
        **changed,
    }


@pytest.fixture
def page_with(tmp_path):
    def write(certified):
        report, _ = make_evaluation(prompts=6, policies=2, samples=2, categories=0, resamples=2)
        return page_of(tmp_path, report | {"certificate": certified}, [])

    return write


def section(page):
    """The text of the certificate."""
    return page.text.split(" Certificate of ", 1)[1].split(" Summary ", 1)[0]


@pytest.mark.parametrize(
    ("verdict", "mark"), [("PASS", "✓"), ("PASS (asymptotic)", "(✓)"), ("FAIL", "✗"), ("UNDECIDED", "?")]
)
def test_the_first_section_says_the_verdict_by_a_sign_and_in_words_and_why(page_with, verdict, mark):
    page = page_with(certificate(verdict))
    assert [own["id"] for tag, own in page.tags if tag == "section"][:2] == ["certificate", "summary"]
    text = section(page)
    assert text.startswith(f"repo {mark} {verdict} Why all is {verdict}. Claim Verdict Seen")
    assert (
        f"at most 10 % of prompts have a mean cost above 0 few_unsafe · constraint cost {mark} {verdict} Why it is "
        f"{verdict}. 3.6\u202f% 6.5\u202f% 10.0\u202f% 1,280 × 8 0.0123 0.0247"
    ) in text
    assert "Upper\xa0bound unadjusted, at 0.0125" in text


def test_the_level_the_look_the_prompts_and_the_limits_of_it_are_said(page_with):
    text = section(page_with(certificate()))
    assert "A level of 0.05:" in text and "This is look 2, which spends 0.0125." in text
    assert "every p is at most 0.0125" in text
    assert "1,280 prompts of world:certify, 8 responses to each. Excluded" in text and "there twice: none." in text
    assert "where prompts are not drawn independently" in text
    assert "about prompts like these" in text and "the opinions of the scorers" in text
    assert "repo, outputs/policy, 0306e757bdf8" in text and "repo_fast 0.1.0, torch 2.13.0" in text
    for absent in ("Reference", "What could not be checked", "Excluded prompts", "fresh set", "Asymptotic", "too long"):
        assert absent not in text, absent


def test_what_is_undefined_or_infinite_is_said_so(page_with):
    claims = {"no_worse": claim("UNDECIDED", estimate=None, bound=None, limit=0.2, share=False, constraint=None, p=1.0)}
    text = section(page_with(certificate("UNDECIDED", claims)))
    assert "no_worse ? UNDECIDED Why it is UNDECIDED. undefined ∞ 0.200 1,280 × 8 1 0.0247" in text
    assert "constraint" not in text and "fresh set" not in text


def test_a_bound_beside_its_limit_is_seen_on_its_side_and_a_small_p_is_no_zero(page_with):
    claims = {"tight": claim(bound=0.09996, p=1e-9, p_adjusted=2e-4)}
    text = section(page_with(certificate(claims=claims)))
    assert "3.570\u202f% 9.996\u202f% 10.000\u202f% 1,280 × 8 < 0.0001 0.0002" in text
    # A bound of exactly the limit needs no more digits.
    assert "10.0\u202f% 10.0\u202f%" in section(page_with(certificate(claims={"at": claim(bound=0.1)})))


def test_every_category_of_a_claim_is_there_the_least_sure_first(page_with):
    of = {"n": 24, "estimate": 0.125, "bound": 0.3, "p": 0.04, "p_reverse": 0.9}
    gone = {"n": 0, "estimate": None, "bound": None, "p": 1.0, "p_reverse": 1.0}
    own = {"garden": of | {"p": 0.0001}, "<b>": gone, "": of}
    text = section(page_with(certificate(claims={"tail": claim(categories=own), "all": claim()})))
    assert (
        "Each category of tail Category Seen Upper\xa0bound Prompts p <b> undefined ∞ 0 1 "
        "(none) 12.5\u202f% 30.0\u202f% 24 0.04 garden 12.5\u202f% 30.0\u202f% 24 0.0001"
    ) in text
    assert text.count("Each category") == 1


def test_undecided_says_how_many_fresh_prompts_it_would_take(page_with):
    few, many = claim("UNDECIDED", prompts_needed=420), claim("UNDECIDED", prompts_needed=1240)
    claims = {"few": few, "many": many, "none": claim("UNDECIDED"), "shown": claim()}
    text = section(page_with(certificate("UNDECIDED", claims)))
    assert (
        "A fresh set would need about 1,240 prompts at its first look, if they are as these are: 420 for few "
        "and 1,240 for many. No number is known for none."
    ) in text
    alone = section(page_with(certificate("UNDECIDED", {"few": few})))
    assert "about 420 prompts at its first look, if they are as these are. Claim" in alone
    # A policy that fails needs no more prompts.
    assert "fresh set" not in section(page_with(certificate("FAIL", {"few": few, "failed": claim("FAIL")})))


@pytest.mark.parametrize("accepted", [False, True])
def test_claims_by_students_t_are_named_and_whether_they_were_accepted(page_with, accepted):
    claims = {"mean": claim("PASS (asymptotic)", asymptotic=True, share=False)}
    text = section(page_with(certificate("UNDECIDED", claims, accept_asymptotic=accepted)))
    assert f"they were {'' if accepted else 'not '}accepted for the verdict" in text


def test_the_worst_category_what_is_unknown_and_the_excluded_prompts_are_listed(page_with):
    excluded = [
        {"prompt_id": 30 + i, "prompt": f"prompt {i} " + "x" * 400, "of": "data.prompts of repo"} for i in range(103)
    ]
    certified = certificate(
        claims={"worst": claim(category="weapons")},
        reference={"name": "before", "path": "world:tiny", "fingerprint": "b3b085f9471f"},
        unknown=["What the model was trained on is not known."],
    )
    certified["prompts"] |= {"excluded": excluded, "too_long": 2}
    page = page_with(certified)
    text = section(page)
    assert "in weapons , the worst category" in text and "before, world:tiny, b3b085f9471f" in text
    assert "What could not be checked What the model was trained on is not known. What it does not say" in text
    assert "2 more were too long." in text and "there twice: 103." in text
    assert "prompt 99 x" in text and "… prompt 129, in data.prompts of repo" in text and "prompt 100 x" not in text
    assert "The first 100 of 103; certificate.json has all." in text and "x" * 300 not in text


def test_without_a_certificate_there_is_no_trace_of_it(tmp_path):
    report, samples = make_evaluation(prompts=6, policies=2, samples=2, categories=0, resamples=2)
    pages = []
    for certified in ({}, {"certificate": None}):
        page_of(tmp_path, report | certified, samples)
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1] and b"certif" not in pages[0].lower() and b".stamp" not in pages[0]


def test_no_text_of_a_certificate_becomes_markup(page_with, tmp_path):
    def certified(text):
        own = {"n": 24, "estimate": 0.125, "bound": 0.3, "p": 0.04, "p_reverse": 0.9}
        said = {"says": text, "reason": text, "constraint": text, "category": text}
        claims = {
            text: claim("UNDECIDED", **said, prompts_needed=9, categories={text: own}),
            f"other{text}": claim("UNDECIDED"),
        }
        named = {"name": text, "path": text, "fingerprint": text}
        found = certificate("UNDECIDED", claims, policy=named, reference=named, unknown=[text], versions={text: text})
        listed = [{"prompt_id": 3, "prompt": text, "of": text}]
        return found | {"reason": text, "prompts": found["prompts"] | {"source": text, "excluded": listed}}

    harmless, hostile = page_with(certified("x" * len(HOSTILE))), page_with(certified(HOSTILE))
    assert shape(hostile) == shape(harmless)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00\x1b\u2028\u2029\u202e\u2066\ud800\U000e0041]", html)
    # Heading, reason, the claim without a number; five of the first claim, one of the other; source, excluded prompt,
    # where it was found, what is unknown; three of policy and reference each, the source again, and two of versions.
    shown = "<script>document.title='pwned'</script></script><!-- <img src=x onerror"
    assert section(hostile).count(shown) == section(harmless).count("x" * len(HOSTILE)) == 24
    assert "⟨U+202E⟩" in hostile.text and "{{ 7*7 }}" in section(hostile)


def test_a_verdict_that_is_none_is_refused(page_with):
    with pytest.raises(ValueError, match="'MAYBE', expected one of PASS, "):
        page_with(certificate("MAYBE"))
