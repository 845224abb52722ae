"""Text that users and readers see is plain English: no literary turns in docstrings, messages, help and documents.

`python tests/test_plain_english.py [PATH ...]` lists what is found.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGNS = re.compile(
    r"\b(tell|tells|told|telling|as said|go on|goes on|going on|gone on|went on"
    r"|whoever|whatever befalls|nobody|somebody|made up|makes up|begun|anew|in peace|in vain|"
    r"(?<!there )(?<!where )is no (?!longer\b|more\b)[a-z]+)\b",
    re.IGNORECASE,
)
"""`is no` with a noun: "the file is no image" is refused, "there is no image" is plain English."""
EXCEPTIONS: dict[str, str] = {}
"""Text that stays, and why."""
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs", "configs", "weights")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a document, or the strings and comments of a module, with their line numbers."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, line
    for number, line in enumerate(source.splitlines(), 1):
        _, is_comment, comment = line.partition("#")
        if is_comment:
            yield number, comment


def found_in(paths: Sequence[Path]) -> list[str]:
    """`file:line: sign: text` of every sign in files and folders; no line is named twice."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    found: dict[str, None] = {}
    for file in files:
        if file.suffix not in {".py", ".md", ".yaml"}:
            continue
        for number, line in texts(file):
            sign = SIGNS.search(line)
            if sign and not any(text in line for text in EXCEPTIONS):
                found[f"{file.relative_to(ROOT)}:{number}: {sign[0]}: {line.strip()[:110]}"] = None
    return list(found)


def test_text_is_plain_english() -> None:
    assert found_in([ROOT / "segkit", ROOT / "cli.py", ROOT / "benchmarks"]) == []


def test_documents_are_plain_english() -> None:
    assert found_in([ROOT / name for name in DOCUMENTS]) == []


def test_few_exceptions() -> None:
    assert len(EXCEPTIONS) <= 10


if __name__ == "__main__":
    paths = [Path(argument).resolve() for argument in sys.argv[1:]] or [ROOT / "segkit"]
    sys.stdout.writelines(f"{entry}\n" for entry in found_in(paths))
