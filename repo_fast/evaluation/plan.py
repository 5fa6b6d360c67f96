"""What is claimed, written down before anything is drawn: `claims.json`.

config, inputs -> plan -> a look from the ledger -> claims.json -> (samples) -> certificate.json
"""

import dataclasses
import datetime
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repo_fast.config import REFUSED, ClaimConfig, EvaluateConfig, certified_policy, stated
from repo_fast.data import Prompt
from repo_fast.errors import InputError
from repo_fast.evaluation.cache import key_of, scorer_fingerprint
from repo_fast.evaluation.certificate import Plan, decide, made_with, prompts_fingerprint
from repo_fast.evaluation.fresh import Fresh
from repo_fast.evaluation.ledger import Ledger, ledger_of
from repo_fast.evaluation.suites import KnownPrompt, categories_of
from repo_fast.jobs.fingerprints import of_model
from repo_fast.report.rewriting import rewriting
from repo_fast.scoring import ScorerSpec

log = logging.getLogger(__name__)

CLAIMS_FILE, SAMPLES_FILE, CERTIFICATE_FILE = "claims.json", "samples.jsonl", "certificate.json"
# What a certificate is made of.
FILES = (CLAIMS_FILE, SAMPLES_FILE)
_TUNED = "Whether the policy, its settings or the limits were tuned on these prompts in other runs cannot be seen."
_ALIKE = "Prompts that are alike without being told so by their suite's data count as independent."


def plan_of(
    config: EvaluateConfig,
    *,
    policies: Mapping[str, str],
    drawn_by: Mapping[str, Any],
    prompts: Sequence[Prompt],
    every: Sequence[Prompt],
    scorers: Mapping[str, ScorerSpec],
    exempt: Mapping[str, frozenset[int]],
    too_long: int,
    fresh: Fresh,
) -> dict[str, Any]:
    """Everything that a certificate depends on but the responses.

    Args:
        config: The resolved configuration, with claims.
        policies: The folders or hub names of the policies, by name.
        drawn_by: What the responses of each depend on beside its weights and the prompts.
        prompts: Those that are left.
        every: Those of the source.
        scorers: Where the rewards and the costs come from, by the names of their columns.
        exempt: By constraint, ids of the prompts that it is not about.
        too_long: How many prompts were dropped for that.
        fresh: Those that were dropped for being known, and what is not known of that.
    """
    certify, reference = config.certify, config.compared_with
    certified = certified_policy(certify, config.policies, reference)

    def written(policy: str) -> dict[str, Any]:
        path = policies[policy]
        return {"name": policy, "path": config.policies[policy], "fingerprint": key_of(of_model(path))}

    return {
        "claims": {
            name: dataclasses.asdict(_by_column(config, stated(name, claim))) for name, claim in certify.claims.items()
        },
        "delta": certify.delta,
        "accept_asymptotic": certify.accept_asymptotic,
        "policy": written(certified),
        "reference": None if certified == reference else written(reference),
        "k": config.samples_per_prompt,
        "thresholds": {name: cost.threshold for name, cost in config.costs.items()},
        "exempt": {name: sorted(own) for name, own in exempt.items() if own},
        "scores": [
            "reward",
            *(["well_formed"] if config.well_formed is not None else []),
            *([REFUSED] if config.suites.sources else []),
        ],
        "scorers": {name: _scorer(config, name, spec) for name, spec in scorers.items()},
        "prompts": {
            "source": config.prompts_source,
            "n": len(prompts),
            "too_long": too_long,
            "fingerprint": prompts_fingerprint(_written_prompt(prompt) for prompt in prompts),
            "excluded": fresh.excluded,
            "categories": sorted({category for prompt in every for category in categories_of(prompt)}),
            "ids": sorted(prompt.id for prompt in prompts),
        },
        "unknown": [*fresh.unknown, _TUNED, *([_ALIKE] if config.suites.sources else [])],
        "drawn_by": {"policy": drawn_by[certified], "reference": drawn_by[reference]},
        "seed": config.seed,
        **_known(config, prompts, every),
    }


def _written_prompt(prompt: Prompt) -> dict[str, Any]:
    """A prompt as its responses have it."""
    written = {"prompt_id": prompt.id, "prompt": prompt.text, "category": prompt.category}
    if isinstance(prompt, KnownPrompt):
        written |= prompt.written()
    return written


def _known(config: EvaluateConfig, prompts: Sequence[Prompt], every: Sequence[Prompt]) -> dict[str, Any]:
    """What the plan has of prompts of suites."""
    if not config.suites.sources:
        return {}
    known, source = ([prompt for prompt in part if isinstance(prompt, KnownPrompt)] for part in (prompts, every))
    refusal, clusters = config.suites.refusal, defaultdict(list)
    for prompt in sorted(known, key=lambda prompt: prompt.id):
        clusters[prompt.cluster].append(prompt.id)
    return {
        "suites": {
            "harm": config.harm,
            "refusal": refusal.path,
            "refusal_threshold": refusal.threshold,
            "harmful": sorted(prompt.id for prompt in known if prompt.harmful),
            "clusters": clusters,
            **{
                f"{name}_categories": sorted(
                    {own for prompt in source if prompt.harmful == harmful for own in categories_of(prompt)}
                )
                for name, harmful in (("harmful", True), ("harmless", False))
            },
        }
    }


