"""What every job has around its steps: the folder it writes, logs, checkpoints, signals, and how it goes on.

`trainer.py` (reinforcement learning) and `supervised.py` (fine-tuning, score models) each say what a step is. Here is
what they share: a run stops by `stop_after` or a signal with a checkpoint, resumes from one to the same state, and
writes its results aside before they take their place.
"""

import contextlib
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch

from repo_fast.checkpoints.files import FileSum, as_json, write_bytes, writing
from repo_fast.collectives import Ranks
from repo_fast.config import RunConfig, default_options, to_dict, to_yaml
from repo_fast.engine import Engine
from repo_fast.errors import InputError, as_input_error, first_line
from repo_fast.jobs import checkpoint
from repo_fast.jobs.agreement import check_same_files
from repo_fast.jobs.fingerprints import Fingerprint, check_unchanged
from repo_fast.jobs.random_state import RandomState, load_random_state, save_random_state, seed_everything
from repo_fast.jobs.training_prompts import Record, write_record
from repo_fast.models.quantization import say_dequantized
from repo_fast.report.folders import hold, remove, replace, sync_names, sync_tree
from repo_fast.report.jsonl import Value, last_step
from repo_fast.report.metrics import MetricsLog
from repo_fast.report.page_links import PAGE
from repo_fast.report.plots import plot_panels
from repo_fast.report.progress import Progress
from repo_fast.report.run_page import RunPage
from repo_fast.speed.host import host_memory
from repo_fast.speed.throughput import Measured, peak_memory, reset_peak_memory

_log = logging.getLogger(__name__)

# How much of a host's memory that is free copies of the state may take.
_OF_FREE_MEMORY = 0.8


class _Unfinished:
    """A checkpoint that this rank is writing, or is about to.

    Args:
        folder: Its final name.
        write: Writes this rank's files, and gives what they are known by.
        background: Whether a thread does, from now on.
    """

    def __init__(self, folder: Path, write: Callable[[], dict[str, FileSum]], background: bool) -> None:
        self.folder = folder
        self.sums, self.is_written = write, lambda: True
        if background:
            threads = ThreadPoolExecutor(1, "checkpoint")
            future = threads.submit(write)
            threads.shutdown(wait=False)
            self.sums, self.is_written = future.result, future.done


