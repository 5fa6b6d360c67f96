"""Draws, scores and compares. Each arrow of

    prompts -> samples -> scores -> judgments -> measures -> report.json, samples.jsonl, report.html

is one call in `Evaluator.run`. Every rank has whole models of its own and takes a share of the responses; only one
policy, or the scorers, are in memory at a time.

What is drawn depends neither on the number of ranks nor on what was drawn before: responses come in units
(`repo_fast/rollout/units.py`), whose random states are the same for every policy.
"""

import contextlib
import datetime
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from repo_fast.collectives import Ranks
from repo_fast.config import ONLY, REFUSED, EngineConfig, EvaluateConfig, default_options, to_dict, to_yaml
from repo_fast.data import Prompt, PromptTemplate, load_tokenizer
from repo_fast.data.cells import is_blank
from repo_fast.errors import InputError, first_line
from repo_fast.evaluation.cache import describe, drawn_before, fingerprint, key_of, scorer_fingerprint
from repo_fast.evaluation.certificate import EXIT_STATUS, Plan, certificate_table
from repo_fast.evaluation.drawing import open_drawer
from repo_fast.evaluation.inputs import EvaluationInputs, PolicyInput
from repo_fast.evaluation.judge import ComparingJudge
from repo_fast.evaluation.judgments import SECONDS_BETWEEN_MESSAGES, Rows, judge_policies
from repo_fast.evaluation.plan import CLAIMS_FILE, SAMPLES_FILE, begin, certify, check_no_claims, plan_of
from repo_fast.evaluation.suites import KnownPrompt
from repo_fast.jobs.agreement import check_same_files
from repo_fast.jobs.assembly import ScorerLoader, loading_options
from repo_fast.jobs.fingerprints import Fingerprint, of_model
from repo_fast.jobs.training_prompts import prompt_hash
from repo_fast.models.model_config import load_config
from repo_fast.models.on_paper import first_attention
from repo_fast.report.comparison import Judgments, compare
from repo_fast.report.evaluations import written
from repo_fast.report.folders import hold
from repo_fast.report.jsonl import write_rows
from repo_fast.report.measures import Evaluation, Thresholds, above
from repo_fast.report.model_card import model_card, read_training, write_model_card
from repo_fast.report.page import write_page
from repo_fast.report.page_links import PAGE, pages_of_runs, relative_links
from repo_fast.report.rewriting import rewriting
from repo_fast.report.run_page import RunPage
from repo_fast.report.tables import comparison_table
from repo_fast.report.unit_file import UnitFile
from repo_fast.rollout import Request, Rollout
from repo_fast.rollout.units import Unit, drawn_in_turn, grouped, units_of
from repo_fast.rollout.vllm import version
from repo_fast.scoring import FunctionScorer, Guard, Scorer, ScorerSpec, finite_scores, function_texts

log = logging.getLogger(__name__)

# Responses scored at once, over all ranks; at least, for units are not cut.
_SCORED_AT_ONCE = 1024


@dataclass(frozen=True)
class Samples:
    """The responses of a policy.

    Attributes:
        folder: Where the cache keeps them.
        units: How many responses each unit has.
        rows: In order of their units: `prompt_id`, `sample` (from 0), `response`, `tokens` (ids), `finished`; with a
            key for each score once they are scored.
    """

    folder: Path
    units: list[int]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class _Column:
    """A score of every response.

    Attributes:
        name: Its key.
        about: Everything that it depends on.
        load: Loads what gives it, and returns what makes the scorer of a policy from the policy's template.
        exempt: Ids of prompts whose responses are not scored, and have -inf.
    """

    name: str
    about: dict[str, Any]
    load: Callable[[], Callable[[PromptTemplate], Scorer]]
    exempt: frozenset[int] = frozenset()


def _identity(prompt: Prompt) -> list:
    """What tells a prompt from others: a dialogue may read as a text that another row has as one turn."""
    asked = prompt.dialogue
    return [prompt.id, prompt.text, *([] if asked is None else [asked.turns, asked.system])]


