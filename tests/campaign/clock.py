"""The main job on a machine whose clock is set while it runs.

CLOCK_JUMP=SECONDS python -m tests.campaign.clock ...      as python -m repo_fast.train ...
"""

import os
import sys
import time

from repo_fast.jobs.trainer import Trainer
from repo_fast.train import main

if __name__ == "__main__":
    jump, offset = float(os.environ["CLOCK_JUMP"]), 0.0
    now, take_step = time.time, Trainer._take_step

    def jumping_step(self: Trainer) -> object:
        global offset
        offset += jump
        return take_step(self)

    time.time = lambda: now() + offset
    Trainer._take_step = jumping_step
    sys.exit(main())
