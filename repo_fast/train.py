"""Train a policy with RePO, or with a baseline of its table.

    torchrun --nproc-per-node 2 -m repo_fast.train --config tiny --output_dir outputs/tiny

Options: `--help`. A configuration is a YAML file, `--config NAME|FILE`; single values change by `--section.key value`.
Configuration and data are checked before the process group starts. Exit status: 0; 2 for input that cannot be used,
said in one line; 128 + the signal that stopped the run after saving its state; anything else is a fault, with its
traceback.
"""

import logging
import os
import sys
from collections.abc import Sequence

# Read when torch is imported. Threads that spin while they wait make a run 30 times slower where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from repo_fast.config import parse  # noqa: E402
from repo_fast.errors import InputError  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    first_on_host = os.environ.get("LOCAL_RANK", "0") == "0"
    if first_on_host:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("repo_fast").setLevel(logging.INFO)
    try:
        config = parse(None if arguments is None else list(arguments))
        # After the configuration is known to be good: these take seconds to import.
        from transformers.utils import logging as transformers_logging

        from repo_fast.engine import start_distributed, stop_distributed
        from repo_fast.inputs import read_inputs
        from repo_fast.trainer import Trainer

        # Their bars would cut through the run's own display.
        transformers_logging.disable_progress_bar()
        inputs = read_inputs(config)
        ranks = start_distributed()
        status = Trainer(config, inputs, ranks).run()
        stop_distributed()
        return status
    except InputError as error:
        if first_on_host:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
