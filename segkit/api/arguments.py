"""Arguments that may be given as text, as on the command line, or as values."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from segkit.errors import RequestError

AnyPath: TypeAlias = str | os.PathLike[str]
CaseIds: TypeAlias = AnyPath | Sequence[str]
"""A text file with one case id a line, or the ids."""

_UNITS_MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0, "d": 1440.0}


def read_case_ids(cases: CaseIds | None) -> list[str] | None:
    """Case ids from a text file, one a line, `#` starts a comment, or from a list; None stays None.

    Raises:
        RequestError: the file is missing, or there is no id.
    """
    if cases is None:
        return None
    if not isinstance(cases, (str, os.PathLike)):
        if not cases:
            raise RequestError("the list of cases is empty", expected="case ids")
        return list(cases)
    path = Path(cases)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"cannot read the list of cases ({error.strerror})", where=path) from error
    ids = [line.split("#")[0].strip() for line in lines]
    ids = [case_id for case_id in ids if case_id]
    if not ids:
        raise RequestError("names no case", where=path, expected="one case id a line")
    return ids


def parse_minutes(budget: str | float) -> float:
    """`"1h30m"`, `"30m"` or `"90s"` to minutes; a number is minutes already.

    Raises:
        RequestError: the text is not a duration.
    """
    if not isinstance(budget, str):
        return budget
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", budget)
    if not parts or "".join(number + unit for number, unit in parts) != budget:
        raise RequestError(f"--budget {budget!r} cannot be read", expected="a duration such as 90s, 30m or 1h30m")
    return sum(float(number) * _UNITS_MINUTES[unit] for number, unit in parts)


def parse_gigabytes(memory: str | float | None) -> float | None:
    """`"8G"` or `"512M"` to GiB; a number is GiB already, None means no limit.

    Raises:
        RequestError: the text is not a size.
    """
    if not isinstance(memory, str):
        return memory
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?", memory, flags=re.IGNORECASE)
    if match is None:
        raise RequestError(f"--memory {memory!r} cannot be read", expected="a size such as 8G or 512M")
    return float(match[1]) * {"M": 1 / 1024, "G": 1.0, "T": 1024.0}[match[2].upper()]


def nested_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"training.steps": 100}` to `{"training": {"steps": 100}}`; nested sections stay as they are."""
    from segkit.config import merge

    nested: dict[str, Any] = {}
    for name, value in settings.items():
        layer: Any = value
        for part in reversed(name.split(".")):
            layer = {part: layer}
        nested = merge(nested, layer)
    return nested
