"""Documents as trees of mappings and lists, whatever they are written as: values, keys and order."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

NAMES = ("", "0", "x", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "a\nb", "..", ".", "é" * 300)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 256, 10**6, 10**12, 10**30, -(10**12), 0.5, 1e300, float("nan"), float("inf")),
    *NAMES,
    *([], {}, [[]], {"": {}}, [None], {"0": None}, ["../x"], {"../x": 1}, [[[[[[]]]]]], list(range(50))),
)


class Whole(list[Any]):
    """A list of which no part is changed but from within, for the rest would make no sense without it."""


def mutated_tree(document: Any, rng: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """A document with one to three of its values replaced, removed, renamed, moved or doubled."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        places = [*places_of(document)]
        if not places:
            return copy.deepcopy(rng.choice(values))
        # Of what has a name there is less than of numbers in lists, and more to be found.
        named = [place for place in places if isinstance(place[0], dict)]
        parent, key = rng.choice(named if named and rng.random() < 0.5 else places)
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[_other_name(places, rng)] = parent.pop(key)
        elif kind in (1, 2) and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        elif kind == 3:
            other, other_key = rng.choice(places)
            parent[key] = copy.deepcopy(other[other_key])
        elif kind == 4:
            parent[key] = _near(parent[key], rng)
        else:
            parent[key] = copy.deepcopy(rng.choice(values))
    return document


def places_of(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key or index) of a document, the outer ones first."""
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        if not isinstance(document, Whole):
            yield document, key
        yield from places_of(document[key])


def _other_name(places: Sequence[tuple[Any, Any]], rng: random.Random) -> str:
    known = [key for parent, key in places if isinstance(parent, dict)]
    return str(rng.choice(known)) if rng.random() < 0.5 else rng.choice(NAMES)


def _near(value: Any, rng: random.Random) -> Any:
    """A value that is almost the same, as the checks behind the first one have to tell it apart."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value), [value]))
    if isinstance(value, str):
        return rng.choice((f"{value}x", value[:-1], value.upper(), f" {value}", [value], {value: value}))
    if isinstance(value, list):
        other = rng.choice((value[::-1], value[:-1], value * 2))
        return rng.choice((type(value)(other), [*value], {str(key): item for key, item in enumerate(value)}))
    if isinstance(value, dict):
        return rng.choice(([*value], [*value.values()], {**value, "x": 0}, dict(reversed(value.items()))))
    return [value]