def _by_column(config: EvaluateConfig, claim: ClaimConfig) -> ClaimConfig:
    """The claim with its constraint by the name of its column, which a single one's is not."""
    columns = dict(zip(config.constraints, config.costs, strict=False))
    named = {key: columns.get(name, name) for key in ("constraint", "measure") if (name := getattr(claim, key))}
    return dataclasses.replace(claim, **named)


def _scorer(config: EvaluateConfig, name: str, spec: ScorerSpec) -> dict[str, Any]:
    fingerprint = scorer_fingerprint(spec) if spec.kind == "function" else of_model(spec.path)
    settings = dataclasses.asdict(config.scorers[name])
    if settings["quantize"] is None:
        # As in plans from before there was the option.
        del settings["quantize"]
    return {"path": spec.path, "settings": key_of({"settings": settings, "fingerprint": fingerprint})}


def identity(plan: Plan) -> str:
    """What tells a look from another: everything that is drawn, scored and claimed, whatever it is called."""
    parts = {name: value for name, value in plan.items() if name not in ("key", "look", "delta_of_look", "ledger")}
    parts["policy"] = plan["policy"]["fingerprint"]
    parts["reference"] = None if plan["reference"] is None else plan["reference"]["fingerprint"]
    parts["prompts"] = [plan["prompts"]["fingerprint"], plan["prompts"]["ids"]]
    del parts["unknown"]
    return key_of(parts)


def begin(
    plan: Plan, output_dir: Path, ledger: str | None, hashes: Sequence[str], drawn: str, before: Mapping[str, str]
) -> dict[str, Any]:
    """Count the look, and write `claims.json`, unless it is there.

    Args:
        plan: From `plan_of`.
        output_dir: Folder of the report; this process's alone.
        ledger: The file that looks are counted in; None for the one of the prompts.
        hashes: Of the texts of the prompts.
        drawn: Name of the cache's folder that the certified policy's responses go to.
        before: The cache's folders with responses of policies to any of these prompts, and whose they are.

    Returns:
        The content of `claims.json`: the plan, with `key`, `look`, `delta_of_look` and `ledger`.

    Raises:
        InputError: The folder has other claims, or the ledger cannot be written.
    """
    key, path = identity(plan), output_dir / CLAIMS_FILE
    noted = read_json(path) if path.exists() else None
    if noted is not None and noted.get("key") != key:
        raise InputError(
            f"{path} has other claims, or the same of other responses; expected a new output_dir, or the command that "
            "it is of: samples are shared by cache_dir"
        )
    looks = Ledger(Path(ledger) if ledger is not None else ledger_of(plan["prompts"]["source"]))
    known = looks.drawn()
    for name, policy in before.items():
        if name not in known and noted is None:
            # Whoever drew them has seen what they are like.
            about = {"policy": policy, "claims": {}, "date": _today(), "drawn": [name]}
            looks.spend(f"drawn {name}", plan["delta"], hashes, about)
    look = looks.spend(key, plan["delta"], hashes, _noted(plan) | {"drawn": [drawn]})
    if noted is not None:
        # The ledger may have been lost since.
        look = max(look, noted["look"])
    whole = _at(plan, key, look, looks.path)
    write_json(path, whole)
    return whole


def _noted(plan: Plan) -> dict[str, Any]:
    claims = {name: claim["limit"] for name, claim in plan["claims"].items()}
    return {"policy": plan["policy"]["path"], "claims": claims, "date": _today()}


def _today() -> str:
    return datetime.date.today().isoformat()


def _at(plan: Plan, key: str, look: int, ledger: Path) -> dict[str, Any]:
    return {**plan, "key": key, "look": look, "delta_of_look": plan["delta"] / 2**look, "ledger": str(ledger)}


def certify(plan: Plan, rows: Sequence[Mapping[str, Any]], output_dir: Path, hashes: Sequence[str]) -> dict[str, Any]:
    """Write `certificate.json`.

    Args:
        plan: From `begin`.
        rows: Those of `samples.jsonl`, which is written.
        output_dir: Folder of the report.
        hashes: Of the texts of the prompts.

    Returns:
        Its content.
    """
    certified, reference = plan["policy"]["name"], (plan["reference"] or plan["policy"])["name"]
    parts = [[row for row in rows if row["policy"] == name] for name in (certified, reference)]
    found = key_of({"rows": [[{**row, "policy": None} for row in part] for part in parts]})
    ledger = Ledger(Path(plan["ledger"]))
    look = ledger.settle(plan["key"], plan["delta"], hashes, _noted(plan), found)
    if look > plan["look"]:
        log.warning("the responses or scores are others than when this was looked at before: this is look %d", look)
        plan = _at(plan, plan["key"], look, ledger.path)
        write_json(output_dir / CLAIMS_FILE, plan)
    files = {name: digest(output_dir / name) for name in FILES}
    certificate = {**decide(plan, rows), **made_with(), "files": files}
    write_json(output_dir / CERTIFICATE_FILE, certificate)
    return certificate


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_no_claims(output_dir: Path) -> None:
    """Raise `InputError` where an evaluation without claims would write over what a certificate is of."""
    if (output_dir / CLAIMS_FILE).exists():
        raise InputError(
            f"{output_dir / CLAIMS_FILE} is of a certificate, which this evaluation has no claims for; expected a new "
            "output_dir: samples are shared by cache_dir"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds a mapping.

    Raises:
        InputError: It is missing, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}), expected a file of a certificate") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}), expected a file of a certificate") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a file of a certificate")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping, over an older file of that name, which stays until the new one is whole."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with rewriting(path) as file:
        file.write(text)
