"""A seed for every response: what is drawn depends neither on the number of ranks, nor on which of them draws it, nor
on what was drawn before. A run that goes on with other ranks draws what it would have drawn, but for rounding.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What responses are drawn for. The numbers are part of what decides the seeds."""

    TRAINING = 0
    BEFORE = 1
    BEFORE_AGAIN = 2
    AFTER = 3
    UNIT = 4


def response_seeds(count: int, seed: int, purpose: Purpose, number: int = 0) -> list[int]:
    """Seeds below 2^32 of responses that are drawn together on all ranks.

    Args:
        count: How many there are. The first of more are those of fewer.
        seed: Of the job.
        purpose: Each has seeds of its own.
        number: Of the training step, or of the unit.
    """
    return np.random.SeedSequence(seed, spawn_key=(purpose, number)).generate_state(count).tolist()
