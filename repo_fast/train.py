"""Train a policy with RePO, or with a baseline of its table.

    torchrun --nproc-per-node 2 -m repo_fast.train --config tiny --output_dir outputs/tiny

Options: `--help`. A configuration is a YAML file, `--config NAME|FILE`; single values change by `--section.key value`.
Configuration and data are checked before the process group starts. Exit status: 0; 2 for input that cannot be used,
said in one line; 5 for a run that a warning of `evaluation.stop_on` ended before its last step, 128 + the signal for
one that a signal did, both after saving its state; anything else is a fault, with its traceback.
"""

import sys
from collections.abc import Callable, Sequence

from repo_fast.config import TrainConfig
from repo_fast.jobs.launch import launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def prepare(config: TrainConfig) -> Callable:
        from repo_fast.jobs.inputs import read_inputs
        from repo_fast.jobs.trainer import Trainer

        inputs = read_inputs(config)
        return lambda ranks: Trainer(config, inputs, ranks).run()

    return launch(arguments, TrainConfig, prepare)


if __name__ == "__main__":
    sys.exit(main())
