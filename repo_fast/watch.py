"""Watch a run: its page on this machine's loopback, made anew as the run goes on.

    python -m repo_fast.watch outputs/tiny
    python -m repo_fast.watch outputs/tiny --port 8000
    python -m repo_fast.watch outputs/tiny --write

The first prints an address to open, at a free port unless one is given; Ctrl-C ends it. Nothing is written. The last
writes `report.html` into the folder, as the run does at each checkpoint and at its end, and serves nothing: for a run
of before, or one that was stopped. Exit status: 0, 130 after Ctrl-C; 2 for input that cannot be used, said in one line.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from repo_fast.errors import InputError, readable
from repo_fast.jobs.launch import OneLineParser, guarded
from repo_fast.report.progress import printable

INTERRUPTED = 130


def command_line() -> OneLineParser:
    parser = OneLineParser(prog="repo-fast watch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a run's output_dir")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--port", type=int, default=0, help="to listen at; 0 chooses a free one (default: %(default)s)")
    how.add_argument("--write", action="store_true", help="write report.html, and serve nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""

    def run() -> int:
        chosen = command_line().parse_args(sys.argv[1:] if arguments is None else list(arguments))
        if not 0 <= chosen.port < 2**16:
            raise InputError(f"--port is {chosen.port}, expected 0 to {2**16 - 1}")
        return _watch(chosen.folder, chosen.port, write=chosen.write)

    return guarded(run)


def _watch(folder: Path, port: int, *, write: bool) -> int:
    from repo_fast.config import default_options
    from repo_fast.report.page_links import PAGE
    from repo_fast.report.page_server import PageServer
    from repo_fast.report.run_page import RunPage

    page = RunPage(folder, default_options)
    with readable(folder):
        if not page.is_run():
            raise InputError(
                f"{str(folder)!r} has neither config.yaml nor metrics.jsonl, expected the output_dir of a run"
            )
    if write:
        try:
            page.write()
        except OSError as error:
            raise InputError(
                f"{folder / PAGE} cannot be written: {error.strerror}, expected your own folder"
            ) from error
        print(printable(str(folder / PAGE)))
        return 0
    with PageServer(page, folder, port) as server:
        print(printable(f"{folder}: {server.url} (Ctrl-C ends it)"), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