class Evaluator:
    """One evaluation, from loaded inputs to the report.

    Args:
        config: The resolved configuration.
        inputs: What `read_inputs` made of it.
        ranks: This process among all.
    """

    def __init__(self, config: EvaluateConfig, inputs: EvaluationInputs, ranks: Ranks) -> None:
        self.config, self.inputs, self.ranks = config, inputs, ranks
        self.output_dir = Path(config.output_dir)
        self.cache_dir = self.output_dir / "cache" if config.cache_dir is None else Path(config.cache_dir)
        self._engine = EngineConfig(dtype=config.dtype, zero_stage=1)
        self._loading = loading_options(config.attention, self._engine, ranks)
        folder = self.cache_dir / "judges"
        self._loader = ScorerLoader(self._engine, ranks, config.attention, config.scoring_tokens, folder)
        # On the first rank, with claims.
        self._plan: Plan | None = None

    def _computing(self, path: str, kind: Any = AutoModel) -> dict[str, str]:
        """What any number that a model gives depends on."""
        attention, _ = first_attention(kind, path, load_config(path), self._loading["attention"])
        return {"device": self.ranks.device.type, "dtype": str(self._loading["dtype"]), "attention": attention}

    def run(self) -> int:
        """Draw and score what is not in the cache yet, and write the report.

        Returns:
            The exit status: that of the certificate, on the first rank; 0 without one.
        """
        status = 0
        if self.inputs.too_long:
            of_suites = self.inputs.of_suites.items()
            log.info(
                "%d prompts dropped, longer than %d tokens for a policy%s",
                len(self.inputs.too_long),
                self.config.max_prompt_tokens,
                "".join(f"; of {name} {own['too_long']}" for name, own in of_suites if own["too_long"]),
            )
        if self.inputs.fresh.excluded:
            log.info("%d prompts left out, which are not fresh for the policy", len(self.inputs.fresh.excluded))
        check_same_files(self._read_here(), self.ranks)
        with contextlib.ExitStack() as held:
            judge = None
            with self.ranks.together("the start"):
                if self.ranks.is_first:
                    held.enter_context(hold(self.output_dir, "output_dir"))
                    held.enter_context(hold(self.cache_dir, "cache_dir"))
                    self._plan = self._begin_claims()
                    (self.output_dir / self.config.FILE).write_text(to_yaml(self.config), encoding="utf-8")
                    judge = self._start_judge()
            samples = {name: self._draw(name, policy) for name, policy in self.inputs.policies.items()}
            for column in self._columns():
                for name, drawn in samples.items():
                    self._score(column, name, drawn)
            # The others are done: a judge may take longer than they would wait.
            if self.ranks.is_first:
                status = self._report(samples, judge)
        return status

    def _begin_claims(self) -> Plan | None:
        """Write down what is claimed, before anything is drawn. For the first rank to call."""
        if not self.config.certify.claims:
            check_no_claims(self.output_dir)
            return None
        inputs = self.inputs
        plan = plan_of(
            self.config,
            policies={name: policy.path for name, policy in inputs.policies.items()},
            drawn_by={name: self._drawn_by(policy) for name, policy in inputs.policies.items()},
            prompts=inputs.prompts,
            every=inputs.every,
            scorers=inputs.scorers,
            exempt=inputs.exempt,
            too_long=len(inputs.too_long),
            fresh=inputs.fresh,
        )
        certified = inputs.policies[plan["policy"]["name"]]
        plan = begin(
            plan,
            self.output_dir,
            self.config.certify.ledger,
            self._hashes,
            key_of(self._about(certified)),
            # What was drawn of the reference says nothing of the policy.
            drawn_before(self.cache_dir, self._hashes, None if plan["reference"] is None else inputs.reference_path),
        )
        log.info(
            "%d claims on %d prompts, look %d: level %g (%s)",
            len(plan["claims"]),
            plan["prompts"]["n"],
            plan["look"],
            plan["delta_of_look"],
            self.output_dir / CLAIMS_FILE,
        )
        return plan

    def _read_here(self) -> dict[str, Fingerprint]:
        """Of what this rank has read, or will, by what names it: prompts, policies and scorers."""
        texts = key_of({"texts": [_identity(prompt) for prompt in self.inputs.prompts]})
        paths = {f"policies.{name}": policy.path for name, policy in self.inputs.policies.items()}
        scorers = [*self.inputs.scorers.items()]
        scorers += [] if self.inputs.well_formed is None else [("well_formed", self.inputs.well_formed)]
        paths |= {f"the scorer {name}": spec.path for name, spec in scorers if spec.kind in ("model", "guard")}
        functions = {
            f"the scorer {name}": function_texts(spec.path) for name, spec in scorers if spec.kind == "function"
        }
        models = {key: of_model(path, whole=False) for key, path in paths.items()}
        return {"the evaluation": {"prompts": texts}, **models, **functions}

    def _start_judge(self) -> ComparingJudge | None:
        """The judge, asked once: what is wrong with it would otherwise show hours later."""
        if self.config.judge.url is None:
            return None
        judge = ComparingJudge(self.config.judge, self.cache_dir / "judge.jsonl")
        judge.probe()
        return judge

    # ---------------------------------------------------------------------------------------------------- samples

    def _draw(self, name: str, policy: PolicyInput) -> Samples:
        """A policy's responses; drawn where they are not in the cache."""
        about = self._about(policy)
        # Of a rank that has copies of the same files they may have other dates.
        folder = self.cache_dir / self.ranks.gather_list([key_of(about)])[0]
        with self.ranks.together("making the cache"):
            if self.ranks.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                describe(folder, about, self._hashes)
        # The reference has a second sample.
        count = self.config.samples_per_prompt * (2 if name == self.inputs.reference else 1)
        units = units_of(policy.requests, count, self.config.sampling.batch_size, self.config.seed)
        file = UnitFile(folder / "samples.jsonl", [len(unit.requests) for unit in units])
        done = self._complete(file)
        log.info("policy %s: %d responses, %d of them in the cache", name, sum(file.sizes), sum(file.sizes[:done]))
        if done < len(units):
            self._draw_units(policy, units, done, file)
            self._complete(file)
        return Samples(folder, list(file.sizes), file.read())

    def _complete(self, file: UnitFile) -> int:
        """How many units of a file of the cache are there. All ranks must call it.

        Raises:
            InputError: They do not see one cache.
        """
        found = self.ranks.gather_list([file.complete()])
        for rank, count in enumerate(found):
            if count != found[0]:
                raise InputError(
                    f"ranks 0 and {rank} do not find the same in {file.path}: {found[0]} and {count} of "
                    f"{len(file.sizes)} parts, expected one cache_dir that all hosts see"
                )
        return found[0]

    def _about(self, policy: PolicyInput) -> dict[str, Any]:
        """Everything that responses depend on, but how many there are."""
        return {
            "policy": fingerprint(policy.path),
            "prompts": key_of({"texts": [_identity(prompt) for prompt in self.inputs.prompts]}),
            **self._drawn_by(policy),
        }

    @property
    def _hashes(self) -> list[str]:
        return [prompt_hash(prompt.asked) for prompt in self.inputs.prompts]

    def _drawn_by(self, policy: PolicyInput) -> dict[str, Any]:
        """What responses depend on beside the policy's weights, the prompts, and how many there are."""
        sampling = to_dict(self.config)["sampling"]
        engine, vllm = sampling.pop("engine"), sampling.pop("vllm")
        return {
            "template": self.config.template,
            "sampling": sampling,
            **({"engine": f"vllm {version()}", "ranks": vllm["tensor_parallel"]} if engine == "vllm" else {}),
            "seed": self.config.seed,
            "random numbers": "a seed a response",
            **self._dated(policy.template),
            **self._computing(policy.path),
        }

    def _draw_units(self, policy: PolicyInput, units: list[Unit], done: int, file: UnitFile) -> None:
        with contextlib.ExitStack() as held:
            drawer = held.enter_context(contextlib.closing(open_drawer(self.config, policy, self.ranks, self._loading)))
            append = held.enter_context(file.appending(self.ranks.is_first))

            def draw(group: list[Unit] | None) -> list[list[dict[str, Any]]]:
                """The rows of each unit."""
                own = group or []
                return [_rows(rollout, unit.sample) for unit, rollout in zip(own, drawer.draw(own), strict=True)]

            started, tokens, said, reached = time.perf_counter(), 0, 0.0, done
            for drawn in drawn_in_turn(drawer.grouped(units[done:]), self.ranks, draw):
                with self.ranks.together("writing what was drawn"):
                    for rows in itertools.chain.from_iterable(drawn):
                        append(rows)
                        tokens += sum(len(row["tokens"]) for row in rows)
                        reached += 1
                seconds = time.perf_counter() - started
                if seconds - said > SECONDS_BETWEEN_MESSAGES or reached == len(units):
                    said = seconds
                    log.info("  %d of %d batches, %.0f s, %.0f tokens/s", reached, len(units), said, tokens / seconds)
        self.ranks.barrier()

    # ----------------------------------------------------------------------------------------------------- scores

    def _columns(self) -> list[_Column]:
        columns = [
            self._score_column(name, spec)
            for name, spec in self.inputs.scorers.items()
            if len(self.inputs.not_scored(name)) < len(self.inputs.prompts)
        ]
        if (check := self.inputs.well_formed) is not None:
            function = FunctionScorer(check.path, "well-formed check")
            about = {"scorer": scorer_fingerprint(check)}
            columns.append(_Column("well_formed", about, lambda: lambda _: function))
        return columns

    def _score_column(self, name: str, spec: ScorerSpec) -> _Column:
        settings, exempt = self.config.scorers[name], self.inputs.not_scored(name)
        about: dict[str, Any] = {} if spec.kind == "judge" else {"scorer": scorer_fingerprint(spec)}
        if exempt:
            about["exempt"] = sorted(exempt)
        if settings.quantize is not None:
            about["quantize"] = settings.quantize
        if spec.kind == "model":
            about |= {"template": settings.template, "max_tokens": settings.max_tokens, **self._computing(spec.path)}
            if settings.head is not None:
                about["head"] = settings.head
            template = PromptTemplate(load_tokenizer(spec.path, must_end=False), settings.template, self.config.date)
            if template.name == "chat":
                about |= {"reads": "finished dialogues", **self._dated(template)}
        if spec.kind == "guard":
            guard = Guard(load_tokenizer(spec.path, must_end=False), settings.guard, name, self.config.date)
            about |= {"guard": guard.description, "max_tokens": settings.max_tokens, **self._dated(guard)}
            about |= self._computing(spec.path, AutoModelForCausalLM)
        if spec.kind == "judge":
            asked = ("rubric", "max_tokens", "max_tokens_name", "temperature")
            about |= {"judge": spec.path} | {key: getattr(settings.judge, key) for key in asked}
        return _Column(name, about, cache(lambda: self._loader.load(name, spec, settings)), exempt)

    def _dated(self, template: PromptTemplate | Guard) -> dict[str, Any]:
        """What of the date a rendering depends on: mostly nothing."""
        return {"date": self.config.date} if template.depends_on_date else {}

    def _score(self, column: _Column, name: str, samples: Samples) -> None:
        """Add a score to every row of a policy; computed where it is not in the cache."""
        key = self.ranks.gather_list([key_of(column.about)])[0]
        file = UnitFile(samples.folder / f"{column.name}-{key}.jsonl", samples.units)
        done = self._complete(file)
        if done < len(samples.units):
            policy = self.inputs.policies[name]
            with self.ranks.together(f"loading the {column.name}"):
                scorer = column.load()(policy.template)
            before = scorer.truncated
            requests = {request.prompt.id: request for request in policy.requests}
            rows = iter(samples.rows[sum(samples.units[:done]) :])
            with file.appending(self.ranks.is_first) as append:
                for sizes in grouped(samples.units[done:], int, _SCORED_AT_ONCE):
                    responses = list(itertools.islice(rows, sum(sizes)))
                    with self.ranks.together(f"the {column.name}"):
                        mine = _rollout(self.ranks.share(responses), requests)
                        scores = finite_scores(scorer, mine, column.exempt)
                    units = self.ranks.gather(scores).split(sizes)
                    with self.ranks.together("writing scores"):
                        for unit in units:
                            append([{"score": score} for score in unit.tolist()])
            if cut := int(self.ranks.sum(torch.tensor([scorer.truncated - before]))):
                log.info("policy %s: %d texts were cut to fit the %s model", name, cut, column.name)
            self.ranks.barrier()
        for row, scored in zip(samples.rows, file.read(), strict=True):
            row[column.name] = scored["score"]

    # ----------------------------------------------------------------------------------------------------- report

    def _report(self, samples: dict[str, Samples], judge: ComparingJudge | None) -> int:
        """Write everything; returns the exit status. For the first rank to call."""
        reference, count = self.inputs.reference, self.config.samples_per_prompt
        rows = {name: [row for row in drawn.rows if row["sample"] < count] for name, drawn in samples.items()}
        second = [row for row in samples[reference].rows if row["sample"] >= count]
        texts = {prompt.id: prompt for prompt in self.inputs.prompts}
        published = [self._published(name, row, texts) for name, drawn in samples.items() for row in drawn.rows]
        write_rows(self.output_dir / SAMPLES_FILE, published)
        certificate = None if self._plan is None else certify(self._plan, published, self.output_dir, self._hashes)
        page = self.output_dir / PAGE
        card = None if certificate is None else self._write_card(certificate, page)
        linked = [*([card] if card else []), *pages_of_runs(self.config.policies.values())]
        links = relative_links(linked, self.output_dir)

        def write(judgments: dict[str, Judgments], judged: dict[str, Any] | None) -> None:
            report = self._compared(rows, second, judgments, judged)
            if certificate is not None:
                report["certificate"] = certificate
            _write_text(self.output_dir / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            write_page(page, report, published, links)
            log.info("%s", comparison_table(report))
            log.info("report: %s   %s", page, self.output_dir / "report.json")

        write({}, None)
        if judge is not None:
            # Written before too: a judge that fails takes nothing else with it.
            write(*judge_policies(judge, rows, reference, texts))
        if certificate is None:
            return 0
        _renew_page(certificate["policy"]["path"])
        log.info("model card: %s", card)
        log.info("%s", certificate_table(certificate))
        return EXIT_STATUS[certificate["verdict"]]

    def _write_card(self, certificate: dict[str, Any], page: Path) -> Path:
        """The model card, into the certified policy's folder; beside the report where that is not ours to write to."""
        path, training = certificate["policy"]["path"], None
        try:
            training = read_training(path)
        except InputError as error:
            log.warning("%s", error)
        folder, linked = Path(path).expanduser(), [page, *pages_of_runs([path])]
        if folder.is_dir():
            try:
                return write_model_card(folder, model_card(certificate, training, relative_links(linked, folder)))
            except InputError as error:
                log.warning("%s", error)
        card = self.output_dir / "model_card.md"
        _write_text(card, model_card(certificate, training, relative_links(linked, self.output_dir)))
        return card

    def _compared(
        self, rows: Rows, second: list[dict[str, Any]], judgments: dict[str, Judgments], judged: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The content of `report.json`."""
        reference = self.inputs.reference
        paths = {name: cost.path for name, cost in self.config.costs.items()}
        heads = {name: scorer.head for name, scorer in self.config.scorers.items() if scorer.head is not None}
        report = {
            "settings": {
                "reference": reference,
                "prompts": len(self.inputs.prompts),
                "prompts_dropped": len(self.inputs.too_long),
                "prompts_source": self.config.prompts_source,
                "samples_per_prompt": self.config.samples_per_prompt,
                "threshold": self._threshold,
                **{key: value for key, value in to_dict(self.config)["sampling"].items() if key != "vllm"},
                "seed": self.config.seed,
                "resamples": self.config.resamples,
                "reward": self.config.reward.path,
                **({"costs": paths} if self._by_name else {"cost": paths[ONLY]}),
                **({"heads": heads} if heads else {}),
                **self._of_suites(),
                "policies": dict(self.config.policies),
                "date": datetime.date.today().isoformat(),
            },
            **compare(
                {name: self._evaluation(own) for name, own in rows.items()},
                self._evaluation(second),
                reference,
                threshold=self._threshold,
                categories=self.inputs.categories,
                judgments=judgments,
                known=self.inputs.known,
                resamples=self.config.resamples,
                seed=self.config.seed,
            ),
        }
        if judged is not None:
            report["judge"] = judged
        return report

    def _of_suites(self) -> dict[str, Any]:
        """What suites were read from, what of them was left out, and by whom answers are judged, for the report."""
        if not self.config.suites.sources:
            return {}
        harm, refusal = self.config.costs[self.config.harm], self.config.suites.refusal
        return {
            "suites": self.inputs.of_suites,
            "attack_success_by": f"{self.config.harm} ({harm.path}) above {harm.threshold:g}",
            "over_refusal_by": f"{REFUSED} ({refusal.path}) above {refusal.threshold:g}",
        }

    @property
    def _threshold(self) -> Thresholds:
        thresholds = {name: cost.threshold for name, cost in self.config.costs.items()}
        return thresholds if self._by_name else thresholds[ONLY]

    @property
    def _by_name(self) -> bool:
        """Whether costs are told by their names: several, or one that is not about all prompts."""
        return ONLY not in self.config.costs or any(self.inputs.exempt.values())

    def _evaluation(self, rows: Sequence[Mapping[str, Any]]) -> Evaluation:
        # As they were scored: as a float64, a cost of 0.1 in float32 would be above a threshold of 0.1.
        costs = {name: np.array([row[name] for row in rows], dtype=np.float32) for name in self.config.costs}
        return Evaluation(
            prompt_ids=[row["prompt_id"] for row in rows],
            rewards=[row["reward"] for row in rows],
            costs=costs if self._by_name else costs[ONLY],
            response_lengths=[len(row["tokens"]) for row in rows],
            well_formed=[row["well_formed"] for row in rows] if rows and "well_formed" in rows[0] else None,
            failed=self._failed(rows) if self.config.suites.sources else None,
            blank=[is_blank(row["response"]) for row in rows] if self.config.suites.sources else None,
        )

    def _failed(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Of each response to a known prompt whether it is harmful, or refuses."""
        known, harm = self.inputs.known, self.config.harm
        assert known is not None
        harmful = np.array([known.harmful[row["prompt_id"]] for row in rows], dtype=bool)
        harms, refusals = (
            np.array([row.get(name, math.nan) for row in rows], dtype=np.float32) for name in (harm, REFUSED)
        )
        return np.where(
            harmful,
            above(harms, self.config.costs[harm].threshold),
            above(refusals, self.config.suites.refusal.threshold),
        )

    def _published(self, name: str, row: Mapping[str, Any], texts: Mapping[int, Prompt]) -> dict[str, Any]:
        """A row of `samples.jsonl`."""
        prompt = texts[row["prompt_id"]]
        head = {"policy": name, "prompt_id": prompt.id, "category": prompt.category, "prompt": prompt.text}
        if isinstance(prompt, KnownPrompt):
            head |= prompt.written()
        scores = {key: written(row[key]) for key in (*self.config.scorers, "well_formed") if key in row}
        drawn = {key: row[key] for key in ("sample", "response", "finished")}
        return head | drawn | scores | {"response_length": len(row["tokens"])}


def _rows(rollout: Rollout, sample: int) -> list[dict[str, Any]]:
    return [
        {"prompt_id": prompt_id, "sample": sample, "response": response, "tokens": tokens.tolist(), "finished": ended}
        for prompt_id, response, tokens, ended in zip(
            rollout.prompt_ids.tolist(),
            rollout.responses,
            rollout.response_tokens,
            rollout.finished.tolist(),
            strict=True,
        )
    ]


def _rollout(rows: Sequence[dict[str, Any]], requests: dict[int, Request]) -> Rollout:
    """Responses that were read back, as a scorer takes them."""
    asked = [requests[row["prompt_id"]] for row in rows]
    return Rollout(
        prompt_ids=torch.tensor([row["prompt_id"] for row in rows], dtype=torch.int64),
        prompts=[request.prompt.text for request in asked],
        dialogues=[request.prompt.asked for request in asked],
        responses=[row["response"] for row in rows],
        prompt_tokens=[request.tokens for request in asked],
        response_tokens=[torch.tensor(row["tokens"], dtype=torch.int64) for row in rows],
        finished=torch.tensor([row["finished"] for row in rows], dtype=torch.bool),
    )


def _renew_page(policy: str) -> None:
    """Write the page of the run that made a certified policy anew: it links to the policy's card, which may be new."""
    for page in pages_of_runs([policy]):
        try:
            RunPage(page.parent, default_options).write()
        except Exception as error:  # the page may hold anything that is in the run's folder, and no verdict hangs on it
            log.warning("%s is not written anew: %s: %s", page, type(error).__name__, first_line(error))


def _write_text(path: Path, text: str) -> None:
    with rewriting(path) as file:
        file.write(text)
