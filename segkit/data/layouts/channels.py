"""Which of the modalities that turn up in a folder become input channels of every case."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from segkit.data.case import Case
from segkit.data.layouts.grouping import IMAGE
from segkit.data.layouts.layout import FoundFile, unused_files
from segkit.data.layouts.modality import IGNORED, LABEL, in_channel_order
from segkit.errors import Problem

_LEAST_SHARE = 0.5
"""A modality that fewer cases have is an extra of some: as a channel it would spoil all others."""

_NAMELESS = re.compile(rf"^({IMAGE}|channel_\d+)$")


def common_modalities(cases: Sequence[Case], named: Collection[str] = ()) -> tuple[tuple[str, ...], list[Problem]]:
    """Modalities, in channel order, that at least half of the cases have or that the user named; notes on the others.

    The cases keep their rare images, so that a model which knows the modality can use them.
    """
    counts = Counter(modality for case in cases for modality in case.images)
    common = {name for name, count in counts.items() if name in named or count >= _LEAST_SHARE * len(cases)}
    rare: dict[tuple[Path, ...], list[str]] = defaultdict(list)
    for name in in_channel_order(name for name in counts if name not in common):
        rare[tuple(case.images[name].path for case in cases if name in case.images)].append(name)
    problems = [
        unused_files(
            paths,
            f"in training: {len(paths)} of {len(cases)} cases have {', '.join(names)}",
            f"Keep it with --modality {names[0]}=SUFFIX",
        )
        for paths, names in rare.items()
    ]
    return in_channel_order(name for case in cases for name in case.images if name in common), problems


def without_nameless(files: Sequence[FoundFile]) -> tuple[list[FoundFile], list[Problem]]:
    """The files without images of unknown modality, where most cases have known ones, and a note on what went."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if file.kind not in (LABEL, IGNORED):
            kinds[file.case_id].add(file.kind)
    named = sum(1 for found in kinds.values() if any(not _NAMELESS.match(kind) for kind in found))
    if named == 0 or named < _LEAST_SHARE * len(kinds):
        return list(files), []
    kept = [file for file in files if not _NAMELESS.match(file.kind)]
    used = {file.image.path for file in kept}
    paths: list[Path] = sorted({file.image.path for file in files} - used)
    if not paths:
        return kept, []
    return kept, [unused_files(paths, "as nothing tells their modality", "Keep it with --modality NAME=SUFFIX")]
