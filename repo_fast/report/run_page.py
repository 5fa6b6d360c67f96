"""The page of a run, `report.html` beside its `metrics.jsonl`: what it learned, at what cost, and how fast.

It is made of the files in the run's folder alone, so it can be made anew at any time, also of a run of before, whose
files have fewer columns: what is not there is left out, what cannot be read is said. A file that is a link is none of
the run's. What is said depends on the files' content alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from markupsafe import Markup

from repo_fast.errors import first_line
from repo_fast.report.best import FOLDER as BEST_FOLDER
from repo_fast.report.best import read_best
from repo_fast.report.evaluations import read_evaluation
from repo_fast.report.jsonl import read_records
from repo_fast.report.measures import Thresholds, interval_of, prompts_about
from repo_fast.report.page_links import PAGE, link
from repo_fast.report.page_parts.document import render
from repo_fast.report.page_parts.measures_table import measures_table
from repo_fast.report.page_parts.run_charts import curve, how_drawn, spelled
from repo_fast.report.page_parts.worst_prompts import worst_prompts
from repo_fast.report.panels import (
    EVALUATED,
    FINE_TUNING,
    OF_CONSTRAINTS,
    PICTURES,
    SCORES,
    SPEED,
    Panel,
    column,
    panels_of,
)
from repo_fast.report.plain_yaml import load_yaml
from repo_fast.report.rewriting import rewriting
from repo_fast.report.series import Columns
from repo_fast.report.tables import before_after_measures, unsafe

# From the options of a job to the defaults of that kind of job.
Defaults = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# By column a value to compare with, and what it is.
Levels = dict[str, tuple[float, str]]
# What the page shows is read from these.
_READ = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "warnings.jsonl")
_HELD_OUT = ("eval_before.jsonl", "eval_before_again.jsonl", "eval_after.jsonl")
# What it links to, where it is there.
_PAGES = (f"*/{PAGE}", "policy/README.md", "best_policy/README.md")
_LINKED = {
    "Logs": (*_READ[1:], "samples.jsonl", "config.yaml", "training_prompts.json"),
    "Held-out responses": (*_HELD_OUT, "before_after.txt", "eval_scores.jsonl", "evaluations/*.jsonl"),
    "Plots": ("plots/*.png", "plots/*/*.png"),
}
# Steps that the figures at the top are means of.
_FEW = 5
# What a file that is not as a run leaves it raises.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Found = TypeVar("Found")


class RunPage:
    """The page of a run.

    Args:
        folder: The run's output folder.
        defaults: Of the options of its job.
    """

    def __init__(self, folder: Path, defaults: Defaults) -> None:
        self._folder, self._defaults = folder, defaults
        # A long run writes its page often: its log is not read from the beginning each time.
        self._metrics = Columns(folder / "metrics.jsonl")
        self._problems: list[str] = []

    def write(self) -> None:
        """Write it, over an older one, which stays until the new one is whole. Raises `OSError`."""
        with rewriting(self._folder / PAGE) as file:
            file.writelines(self.parts())

    def is_run(self) -> bool:
        """Whether a run has written something into the folder."""
        return any(_is_own(self._folder, name) for name in _READ[:2])

    def version(self) -> str:
        """What tells the files that it shows from those of before: another, where one was written."""
        found = []
        for name in dict.fromkeys([*self._matching((*_READ, *_HELD_OUT)), *self.links()]):
            known = (self._folder / name).stat()
            found.append((name, known.st_ino, known.st_mtime_ns, known.st_size))
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def links(self) -> list[str]:
        """What it links to: paths of files in the folder."""
        return [path for patterns in (_PAGES, *_LINKED.values()) for path in self._matching(patterns)]

    def parts(self, version: str | None = None) -> Iterator[str]:
        """The parts of its text.

        Args:
            version: Of a page that is watched: it asks whether there is another one.
        """
        self._problems = []
        text, options = self._options()
        metrics = self._log("metrics.jsonl", self._metrics)
        steps = metrics["step"]
        thresholds = self._read("config.yaml", lambda: _thresholds(options)) or {}
        names = _constraints(metrics)
        evaluations = self._log("evaluations.jsonl", Columns(self._folder / "evaluations.jsonl"))
        best = self._read("the best evaluation", lambda: read_best(self._folder / BEST_FOLDER))
        context = {
            "version": version,
            "name": self._folder.resolve().name,
            "facts": list(self._facts(options, metrics)),
            "pages": [link(path) for path in self._matching(_PAGES)],
            "steps": len(steps),
            "figures": list(_figures(metrics, names)),
            "figures_note": _figures_note(metrics),
            "warnings": self._read("warnings.jsonl", self._warnings) or [],
            "curves": list(_curves(options, metrics, names, thresholds)),
            "how_drawn": how_drawn(len(steps)) if len(steps) else "",
            "evaluated": list(_charts(evaluations, panels_of(EVALUATED, _constraints(evaluations)), {})),
            "best": best,
            "best_value": spelled(best.value) if best else "",
            "speed": list(_charts(metrics, SPEED, {})),
            **_phases(metrics),
            "table": None,
            "prompts": None,
            "cost_word": "excess" if len(thresholds) > 1 else "cost",
            "changed": self._read("config.yaml", lambda: _changed(options, self._defaults(options))) or [],
            "options": text,
            "files": [
                (heading, [link(path) for path in found])
                for heading, patterns in _LINKED.items()
                if (found := self._matching(patterns))
            ],
        }
        after = self._read("eval_after.jsonl", lambda: self._after(steps)) if thresholds else None
        if after:
            context["table"] = self._read("the table of before and after", lambda: self._table(after, thresholds))
            context["prompts"] = self._read("the list of prompts", lambda: self._prompts(after, thresholds))
        context["problems"] = self._problems
        scripts = ["print.js"] if version is None else ["watch.js", "print.js"]
        return render("run.html", context, ["style.css", "run.css"], scripts, asks=version is not None)

    # ------------------------------------------------------------------------------------------------------- files

    def _file(self, name: str) -> Path | None:
        """A file of the run, where it is there."""
        return self._folder / name if _is_own(self._folder, name) else None

    def _matching(self, patterns: Sequence[str]) -> list[str]:
        """The paths of the run's files that match, in the order of the patterns."""
        paths = (path for pattern in patterns for path in sorted(self._folder.glob(pattern)))
        names = (path.relative_to(self._folder).as_posix() for path in paths)
        return [name for name in names if _is_own(self._folder, name)]

    def _read(self, what: str, read: Callable[[], Found]) -> Found | None:
        """What is read of a file; None, and a word about it, where it is not as a run leaves it."""
        try:
            return read()
        except _UNREADABLE as error:
            self._problems.append(f"{what} cannot be shown: {first_line(error)}")
            return None

    def _log(self, name: str, columns: Columns) -> Columns:
        self._read(name, columns.refresh)
        return columns

    def _options(self) -> tuple[str, Mapping[str, Any]]:
        """The configuration, as it is written and as options."""
        path = self._file("config.yaml")
        if path is None:
            return "", {}
        text = path.read_text(encoding="utf-8", errors="replace")

        def read() -> Mapping[str, Any]:
            options = load_yaml(text)
            if not isinstance(options, Mapping):
                raise ValueError("it is no mapping of options")
            return options

        return text, self._read("config.yaml", read) or {}

    def _warnings(self) -> list[tuple[Any, Any, Any]]:
        path = self._file("warnings.jsonl")
        return [] if path is None else [(row["step"], row["rule"], row["text"]) for row in read_records(path)]

    # ---------------------------------------------------------------------------------------------- what is said

    def _facts(self, options: Mapping[str, Any], metrics: Columns) -> Iterator[str]:
        step = int(metrics["step"][-1]) if len(metrics["step"]) else 0
        total = options.get("total_steps")
        yield f"step {step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
        if "epochs" in options and np.isfinite(metrics["epoch"]).any():
            yield f"epoch {metrics['epoch'][-1]:.3g} of {options['epochs']}"
        algorithm = options.get("algorithm")
        if isinstance(algorithm, Mapping):
            yield f"{algorithm.get('name')}, {algorithm.get('advantage')} advantages"
        elif options:
            yield f"{options['kind']} model" if "kind" in options else "supervised fine-tuning"
        started = options.get("policy", options.get("model"))
        if isinstance(started, Mapping):
            yield f"from {started.get('path')}"
        yield from (f"{key} {options[key]}" for key in ("seed", "date") if options.get(key) is not None)

    def _after(self, steps: np.ndarray) -> list[dict[str, Any]]:
        """The responses after training; none, where they are of another end of a run that is not there yet again."""
        path = self._file("eval_after.jsonl")
        rows: list[dict[str, Any]] = [] if path is None else list(read_records(path))
        return [] if rows and not (len(steps) and rows[0]["step"] <= steps[-1]) else rows

    def _table(self, rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float]) -> dict[str, Any] | None:
        """The numbers of `before_after.txt`, as the tables of an evaluation are."""
        files = [self._file(name) for name in _HELD_OUT]
        by_name, threshold = _several(rows, thresholds)
        before, again, after = (None if path is None else read_evaluation(path, by_name)[0] for path in files)
        if before is None or after is None:
            return None
        measured = before_after_measures(before, after, threshold, again)
        prompts, about = len(np.unique(np.asarray(before.prompt_ids))), prompts_about(before)

        def numbers(side: str) -> dict[str, dict[str, float]]:
            found = {}
            for name, own in measured.items():
                if side in own:
                    low, high = interval_of(name, own[side], prompts, about)
                    found[name] = {"value": own[side].value, "low": low, "high": high}
            return found

        sides = ["before", "after"]
        values = {side: numbers(side) for side in sides}
        floor = "; the interference before is that of a second sample of the same policy" if again else ""
        return {
            "sides": sides,
            "groups": measures_table(values, {"after": numbers("difference")}, sides, by_name),
            "note": f"{prompts:,} prompts; {unsafe(threshold)}. Brackets are 95 % intervals over prompts, changes are "
            f"paired by prompt{floor}.",
        }

    def _prompts(self, rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float]) -> dict[str, Any]:
        before = self._file("eval_before.jsonl")
        first = () if before is None else read_records(before)
        return worst_prompts(first, rows, _several(rows, thresholds)[1])


