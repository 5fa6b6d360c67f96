"""What all runs share: the start, the learned scores, the prompts, the budget, and how policies are judged."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.interference.runs import call, module_command
from experiments.interference.settings import FAMILIES
from repo_fast.world import corpus

TEMPERATURE = "0.7"
# The names that evaluations give the start.
START = "start"


@dataclass(frozen=True)
class World:
    """Paths of the models, and the size of everything.

    Attributes:
        start: The policy that every run starts from.
        reward, cost: Scores that are trained on.
        steps: Of a run.
        samples: Responses a prompt in evaluations.
    """

    start: str
    reward: str
    cost: str
    steps: int
    samples: int

    @classmethod
    def learned(cls, output_dir: Path, jobs: int) -> "World":
        """The embedded world with learned scores: the first three stages of the pipeline, made here if need be."""
        models = output_dir / "models"
        options = {"output_dir": str(models), "ranks": str(jobs), "until": "cost"}
        call(module_command("repo_fast.pipeline", options))
        return cls(
            str(models / "sft" / "policy"), str(models / "reward" / "model"), str(models / "cost" / "model"), 40, 8
        )

    @classmethod
    def small(cls) -> "World":
        """As small as it gets, with the rules as scores: to see whether everything runs."""
        return cls("world:tiny", "repo_fast.world.rules:reward", "repo_fast.world.rules:cost", 2, 2)

    def options(self, family: str, learning_rate: float, kl: float, prompts: str, seed: int) -> dict[str, str]:
        """Options of `repo_fast.train` for a run, but its knob and its folder."""
        return FAMILIES[family].options | {
            "config": "tiny",
            "policy.path": self.start,
            "reward.path": self.reward,
            "cost.path": self.cost,
            "data.prompts": prompts,
            "data.eval_prompts": "null",
            "total_steps": str(self.steps),
            "rollout.temperature": TEMPERATURE,
            "policy_optimizer.learning_rate": str(learning_rate),
            "algorithm.kl_coefficient": str(kl),
            "engine.zero_stage": "1",
            "log.samples_every": "1",
            "log.loggers": "[]",
            "seed": str(seed),
        }

    def evaluate(
        self, policies: Mapping[str, Path], prompts: str, output_dir: Path, scores: Mapping[str, str] | None = None
    ) -> dict:
        """Judge policies beside the start by the corpus's rules, or by other scores; returns `report.json`."""
        options = {
            "config": "tiny",
            "reference": START,
            "prompts": prompts,
            "samples_per_prompt": str(self.samples),
            "sampling.temperature": TEMPERATURE,
            "output_dir": str(output_dir),
            **(scores or {}),
        }
        named = [f"--policy={START}={self.start}", *(f"--policy={name}={path}" for name, path in policies.items())]
        call([*module_command("repo_fast.evaluate", options), *named], quiet=True)
        return json.loads((output_dir / "report.json").read_text(encoding="utf-8"))


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
