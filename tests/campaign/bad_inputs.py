"""Bad input to every entry point: options of wrong values, files and folders that are not right, and what users do."""

from collections.abc import Iterator

from tests.campaign import wrong_commands, wrong_data, wrong_folders, wrong_options
from tests.campaign.book import Trial


def trials() -> Iterator[Trial]:
    for part in (wrong_commands, wrong_data, wrong_folders, wrong_options):
        for bad in part.bad():
            yield bad.trial()
