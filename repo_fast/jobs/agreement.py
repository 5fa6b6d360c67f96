"""That all ranks were given the same. Each reads its own command line and its own host's files, and hosts may differ in
both: the run would go on, and what it did would be in no record."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from repo_fast.collectives import Ranks
from repo_fast.config import JobConfig, to_dict
from repo_fast.errors import InputError
from repo_fast.jobs.checkpoint import differences
from repo_fast.jobs.fingerprints import Fingerprint, changes


def check_same_options(config: JobConfig, ranks: Ranks) -> None:
    """Raise `InputError` where a rank has other options than the first. All ranks must call it."""
    found = _first_that_differs(to_dict(config), ranks)
    if found is not None:
        rank, first, other = found
        option, (ours, theirs) = next(iter(differences(first, other).items()))
        hint = "; give --date" if option == "date" else ""
        raise InputError(
            f"{option} is {ours!r} on rank 0 and {theirs!r} on rank {rank}, expected the same on all ranks{hint}"
        )


def check_same_files(read: Mapping[str, Fingerprint], ranks: Ranks) -> None:
    """Raise `InputError` where a rank reads something else than the first. All ranks must call it.

    Args:
        read: Fingerprints of what this rank reads, by the option that names it.
        ranks: This process among all.
    """
    found = _first_that_differs(dict(read), ranks)
    if found is not None:
        rank, first, other = found
        # One of them may have read nothing.
        name = next(changes({key: {} for key in other} | first, {key: {} for key in first} | other))[0]
        raise InputError(f"{name} is not the same on ranks 0 and {rank}, expected the same files on all hosts")


def _first_that_differs(mine: dict[str, Any], ranks: Ranks) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The first rank that has something else than rank 0; what rank 0 has, and what it has."""
    text = json.dumps(mine, sort_keys=True, default=str)
    sums = ranks.gather_list([hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()])
    rank = next((rank for rank, own in enumerate(sums) if own != sums[0]), None)
    if rank is None:
        return None
    # All ranks come here or none does.
    everyone = ranks.gather_list([mine])
    return rank, everyone[0], everyone[rank]
