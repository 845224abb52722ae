"""Settings and JSON documents, changed as trees and written with what a tree cannot hold: deep nests, keys twice ..."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import yaml

from fuzzing.mutators.raw import mutated_bytes
from fuzzing.mutators.trees import VALUES, mutated_tree

_MARK = "spelt-{}-"
_JSON_SPELLINGS = (
    *("[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, "9" * 5000, "9" * 400, "1e999", "-0", "-0.0", "1E2"),
    *("1.0", '"\\ud800"', '"\\u0000"', '"\\u202e"', "NaN", "-Infinity", '{"a": 1, "a": 2}', '"\\u00e9"'),
)
_YAML_SPELLINGS = (
    *("[" * 3000 + "]" * 3000, "{a: " * 500 + "1" + "}" * 500, "9" * 5000, "9" * 400, "1e999", "-0", "1_000", "0x_"),
    *("0b", "0o17", "017", "1:99:99", "1:2:3.4", ".inf", "-.INF", ".nan", "~", "yes", "off", "=", "<<", "''", "'~'"),
    *("2001-99-99", "2001-01-01", "2001-01-01 00:00:00 +99:99", "!!binary x", "!!binary eA==", "!!int x", "!!int 0x"),
    *("!!float x", "!!timestamp x", "!!null x", "!!str 5", "!!str", "!!bool x", "!!set {a, b}", "!!omap [a: 1]"),
    *("!!pairs [a: 1, a: 2]", "!!map x", "!!seq {a: 1}", "!x y", "!!python/tuple [1]", "!!python/name:os.system"),
    *("!!python/object/apply:os.mkdir [canary]", "&a x", "*a", "&a [*a]", "[&b x, *b, *b]", "{<<: {x: 1}}"),
    *("{<<: [{x: 1}, {y: 2}]}", "{<<: x}", "{[a]: 1}", "{{a: b}: 1}", "{1: 2, true: 3, ~: 4}", "{a: 1, a: 2}"),
    *("{1: 2, 0x1: 3}", "{? a}", '"\\ud800"', '"\\0"', '"\\U000e0001"', "1.0e-3", "1e-3", "+1", "{2001-01-01: 1}"),
)
_OTHER_KEYS = (
    *("1:", "true:", "~:", "1.5:", "[a]:", "<<:", "data.fold:", "=:", "2001-01-01:", "? a\n:", "!!binary eA==:"),
)
_AROUND = ("%YAML 1.1\n---\n{}", "%TAG ! x:\n---\n{}", "---\n{}...\n", "{}---\n{{}}\n", "\ufeff{}")


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file changed as a tree; one time in ten as bytes."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    changed = mutated_tree(json.loads(data), rng, _values(_JSON_SPELLINGS))
    text = _spelt(json.dumps(changed, ensure_ascii=rng.random() < 0.5), _JSON_SPELLINGS)
    if rng.random() < 0.1:
        text = _with_a_key_twice(text, r'"[^"\\]*":', rng)
    return text.encode()


def mutated_yaml(data: bytes, rng: random.Random) -> bytes:
    """A YAML file changed as a tree; one time in ten as bytes."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    changed = mutated_tree(yaml.safe_load(data), rng, _values(_YAML_SPELLINGS))
    text = _spelt(_as_yaml(changed, rng), _YAML_SPELLINGS)
    if rng.random() < 0.1:
        text = _with_a_key_twice(text, r"\w+:(?= |\n)", rng)
    if rng.random() < 0.1:
        text = re.sub(rf"\b{rng.choice(_keys_of(text))}:", lambda _: rng.choice(_OTHER_KEYS), text, count=1)
    if rng.random() < 0.05:
        text = rng.choice(_AROUND).format(text)
    return text.encode("utf-8", "surrogatepass")


def mutated_settings(data: bytes, rng: random.Random) -> bytes:
    """Lines of `key=value`, each by itself, changed as the tree that they stand for; one time in ten as bytes."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    settings = [line.split("=", 1) for line in data.decode().split("\n")]
    chosen = rng.sample(settings, rng.randint(1, 3))
    for setting in chosen[: rng.randint(1, 3)]:
        values = _values(_YAML_SPELLINGS)
        kind = rng.randrange(8)
        if kind == 0:
            setting[0] = rng.choice(("", ".", "data", "data.", ".data", "data..fold", "a" * 5000, "a." * 3000 + "a"))
        elif kind == 1:
            setting[0] += rng.choice((".x", " ", ".", "\u202e", ".0"))
        elif kind == 2:
            setting[1] = _one_line(rng.choice(settings)[1], rng)
        else:
            document = yaml.safe_load(setting[1])
            changed = mutated_tree([document], rng, values) if rng.random() < 0.5 else [rng.choice(values)]
            setting[1] = _one_line(changed[0] if isinstance(changed, list) and changed else changed, rng)
    lines = ["=".join(setting) for setting in chosen]
    return _spelt("\n".join(lines), _YAML_SPELLINGS).encode("utf-8", "surrogatepass")


def _values(spellings: Sequence[str]) -> list[object]:
    """Values of trees, and the marks of spellings that are put in their places later."""
    return [*VALUES, *(_MARK.format(number) for number in range(len(spellings)))]


def _spelt(text: str, spellings: Sequence[str]) -> str:
    """A text with its marks, in quotation marks or without, replaced by what they stand for."""
    pattern = "([\"']?)" + _MARK.format(r"(\d+)") + r"\1"
    return re.sub(pattern, lambda found: spellings[int(found[2])], text)


def _as_yaml(document: object, rng: random.Random) -> str:
    text = yaml.safe_dump(
        document,
        default_flow_style=rng.choice((None, True, False)),
        allow_unicode=rng.random() < 0.5,
        default_style=rng.choice((None, None, None, '"', "'")),
        sort_keys=False,
        width=10_000,
    )
    return str(text)


def _one_line(value: object, rng: random.Random) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=rng.random() < 0.5, width=10_000)
    return str(text).removesuffix("...\n").replace("\n", " ").strip()


def _keys_of(text: str) -> list[str]:
    return re.findall(r"\b([a-z]\w*):", text) or ["x"]


def _with_a_key_twice(text: str, pattern: str, rng: random.Random) -> str:
    keys = [*re.finditer(pattern, text)]
    if len(keys) < 2:
        return text
    one, other = rng.sample(keys, 2)
    return text[: one.start()] + other[0] + text[one.end() :]
