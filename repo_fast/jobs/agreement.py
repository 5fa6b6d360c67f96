"""That all ranks were given the same. Each reads its own command line and its own host's files, and hosts may differ in
both: the run would go on, and what it did would be in no record."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from repo_fast.collectives import Ranks
from repo_fast.config import JobConfig, to_dict
from repo_fast.errors import InputError
from repo_fast.jobs.checkpoint import FREE_OF_SCORERS, differences
from repo_fast.jobs.fingerprints import Fingerprint, changes


def check_same_options(config: JobConfig, ranks: Ranks) -> None:
    """Raise `InputError` where a rank has other options than the first, or names of its own, as those of policies or
    heads, in another order. All ranks must call it.

    A host may have its own judge, of the same answers.
    """
    mine = _without_places(to_dict(config))
    for rank, first, other in _first_that_differs(mine, ranks):
        for option, (ours, theirs) in differences(first, other).items():
            hint = "; give --date" if option == "date" else ""
            raise InputError(
                f"{option} is {ours!r} on rank 0 and {theirs!r} on rank {rank}, expected the same on all ranks{hint}"
            )
        raise InputError(
            f"ranks 0 and {rank} have the options in another order, expected the same command on all hosts"
        )


def _without_places(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options but for where judges are, and how they are asked."""
    return {
        key: _without_places(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in options.items()
        if not FREE_OF_SCORERS.fullmatch(f"{prefix}{key}")
    }


def check_same_files(read: Mapping[str, Fingerprint], ranks: Ranks) -> None:
    """Raise `InputError` where a rank reads something else than the first. All ranks must call it.

    Args:
        read: Fingerprints of what this rank reads, by the option that names it.
        ranks: This process among all.
    """
    for rank, first, other in _first_that_differs(
        {key: dict(sorted(read[key].items())) for key in sorted(read)}, ranks
    ):
        # One of them may have read nothing.
        name = next(changes({key: {} for key in other} | first, {key: {} for key in first} | other))[0]
        raise InputError(f"ranks 0 and {rank} do not have the same {name}, expected the same files on all hosts")


def _first_that_differs(mine: dict[str, Any], ranks: Ranks) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """The first rank that has something else than rank 0, what rank 0 has, and what it has; nothing where all have the
    same, in the same order."""
    text = json.dumps(mine, default=str)
    sums = ranks.gather_list([hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()])
    if len(set(sums)) > 1:
        # All ranks come here, or none does.
        everyone = ranks.gather_list([mine])
        rank = next(rank for rank, own in enumerate(sums) if own != sums[0])
        yield rank, everyone[0], everyone[rank]
