"""What all runs share: the start, the learned scores, the prompts, the budget, and how policies are judged."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments import runs
from experiments.interference.settings import FAMILIES
from experiments.runs import START, Run, call, module_command
from repo_fast.world import corpus

TEMPERATURE = "0.7"


@dataclass(frozen=True)
class World:
    """Paths of the models, and the size of everything.

    Attributes:
        start: The policy that every run starts from.
        reward, cost: Scores that are trained on.
        steps: Of a run.
        samples: Responses a prompt in evaluations.
        origin: Ids of the stages that made the models, by name: other models at the same paths have others.
    """

    start: str
    reward: str
    cost: str
    steps: int
    samples: int
    origin: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def learned(cls, output_dir: Path) -> "World":
        """The embedded world with learned scores: the first three stages of the pipeline, made here if need be."""
        models = output_dir / "models"
        # On as many ranks everywhere, for the models' sake: other ranks round differently.
        call(module_command("repo_fast.pipeline", {"output_dir": str(models), "ranks": "2", "until": "cost"}))
        stages = {"sft": "policy", "reward": "model", "cost": "model"}
        records = {name: json.loads((models / name / "pipeline.json").read_text(encoding="utf-8")) for name in stages}
        return cls(
            *(str(models / name / result) for name, result in stages.items()),
            steps=50,
            samples=8,
            origin={name: record["id"] for name, record in records.items()},
        )

    @classmethod
    def small(cls) -> "World":
        """As small as it gets, with the rules as scores: to see whether everything runs."""
        return cls("world:tiny", "repo_fast.world.rules:reward", "repo_fast.world.rules:cost", 2, 2)

    def run(
        self,
        folder: Path,
        family: str,
        hyperparameters: Mapping[str, float],
        knob: float | None,
        prompts: str,
        seed: int,
    ) -> Run:
        """A training of this world.

        Args:
            folder: What it writes.
            family: Key in `FAMILIES`.
            hyperparameters: Options of `repo_fast.train` by name.
            knob: The value of the family's knob; None without one.
            prompts: To train on.
            seed: Of the run.
        """
        entry = FAMILIES[family]
        varied = dict(hyperparameters) if entry.knob is None else {**hyperparameters, entry.knob: knob}
        options = {
            "config": "tiny",
            "policy.path": self.start,
            "reward.path": self.reward,
            "cost.path": self.cost,
            "data.prompts": prompts,
            "data.eval_prompts": "null",
            "total_steps": str(self.steps),
            "rollout.temperature": TEMPERATURE,
            "engine.zero_stage": "1",
            "log.samples_every": "1",
            "log.loggers": "[]",
            "seed": str(seed),
        }
        origin = dict(self.origin)
        if Path(prompts).is_file():
            origin["prompts"] = hashlib.sha256(Path(prompts).read_bytes()).hexdigest()
        return Run(folder, options | entry.options | {key: str(value) for key, value in varied.items()}, origin)

    def evaluate(
        self, policies: Mapping[str, Path], prompts: str, output_dir: Path, scores: Mapping[str, str] | None = None
    ) -> dict:
        """Judge policies beside the start by the corpus's rules, or by other scores; returns `report.json`."""
        options = {
            "config": "tiny",
            # Beside it, so that evaluations of the same policies share what they drew.
            "cache_dir": str(output_dir.parent / "evaluation-cache"),
            "prompts": prompts,
            "samples_per_prompt": str(self.samples),
            "sampling.temperature": TEMPERATURE,
            **(scores or {}),
        }
        named = {START: self.start, **{name: str(path) for name, path in policies.items()}}
        return runs.evaluate(named, output_dir, options)


def split_prompts(folder: Path) -> tuple[str, str]:
    """Write the training prompts as two files: four fifths to train tuning runs on, a fifth to judge them on."""
    rows = corpus.train_prompts()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, kept in (("train", lambda i: i % 5 != 4), ("tune", lambda i: i % 5 == 4)):
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(row) for i, row in enumerate(rows) if kept(i)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(str(path))
    return paths[0], paths[1]