def _is_own(folder: Path, name: str) -> bool:
    """Whether a path below a folder is a file, and nothing on the way to it a link."""
    path = folder / name
    below = [path, *path.parents][: len(Path(name).parts)]
    return path.is_file() and not any(part.is_symlink() for part in below)


def _constraints(columns: Columns) -> list[str]:
    """The names of the constraints that a log has columns of; '' is the only one."""
    found = [name.removesuffix("strict_violation") for name in columns.names() if name.endswith("strict_violation")]
    return [""] if "" in found else [name.removesuffix("_") for name in found]


def _thresholds(options: Mapping[str, Any]) -> dict[str, float]:
    """Of each constraint, by name; none where the configuration has none."""
    algorithm, several = options.get("algorithm"), options.get("constraints")
    if isinstance(several, Mapping) and several:
        return {str(name): float(own.get("threshold", 0.0)) for name, own in several.items()}
    return {"cost": float(algorithm.get("threshold", 0.0))} if isinstance(algorithm, Mapping) else {}


def _several(rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float]) -> tuple[list[str], Thresholds]:
    """The constraints that held-out responses have by name, and the threshold, or theirs.

    A single one is by name too where it is not about all prompts.
    """
    if "cost" in rows[0]:
        own = next(iter(thresholds.values()))
        return (["cost"], {"cost": own}) if any(row["cost"] is None for row in rows) else ([], own)
    return list(thresholds), dict(thresholds)


