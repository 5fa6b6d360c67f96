"""Fine-tune a causal language model on demonstrations: the first stage of RLHF.

    torchrun --nproc-per-node 2 -m repo_fast.sft --model.path FOLDER --data.train demonstrations.jsonl \\
        --output_dir outputs/sft

The loss is on response tokens only. Options: `--help`; configurations, checks and exit status as in `repo_fast.train`.
"""

import sys
from collections.abc import Callable, Sequence

from repo_fast.config import SftConfig
from repo_fast.jobs.launch import launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def prepare(config: SftConfig) -> Callable:
        from repo_fast.jobs.finetuning import FineTuning, read_inputs

        inputs = read_inputs(config)
        return lambda ranks: FineTuning(config, inputs, ranks).run()

    return launch(arguments, SftConfig, prepare)


if __name__ == "__main__":
    sys.exit(main())
