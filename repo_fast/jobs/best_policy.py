"""The policy of the best evaluation of a run, `best_policy/`: a Hugging Face folder that comes and goes as a whole.

In it are `best_evaluation.json` (step, measure, value), and the record of what its training has read, by which
certificates know it (`training_prompts.py`).
"""

import json
from dataclasses import asdict
from pathlib import Path

from repo_fast.report.best import Best

FOLDER, FILE = "best_policy", "best_evaluation.json"


def write_best(folder: Path, best: Best) -> None:
    """Say of which evaluation the policy in a folder is."""
    (folder / FILE).write_text(json.dumps(asdict(best), indent=1) + "\n", encoding="utf-8")


def read_best(output_dir: Path) -> Best | None:
    """Of which evaluation the best policy of a run is; None where there is none."""
    file = output_dir / FOLDER / FILE
    return Best(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