def _charts(
    columns: Columns, panels: Iterator[Panel] | Sequence[Panel], levels: Levels
) -> Iterator[tuple[str, Markup]]:
    """A chart of each panel that has a finite value, under its name."""
    steps = columns["step"]
    for key, label in panels:
        values, (name, _, rest) = columns[key], label.rpartition(" (")
        unit, _, more = rest.partition(")")
        if np.isfinite(values).any():
            errors = columns[f"{key}_error"]
            # What begins with the name of a constraint is written as that is.
            caption = (name if ": " in name else name[:1].upper() + name[1:]) + more
            yield caption, curve(steps, values, name, unit, levels.get(key), errors)


def _curves(
    options: Mapping[str, Any], metrics: Columns, names: Sequence[str], thresholds: Mapping[str, float]
) -> Iterator[tuple[str, list[tuple[str, Markup]]]]:
    """The charts of the steps, by heading."""
    if "algorithm" not in options and "reward" not in metrics.names():
        groups = SCORES if "kind" in options else FINE_TUNING
        yield from _headed("Curves", metrics, [panel for own in groups.values() for panel in own if own is not SPEED])
        return
    panels = [panel for own in PICTURES.values() for panel in own if panel[0] not in OF_CONSTRAINTS]
    levels = _levels(thresholds) | _reached(options, metrics, names)
    if len(names) < 2:
        own = [(column(name, key), label) for name in names for key, label in OF_CONSTRAINTS.items()]
        yield from _headed("Reward and constraint", metrics, [panels[0], *own], levels)
    else:
        yield from _headed("Reward", metrics, [panels[0], ("safety_rate", f"{OF_CONSTRAINTS['safety_rate']} of all")])
        for name in names:
            own = [(column(name, key), label) for key, label in OF_CONSTRAINTS.items()]
            yield from _headed(f"Constraint {name}", metrics, own, levels)
    more = [("finished_share", "responses that end (share)"), ("gradient_norm", "gradient norm (no unit)")]
    yield from _headed("Policy", metrics, [*panels[1:], *more])


def _headed(
    heading: str, metrics: Columns, panels: Sequence[Panel], levels: Levels | None = None
) -> Iterator[tuple[str, list[tuple[str, Markup]]]]:
    if charts := list(_charts(metrics, panels, levels or {})):
        yield heading, charts