class Run:
    """One run of a job. A subclass builds its models, then calls `start`; its loop runs inside `reports`.

    Args:
        config: The resolved configuration.
        ranks: This process among those of the run.
        total_steps: Where the run ends.
        shown: The metrics that the display shows, as `Progress` takes them.
        read: What this rank has read and will, as `check_same_files` takes it.

    Raises:
        InputError: Another rank reads something else.
    """

    # The folder of the trained model, below the output folder.
    RESULT: str

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        total_steps: int,
        shown: tuple[tuple[str, str, str], ...],
        read: Mapping[str, Fingerprint],
    ) -> None:
        # Before there are models, whose parts would not fit.
        check_same_files(read, ranks)
        self.config, self.ranks, self.total_steps = config, ranks, total_steps
        self.output_dir = Path(config.output_dir)
        self.step = self.started_at = 0
        self.stop_signal: int | None = None
        self._resumed_from: Path | None = None
        self._lock: TextIO | None = None
        self._unfinished: _Unfinished | None = None
        self._said_short = False
        self._shown = shown
        self._page = RunPage(self.output_dir, default_options)
        self._fingerprints: dict[str, Fingerprint] = {}
        self._training_prompts: Record = ()
        # The same on every rank, for what is drawn while models are built.
        torch.manual_seed(config.seed)

    def trained(self) -> dict[str, Engine]:
        """The engines whose state a checkpoint keeps, by the name of their folder."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """What a resumed run needs beside the engines' state, as plain numbers and lists."""
        raise NotImplementedError

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        raise NotImplementedError

    def start(
        self,
        resume_from: Path | None,
        model_path: str,
        fingerprints: dict[str, Fingerprint],
        training_prompts: Record,
    ) -> None:
        """Set this rank's random state, and resume. After the models: building one draws random numbers.

        Args:
            resume_from: The checkpoint folder to go on from.
            model_path: The model trained, for messages.
            fingerprints: Of the files that the run reads, for those who go on with it.
            training_prompts: What the run's model will have seen.

        Raises:
            InputError: The checkpoint is of another model, or beyond the run's last step; another process writes the
                folder; or the ranks do not find the same checkpoint.
        """
        self._fingerprints, self._training_prompts = fingerprints, training_prompts
        seed = self.config.seed * 1_000_003 + self.ranks.rank
        torch.manual_seed(seed)
        # The user's scorers may draw from these.
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        if self.config.resume is None:
            return
        self._resumed_from = resume_from
        try:
            self._hold(if_there=True)
            checkpoint.check_ranks_agree(resume_from, self.ranks)
            if resume_from is not None:
                self._go_on(resume_from, model_path)
        except BaseException:
            self._let_go()
            raise

    def _hold(self, *, if_there: bool = False) -> None:
        """Keep others out of the folder from now on. All ranks must call it.

        Args:
            if_there: Only where there is one already.

        Raises:
            InputError: Another process has it, or had it since this one looked what was there.
        """
        with self.ranks.together("taking the output folder"):
            if not self.ranks.is_first or self._lock is not None or (if_there and not self.output_dir.is_dir()):
                return
            self._lock = hold(self.output_dir, "output_dir")
            checkpoint.check_output_folder(self.config.resume, self.output_dir)
            if checkpoint.find_resume(self.config.resume, self.output_dir) != self._resumed_from:
                raise InputError(
                    f"another process wrote checkpoints in output_dir {self.config.output_dir!r} while this run "
                    "started, expected one at a time: start again"
                )

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _go_on(self, found: Path, model_path: str) -> None:
        """Take over the state of a checkpoint, or of one before it where it is damaged."""
        resume_from = checkpoint.first_sound(found, self.config.resume, self.output_dir, self.ranks)
        with self.ranks.together("reading a checkpoint"):
            run = checkpoint.read_run(resume_from)
        self._resumed_from = resume_from
        if resume_from != found:
            # It may be from before something was changed.
            checkpoint.check_run(resume_from, run, to_dict(self.config))
            check_unchanged(resume_from, run, self.config, self._fingerprints)
        checkpoint.check_model(resume_from, run, self._model(), model_path)
        if run["step"] > self.total_steps:
            raise InputError(
                f"checkpoint {resume_from} is of step {run['step']}, expected at most {self.total_steps}, where this "
                "run ends: it has fewer examples than that one had"
            )
        for name, engine in self.trained().items():
            engine.load(resume_from / name)
        self.step = self.started_at = run["step"]
        self.load_state_dict(run["state"])
        before = run.get("total_steps", self.total_steps)
        if before != self.total_steps and self.ranks.is_first:
            _log.warning(
                "going on with %d steps in all, where checkpoint %s is of a run of %d: the learning rate is that of a "
                "run so long from here on",
                *(self.total_steps, resume_from, before),
            )
        if run["ranks"] == self.ranks.size:
            load_random_state(resume_from, self.ranks.rank)
            return
        seed_everything(self.config.seed, self.step, self.ranks.size, self.ranks.rank)
        if self.ranks.is_first:
            _log.info(
                "going on with %d ranks, where %d wrote the checkpoint: what is computed differs by rounding, and by "
                "how each shuffles its share into minibatches",
                *(self.ranks.size, run["ranks"]),
            )

    # ---------------------------------------------------------------------------------------- signals, checkpoints

    def listen(self) -> None:
        """From now on, SIGTERM and SIGUSR1 stop the run after its step."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number

    def must_stop(self) -> bool:
        """Whether the run ends here, before its last step; if so, its state is saved. The same on all ranks."""
        if self._unfinished is not None and not self.ranks.any(not self._unfinished.is_written()):
            self.finish_checkpoint()
        self.stop_signal = self.ranks.max(self.stop_signal or 0) or None
        stop = self.stop_signal is not None or (
            self.config.stop_after is not None and self.step >= self.config.stop_after
        )
        if stop:
            self.save_checkpoint()
        return stop

    def exit_status(self) -> int:
        """0, or 128 + the signal that stopped the run; says how to go on where it was stopped."""
        if self.step == self.total_steps:
            return 0
        self.say(f"stopped after step {self.step} of {self.total_steps}; go on with --resume auto")
        return 0 if self.stop_signal is None else 128 + self.stop_signal

    def checkpoint_if_due(self) -> None:
        """Save the state at the steps that the configuration says, and at the last one. All ranks must call it."""
        every, is_last = self.config.checkpoint.every, self.step == self.total_steps
        if is_last or (every and self.step % every == 0):
            self.save_checkpoint(background=self.config.checkpoint.background and not is_last)

    def save_checkpoint(self, *, background: bool = False) -> None:
        """Save the state as it is after the last step, unless that is saved already. All ranks must call it.

        Args:
            background: Whether to write it while training goes on, from a copy in host memory, where there is room for
                one. It counts once `finish_checkpoint` was called.

        Raises:
            InputError: It cannot be written, or the one before it could not.
        """
        self.finish_checkpoint()
        folder = self.output_dir / "checkpoints" / f"step-{self.step:06d}"
        ranks, partial = self.ranks, checkpoint.partial(folder)
        # A host may not see yet what another has written.
        if self.step == 0 or ranks.any(folder.is_dir()):
            return
        with ranks.together("writing a checkpoint"), writing(f"checkpoint {folder}"):
            if ranks.is_first:
                checkpoint.begin(folder)
        engines = {name: engine.unsaved() for name, engine in self.trained().items()}
        state, run = RandomState.now(), as_json(self._about()) if ranks.is_first else b""
        background = background and self._copy_fits(sum(unsaved.bytes for unsaved in engines.values()))
        if background:
            engines = {name: unsaved.copied() for name, unsaved in engines.items()}

        def write() -> dict[str, FileSum]:
            sums = save_random_state(state, partial, ranks.rank)
            for name, unsaved in engines.items():
                sums |= {f"{name}/{file}": known for file, known in unsaved.write(partial / name).items()}
            if ranks.is_first:
                sums["run.json"] = write_bytes(partial / "run.json", run)
            return sums

        self._unfinished = _Unfinished(folder, write, background)
        if not background:
            self.finish_checkpoint()

    def _about(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        return {
            "step": self.step,
            "ranks": self.ranks.size,
            "total_steps": self.total_steps,
            "config": to_dict(self.config),
            "model": self._model(),
            "inputs": self._fingerprints,
            "inputs_whole": True,
            "state": self.state_dict(),
        }

    def _copy_fits(self, size: int) -> bool:
        """Whether the hosts of all ranks have room for so many bytes of each, beside what they have to leave."""
        here = size * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        short = self.ranks.any(here > _OF_FREE_MEMORY * host_memory()[0])
        if short and not self._said_short:
            self.say("host memory is short of a copy: checkpoints are not written in the background")
        self._said_short |= short
        return not short

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it count. All ranks must call it.

        Raises:
            InputError: It could not be written.
        """
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        folder, ranks = unfinished.folder, self.ranks
        with ranks.together("writing a checkpoint"), writing(f"checkpoint {folder}"):
            sums = unfinished.sums()
        everyone = dict(ranks.gather_list([*sums.items()]))
        with ranks.together("completing a checkpoint"), writing(f"checkpoint {folder}"):
            if ranks.is_first:
                # A run goes on from a checkpoint beside the logs and evaluations of before it.
                sync_tree(self.output_dir, leave_out=folder.parent)
                sync_names(self.output_dir.parent)
                checkpoint.complete(folder, everyone)
                self.prune_checkpoints()
        self.write_page()

    def prune_checkpoints(self) -> None:
        """Remove those that are not to be kept. For the first rank to call."""
        checkpoint.prune(self.output_dir, self.config.checkpoint.keep)

    def _model(self) -> dict:
        return checkpoint.describe_model(next(iter(self.trained().values())).module)

    def write_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write the run's result, a Hugging Face folder, from whole weights. The first rank calls it."""
        raise NotImplementedError

    def rehearse(self) -> None:
        """Try what the end of the run will do, in a folder that goes again. All ranks must call it.

        What is wrong with it would otherwise show when the last step is done. It comes before the run writes anything,
        so that the same command can be given again once that is mended.

        Raises:
            InputError: `output_dir`, the result or a plot cannot be written.
        """
        state = next(iter(self.trained().values())).sample_state()
        curve: list[Mapping[str, Value]] = [{"step": 1, "loss": 0.0}]
        ends: dict[str, Callable[[Path], object]] = {
            "writing the model": lambda folder: self.write_model(folder, state),
            "drawing a plot": lambda folder: plot_panels(curve, {"loss": [("loss", "loss")]}, folder),
        }
        self._hold()
        with self.ranks.together("the rehearsal of the run's end"):
            if not self.ranks.is_first:
                return
            folder = self.output_dir / "rehearsal.partial"
            for what, end in ends.items():
                remove(folder)
                try:
                    end(folder)
                except Exception as error:  # whatever libraries and the file system raise
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise InputError(f"the run could not end: {what} fails ({reason})") from error
                finally:
                    remove(folder)

    def write_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` make a folder of results aside, then give it its name. For the first rank to call."""
        final, aside = self.output_dir / name, self.output_dir / f"{name}.partial"
        remove(aside)
        write(aside)
        replace(aside, final)
        if name == self.RESULT:
            say_dequantized(final, next(iter(self.trained().values())).module)

    # ---------------------------------------------------------------------------------------------------- reports

    def write_page(self) -> None:
        """Write `report.html` of what there is so far. All ranks must call it.

        A page that cannot be made ends no run.

        Raises:
            InputError: The disk fails.
        """
        with self.ranks.together("writing the page of the run"):
            if not self.ranks.is_first:
                return
            try:
                self._page.write()
            except Exception as error:
                if isinstance(error, OSError) and as_input_error(error) is not None:
                    raise
                self.say(f"{PAGE} is not written: {type(error).__name__}: {first_line(error)}")

    @contextlib.contextmanager
    def reports(self) -> Iterator[contextlib.ExitStack]:
        """Open the logs and the display, on the first rank; close them, and what a job adds, however the run ends.

        The end of the run is rehearsed first. All ranks must call it.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._let_go)
            self.rehearse()
            with self.ranks.together("opening the logs"):
                if self.ranks.is_first:
                    with self._writable_folder():
                        # First of all: no model, and no run that can be gone on with, stands without it.
                        write_record(self.output_dir, self.RESULT, self._training_prompts)
                        checkpoint.remove_unfinished(self.output_dir)
                        (self.output_dir / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
                        self._check_log()
                    self.metrics_log = MetricsLog(
                        self.output_dir, self.config.log.loggers, to_dict(self.config), self.resume_step
                    )
                    stack.callback(self.metrics_log.close)
                    self.progress = stack.enter_context(Progress(self.total_steps, self.step, self._shown))
            yield stack

    def _check_log(self) -> None:
        """Say where the log of the run that goes on here lacks steps. For the first rank to call."""
        log, found = self.output_dir / "metrics.jsonl", self._resumed_from
        is_here = found is not None and found.resolve().parent.parent == self.output_dir.resolve()
        if is_here and (last := last_step(log)) < self.step:
            _log.warning(
                "%s ends at step %d, and the run goes on from a checkpoint of step %d: what lies between is not in it",
                *(log, last, self.step),
            )

    @contextlib.contextmanager
    def _writable_folder(self) -> Iterator[None]:
        """Say what is wrong with `output_dir` where it cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"output_dir {self.config.output_dir!r} cannot be written: {error.strerror}, expected a folder"
            ) from error

    @property
    def resume_step(self) -> int | None:
        """The step that a resumed run goes on from; None for a new run."""
        return self.step if self.config.resume is not None else None

    def log(self, record: Mapping[str, Value]) -> None:
        """Write a step's metrics, and show them. For the first rank to call."""
        self.metrics_log.write(record)
        self.progress.step(record)
        if record.get("steps_skipped"):
            self.say(f"step {self.step}: a loss or gradient was not finite; that optimizer step was skipped")

    def say(self, text: str) -> None:
        """Print a message, on the first rank."""
        if self.ranks.is_first:
            self.progress.message(text)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Measured]:
        """Show what is being done, and measure it; what is yielded is filled in once the phase is over."""
        if self.ranks.is_first:
            self.progress.phase(name)
        reset_peak_memory(self.ranks.device)
        measured = Measured(time.perf_counter())
        try:
            with torch.profiler.record_function(name):
                yield measured
        except Exception as error:
            error.add_note(f"in the phase {name!r} after step {self.step}")
            raise
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        measured.seconds = time.perf_counter() - measured.started
        measured.peak_memory = peak_memory(self.ranks.device)
