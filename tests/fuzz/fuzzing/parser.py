"""What a parser is here: honest inputs, how they are changed, and what reads them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Change = Callable[[bytes, random.Random], bytes]
Files = Mapping[str, bytes]
"""Name -> contents of the files of one input; the first is the one that is changed."""


@dataclass(frozen=True)
class Parser:
    """`seeds` gives honest inputs, `changes` how their first file is changed (by the end of its name, "" for any).

    `read` is called with the folder that holds the files and the first of them; it may raise a SegkitError and nothing
    else.
    """

    name: str
    seeds: Callable[[], list[Files]]
    changes: Mapping[str, Change]
    read: Callable[[Path, Path], object]
    kept: Callable[[], Files] = field(default=dict)
    """Further files that lie beside every input and are not changed."""
    first_check: str = ""
    """What the sentences say, as a regular expression, that refuse a file before its contents are looked at."""

    def change(self, name: str, data: bytes, rng: random.Random) -> bytes:
        """The file changed."""
        suffix = next(suffix for suffix in self.changes if name.endswith(suffix))
        return self.changes[suffix](data, rng)
