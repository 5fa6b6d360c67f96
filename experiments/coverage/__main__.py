"""How often do the bounds of a certificate err, and how often do they find what is there?

    python -m experiments.coverage [--repeats 2000]

Prints a table: for each named cell the share of false passes where the truth is exactly the limit, beside the most that
chance allows a bound of level delta; then the same for Student's t, whose level is only asymptotic and which no claim
passes by without being told so; then the power where the truth is a fifth of the limit. A minute on one core.
"""

import argparse
import sys

from experiments.coverage.cells import ASYMPTOTIC, CELLS, DELTA, POWER, allowed, passes


def main() -> int:
    """Run from the command line; returns the exit status: 1 where a bound errs more often than it may."""
    parser = argparse.ArgumentParser(prog="python -m experiments.coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=2000, help="of each cell")
    repeats = parser.parse_args().repeats
    most = allowed(repeats) / repeats
    print(f"False passes at delta = {DELTA:g}, {repeats} repeats of each cell; at most {most:.4f} by chance.\n")
    print("| cell | bound | n | K | false passes | |\n|---|---|---:|---:|---:|---|")
    failed = False
    for cell in CELLS:
        share = passes(cell, repeats) / repeats
        failed |= share > most
        verdict = "**too often**" if share > most else ""
        print(f"| {cell.name} | {cell.bound} | {cell.n} | {cell.k} | {share:.4f} | {verdict} |")
    print("\nStudent's t, asymptotic: no limit is asserted.\n\n| cell | n | false passes |\n|---|---:|---:|")
    for cell in ASYMPTOTIC:
        print(f"| {cell.name} | {cell.n} | {passes(cell, repeats) / repeats:.4f} |")
    print("\nPower where the truth is a fifth of the limit.\n")
    print("| bound | limit | n | K | passes |\n|---|---:|---:|---:|---:|")
    for cell in POWER:
        print(f"| {cell.bound} | {cell.limit:g} | {cell.n} | {cell.k} | {passes(cell, repeats) / repeats:.4f} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