def _levels(thresholds: Mapping[str, float]) -> Levels:
    """What the costs are compared with."""
    return {
        "cost" if len(thresholds) == 1 else column(name, "cost"): (value, f"dashed: threshold {spelled(value)}")
        for name, value in thresholds.items()
    }


def _reached(options: Mapping[str, Any], metrics: Columns, names: Sequence[str]) -> Levels:
    """The maxima of the multipliers that have come to theirs: a constraint is weighed no more from there on."""
    constraints = options.get("constraints")
    constraints = constraints if isinstance(constraints, Mapping) else {}
    levels: Levels = {}
    for name in names:
        # One alone has columns without its name.
        own = next(iter(constraints.values()), None) if len(constraints) == 1 else constraints.get(name)
        own = own if isinstance(own, Mapping) else {}
        most, values = own.get("multiplier_max"), metrics[column(name, "multiplier")]
        if most is None and isinstance(options.get("algorithm"), Mapping):
            most = options["algorithm"].get("multiplier_max")
        if isinstance(most, int | float) and own.get("controller") != "fixed" and (values >= most * (1 - 1e-6)).any():
            levels[column(name, "multiplier")] = float(most), f"dashed: its maximum {spelled(most)}"
    return levels


def _figures(metrics: Columns, names: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """What is looked at first: a name, its mean of the last steps, and that of the first."""
    own = [
        (column(name, key), f"{name}: {label}" if name else label[:1].upper() + label[1:])
        for name in names
        for key, label in (("strict_violation", "strict violation"), ("multiplier", "multiplier λ"))
    ]
    shown = [
        ("reward", "Reward"),
        *own,
        ("kl", "KL, nats/response"),
        ("entropy", "Entropy, nats/token"),
        ("response_length", "Length, tokens"),
        *([] if names else [("loss", "Training loss"), ("eval_loss", "Held-out loss")]),
        ("ranking_accuracy", "Held-out ranking accuracy"),
        ("safety_accuracy", "Held-out safety accuracy"),
        ("tokens_per_second", "Tokens/s"),
    ]
    for key, label in shown:
        values = metrics[key][np.isfinite(metrics[key])]
        if len(values):
            # Of what is measured now and then, the last and the first.
            few = _FEW if 2 * len(values) >= len(metrics["step"]) else 1
            start = spelled(_short(values[:few].mean())) if len(values) > few else None
            yield label, spelled(_short(values[-few:].mean())), start


def _figures_note(metrics: Columns) -> str:
    of = "Of the prompts that are trained on. " if "reward" in metrics.names() else ""
    return f"{of}Means of the last {_FEW} steps and of the first; of what is seldom measured, one value."


def _short(value: float) -> float:
    """With three digits, all of those before the point."""
    return float(f"{value:.3g}") if abs(value) < 1000 else round(float(value))


def _phases(metrics: Columns) -> dict[str, Any]:
    """The table of the phases: median seconds where there are any, and the share of all that was measured."""
    seconds = {
        name.removesuffix("_seconds"): metrics[name]
        for name in metrics.names()
        if name.endswith("_seconds") and np.nansum(metrics[name]) > 0
    }
    total = sum(float(np.nansum(own)) for own in seconds.values())

    def said(name: str, number: Callable[[np.ndarray], float], text: str) -> str:
        values = metrics[name][np.isfinite(metrics[name])]
        return text.format(number(values)) if len(values) else ""

    rows = [
        {
            "name": name,
            "seconds": f"{np.nanmedian(own):.3g}",
            "share": f"{np.nansum(own) / total:.0%}",
            "bar": _bar(float(np.nansum(own)) / total),
            "tokens": said(f"{name}_tokens_per_second", np.median, "{:,.0f}"),
            "memory": said(f"{name}_peak_gb", np.max, "{:.3g} GB"),
        }
        for name, own in seconds.items()
    ]
    steps = len(metrics["step"])
    note = (
        f"{_duration(total)} in {steps:,} steps, by the first rank's clock. Evaluations, and what else lies between "
        "steps or their phases, are not in it."
    )
    return {"phases": rows, "phases_note": note}


def _bar(share: float) -> Markup:
    """A share as an area."""
    return Markup(
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect width="{}" height="10"/></svg>'
    ).format(f"{100 * share:.1f}")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{hours:.1f} hours"


def _changed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The options that are not at their defaults: dotted name, value and default."""
    ours, usual = dict(_dotted(options)), dict(_dotted(defaults))
    return [
        (key, _written(value), _written(usual[key]) if key in usual else "–")
        for key, value in ours.items()
        # Of what a user named there is no default; what is null there was left as it is.
        if (value != usual[key] if key in usual else value not in (None, {}))
    ]


def _dotted(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
