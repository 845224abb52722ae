"""The process that reads hostile inputs; it may die or hang, and `runner` then starts another.

Called with JSON on standard input: jobs [parser, seed, first, last], or ["corpus parser", null, paths]. It writes
"begin PARSER NUMBER" before each input and "end OUTCOME WORDS" after it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fuzzing.parser import Files, Parser
from fuzzing.parsers import PARSERS

CORPUS = "corpus "
"""In front of the name of a parser that reads entries of the corpus."""
CANARY = "canary"
"""The folder that code in a hostile file would make where the process stands, outside the folder of the input."""
SECONDS_AN_INPUT = 5.0
"""Of the processor: the time that others keep it busy does not count. SIGPROF ends the process afterwards."""
MOST_RESIDENT_BYTES = 512 * 1024**2
"""More than an input of a few kilobytes may take, above what the process took before it."""
_MOST_ADDRESS_BYTES = 16 * 1024**3


def main() -> None:
    """Read the jobs and do them."""
    order = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print do not disturb
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESS_BYTES, _MOST_ADDRESS_BYTES))
    for name, seed, *which in order:
        parser = PARSERS[name.removeprefix(CORPUS)]
        out.write(f"prepare {name}\n")
        kept, honest = _prepared(parser.name)
        inputs = _made(parser, honest, seed, *which) if seed is not None else _stored(honest, which[0])
        for number, files in inputs:
            out.write(f"begin {name} {number}\n")
            signal.setitimer(signal.ITIMER_PROF, SECONDS_AN_INPUT)
            outcome, words = _outcome(parser, {**kept, **files}, next(iter(files)))
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write(f"end {outcome} {json.dumps(words)}\n")


@cache
def _prepared(name: str) -> tuple[Files, list[Files]]:
    """What lies beside every input, and the honest ones, which are read once: what libraries take is no input's."""
    parser = PARSERS[name]
    kept, honest = parser.kept(), parser.seeds()
    for files in honest:
        _outcome(parser, {**kept, **files}, next(iter(files)))
    return kept, honest


def made_input(parser: Parser, honest: list[Files], seed: int, number: int) -> Files:
    """The input of this number: the same for the same seed on any machine with the same libraries."""
    rng = random.Random(f"{parser.name} {seed} {number}")
    files = dict(honest[number % len(honest)])
    first = next(iter(files))
    if number >= len(honest):  # the honest ones come first, as they are
        files[first] = parser.change(first, files[first], rng)
    return files


def _made(parser: Parser, honest: list[Files], seed: int, first: int, last: int) -> Iterator[tuple[int, Files]]:
    for number in range(first, last):
        yield number, made_input(parser, honest, seed, number)


def _stored(honest: list[Files], paths: list[str]) -> Iterator[tuple[int, Files]]:
    """Entries of the corpus: a file `what-it-is--name` takes the place of an honest file of that name."""
    for number, path in enumerate(paths):
        name = Path(path).name.split("--", 1)[-1]
        others = next((files for files in honest if next(iter(files)) == name), {})
        yield number, {**others, name: Path(path).read_bytes()}


def _outcome(parser: Parser, files: Files, first: str) -> tuple[str, Any]:
    from segkit.errors import SegkitError

    with TemporaryDirectory() as outer:
        folder = Path(outer) / "a" / "input"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        canary = Path(outer) / CANARY
        os.chdir(outer)
        try:
            parser.read(folder, folder / first)
            outcome, words = "accepted", ""
        except SegkitError as error:
            outcome, words = "refused", str(error)[:2000]
        except Exception as error:
            outcome, words = "defect", f"{type(error).__name__}: {error}"[:300] + " | " + _place(error)
        finally:
            os.chdir(Path(__file__).parent)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        around = (*Path(outer).iterdir(), *folder.parent.iterdir())
        strays = [path for path in around if path not in (folder, folder.parent)]
        if canary.exists():
            outcome, words = "defect", "code of the file was run"
        elif strays:
            outcome, words = "defect", f"written outside its folder: {strays}"
        elif grown > MOST_RESIDENT_BYTES and outcome != "defect":
            outcome, words = "defect", f"took {grown / 1024**2:.0f} MB"
        return outcome, words


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/segkit/" in frame.filename]
    where = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(where.filename).name}:{where.lineno} {where.name}"


if __name__ == "__main__":
    main()
