"""Hostile inputs for every parser: `python tests/fuzz/run.py --inputs 20000 --seed 0`.

Prints a table of what became of them (of formats whose first check refuses most random changes, which share got beyond
it) and every defect once; the exit code is 1 where there are any. `--show PARSER
NUMBER` writes that input into the current folder.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

from fuzzing.parser import Parser
from fuzzing.parsers import PARSERS
from fuzzing.runner import Tally, run_jobs
from fuzzing.worker import made_input


def main() -> int:
    """Run, print, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all parsers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parsers", nargs="*", default=list(PARSERS), choices=list(PARSERS))
    parser.add_argument("--show", nargs=2, metavar=("PARSER", "NUMBER"))
    options = parser.parse_args()
    if options.show:
        name, number = options.show
        for file, content in made_input(PARSERS[name], PARSERS[name].seeds(), options.seed, int(number)).items():
            Path(f"{name}-{options.seed}-{number}--{Path(file).name}").write_bytes(content)
        return 0
    each = -(-options.inputs // len(options.parsers))
    began, tallies = time.monotonic(), {}
    for name in options.parsers:
        tallies |= run_jobs([[name, options.seed, 0, each]])
        print(_row(PARSERS[name], tallies[name]), flush=True)  # noqa: T201
        for words, numbers in _distinct(tallies[name]).items():
            print(f"    {len(numbers)}: {words}  (number {numbers[0]})", flush=True)  # noqa: T201
    total = sum(tally.inputs for tally in tallies.values())
    defects = sum(len(tally.defects) for tally in tallies.values())
    print(f"{total} inputs, {defects} defects, {(time.monotonic() - began) / 60:.1f} min")  # noqa: T201
    return 1 if defects else 0


def _row(parser: Parser, tally: Tally) -> str:
    beyond = f"{tally.share_beyond(parser.first_check):4.0%}" if parser.first_check else "   -"
    return (
        f"{parser.name:20} {tally.inputs:6} inputs {tally.accepted:6} accepted {tally.refused:6} refused "
        f"{beyond} beyond the first check {len(tally.defects):5} defects"
    )


def _distinct(tally: Tally) -> dict[str, list[int]]:
    """Defects with the same words but for numbers and names, once each."""
    found: dict[str, tuple[str, list[int]]] = {}
    groups: dict[str, list[int]] = defaultdict(list)
    for number, words in tally.defects:
        key = re.sub(r"\d+|'[^']*'", "*", words)
        found.setdefault(key, (words, groups[key]))
        groups[key].append(number)
    return dict(found.values())


if __name__ == "__main__":
    sys.exit(main())
