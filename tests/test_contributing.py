"""The maps of CONTRIBUTING.md name files and calls that exist, at most twelve files each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADINGS = ("One volume, from file to mask", "One patch, from file to loss")


def rows(heading: str) -> list[tuple[Path, list[str]]]:
    """The files of a map with the calls named beside each."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"### {heading}\n")[2]
    found = []
    for line in text.partition("\n#")[0].splitlines():
        match = re.match(r"\| `(segkit/[\w/]+\.py)` \| (.*) \|$", line)
        if match:
            found.append((ROOT / match[1], re.findall(r"`([A-Za-z_.]+)`", match[2])))
    return found


def names_in(path: Path) -> set[str]:
    """Functions and classes of a module, methods as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("heading", HEADINGS)
def test_maps_name_what_exists(heading: str) -> None:
    table = rows(heading)
    assert 8 <= len({path for path, _ in table}) <= 12
    for path, calls in table:
        assert calls, path
        assert set(calls) <= names_in(path), path
