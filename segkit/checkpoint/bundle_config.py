"""The configuration of a MONAI bundle as plain values: nothing in it is executed.

Three kinds of text have a meaning in MONAI: `@id::key` stands for another value of the document, `$...` is a Python
expression and `%...` another file. References are replaced. Of expressions only literals, references, `a if b else c`,
`+` of two texts or two numbers, and `len` are computed, on the syntax tree. All else is refused with its key.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from segkit.config import read_yaml
from segkit.errors import CheckpointError, DataError, RequestError
from segkit.reading.files import read_json

CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
METADATA = "metadata.json"

_REFERENCE = re.compile(r"@(\w+(?:(?:::|#)\w+)*)")
_WHOLE_REFERENCE = re.compile(f"{_REFERENCE.pattern}$")
_DEEPEST = 12
"""References and mappings inside each other: a value that refers to itself would never end."""
_LONGEST_EXPRESSION = 300
_LONGEST_SHOWN = 120


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a MONAI bundle: it has `configs/metadata.json`."""
    return (folder / "configs" / METADATA).is_file()


@dataclass(frozen=True)
class BundleConfig:
    """The document of one configuration file; `bundle_root` is the folder of the bundle."""

    file: Path
    document: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, *names: str) -> BundleConfig:
        """The first of these files in `configs` of a bundle.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        file = next((path for name in names if (path := folder / "configs" / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"holds no configs/{names[0]}", where=folder, expected="a MONAI bundle")
        try:
            document = read_json(file) if file.suffix == ".json" else read_yaml(file)
        except (DataError, RequestError) as error:
            raise CheckpointError(error.found, where=error.where, expected=error.expected) from error
        return cls(file, {**document, "bundle_root": "."})

    def refuse(self, key: str, found: object, expected: str, remedy: str | None = None) -> NoReturn:
        """Raise the CheckpointError for a key."""
        shown = found if isinstance(found, str) else repr(found)
        shown = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
        remedy = remedy or "Run the bundle with MONAI: python -m monai.bundle run"
        raise CheckpointError(f"{key} is {shown}; nothing was run", where=self.file, expected=expected, remedy=remedy)

    def raw(self, key: str) -> Any:
        """The value at `a::b::0` as it stands in the file; None if there is none."""
        value: Any = self.document
        for part in re.split("::|#", key):
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
        return value

    @property
    def bundle_name(self) -> str:
        """`name` of `metadata.json`, else the name of the folder."""
        return str(self.raw("name") or self.file.resolve().parent.parent.name)

    def channel_names(self, key: str) -> list[str]:
        """The names of a `channel_def` of `metadata.json`, in the order of its numbers; empty without one."""
        found = self.raw(key)
        if not isinstance(found, Mapping) or not all(str(number).isdigit() for number in found):
            return []
        return [str(found[number]) for number in sorted(found, key=int)]

    def target(self, key: str, known: Sequence[str]) -> str:
        """The class that `_target_` of a key names, with or without its module in MONAI; one of `known`."""
        found, named = self.raw(f"{key}::_target_"), f"one of {', '.join(known)}"
        if not isinstance(self.raw(key), Mapping):
            self.refuse(key, self.raw(key), f"a mapping with `_target_`, {named}")
        name = found.rpartition(".")[2] if isinstance(found, str) and found.startswith("monai.") else found
        if name not in known:
            self.refuse(f"{key}::_target_", found, named)
        return str(name)

    def steps(self, section: str) -> list[str]:
        """The keys of the transforms of a `Compose`."""
        self.target(section, ("Compose",))
        found = self.raw(f"{section}::transforms")
        if not isinstance(found, list):
            self.refuse(f"{section}::transforms", found, "a list of transforms")
        return [f"{section}::transforms::{place}" for place in range(len(found))]

    def require_arguments(self, key: str, known: Sequence[str]) -> None:
        """Refuse a key of the mapping at `key` that is not known."""
        for name in self.raw(key):
            if name not in known:
                self.refuse(f"{key}::{name}", self.raw(f"{key}::{name}"), f"no others than {', '.join(known)}")

    def literal(self, key: str) -> Any:
        """The value at a key, with everything in it resolved.

        Raises:
            CheckpointError: it holds code, a reference to nothing, or another file.
        """
        return self._resolved(self.raw(key), key, 0)

    def _resolved(self, value: Any, key: str, depth: int) -> Any:
        if depth > _DEEPEST:
            self.refuse(key, "nested too deeply", "a value that does not refer to itself")
        if isinstance(value, Mapping):
            return {name: self._resolved(part, f"{key}::{name}", depth + 1) for name, part in value.items()}
        if isinstance(value, list):
            return [self._resolved(part, f"{key}::{place}", depth + 1) for place, part in enumerate(value)]
        if not isinstance(value, str):
            return value
        if value.startswith("%"):
            self.refuse(key, value, "a value in this file")
        if match := _WHOLE_REFERENCE.match(value):
            return self._referred(match[1], key, depth)
        return self._computed(value[1:].strip(), key, depth) if value.startswith("$") else value

    def _referred(self, name: str, key: str, depth: int) -> Any:
        if (found := self.raw(name)) is None:
            self.refuse(key, f"@{name}", "the id of a value in this file")
        return self._resolved(found, name, depth + 1)

    def _computed(self, text: str, key: str, depth: int) -> Any:
        """The value of an expression, computed on its syntax tree."""

        def refuse() -> NoReturn:
            self.refuse(key, f"the expression ${text}", "a literal value: segkit runs no code of a bundle")

        def value_of(node: ast.expr) -> Any:
            match node:
                case ast.Constant(value=str() | int() | float() | bool() | None):
                    return node.value
                case ast.List() | ast.Tuple():
                    return [value_of(one) for one in node.elts]
                case ast.Name(id=name) if name in names:
                    return self._referred(names[name], key, depth)
                case ast.IfExp():
                    return value_of(node.body if value_of(node.test) else node.orelse)
                case ast.UnaryOp(op=ast.USub()) if isinstance(number := value_of(node.operand), (int, float)):
                    return -number
                case ast.BinOp(op=ast.Add()):
                    left, right = value_of(node.left), value_of(node.right)
                    if (isinstance(left, str) and isinstance(right, str)) or _are_numbers(left, right):
                        return left + right
                case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
                    if isinstance(counted := value_of(argument), (list, dict, str)):
                        return len(counted)
            refuse()

        names = {f"_{place}_": name for place, name in enumerate(_REFERENCE.findall(text))}
        places = iter(names)
        try:
            if len(text) > _LONGEST_EXPRESSION:
                refuse()
            tree = ast.parse(_REFERENCE.sub(lambda _: next(places), text), mode="eval")
            return value_of(tree.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            refuse()


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, (int, float)) for value in values)
