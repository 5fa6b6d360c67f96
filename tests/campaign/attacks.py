"""Attacks: code hidden in what a run reads, ways out of its folder and its machine, markup in what it writes.

Each shows first that the attack works on who does not look.
"""

import os
from collections.abc import Iterator
from itertools import chain

# Names that are no file would be looked for there, again and again where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.campaign import hidden_code, markup, ways_out  # noqa: E402
from tests.campaign.book import Trial  # noqa: E402


def trials() -> Iterator[Trial]:
    """All of them; what they are about stands in their names."""
    return chain(hidden_code.trials(), ways_out.trials(), markup.trials())
