"""The base class of configurations, and reading them from YAML files, presets and dotted overrides.

A configuration class is beside the code that it configures. `segkit config show` prints the docstring of each field.
All problems of a configuration are reported together. YAML is read as plain values: no tags that create objects, no
aliases of whole sections (a few lines of them can expand to gigabytes), no key twice. Presets are YAML files in
`configs/`, in the wheel `segkit/configs`.
"""

import contextlib
import difflib
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from segkit.errors import ConfigError, Problem, RequestError


class Config(BaseModel):
    """A frozen set of named settings, without unknown keys, NaN and infinity; planning decides fields that are None."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


ConfigType = TypeVar("ConfigType", bound=Config)

PRESETS, PRETRAINING_PRESETS, INPAINTING_PRESETS = "presets", "pretraining", "inpainting"
"""Folders of the presets of `segkit train`, `segkit pretrain` and `segkit pretrain --method inpainting`."""

_END_OF_DOCUMENT = "...\n"
_LARGEST_FILE_BYTES = 200_000
"""Twenty times the largest shipped configuration. PyYAML takes seconds to read so much, and minutes for more."""
_LONGEST_VALUE = 200
"""Characters of a value in an error message."""


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases of mappings and lists, and keys that are given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            if not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
                raise yaml.YAMLError(f"*{event.anchor} stands for more than one value; write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep=deep)


def configs_folder() -> Path:
    """The folder of shipped configurations, in the installed package or the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_presets(kind: str = PRESETS) -> list[str]:
    """The names of the presets in a folder of `configs/`."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.yaml"))


def preset_path(name: str, kind: str = PRESETS) -> Path:
    """The YAML file of a preset.

    Raises:
        RequestError: there is no such preset.
    """
    path = configs_folder() / kind / f"{name}.yaml"
    if not path.is_file():
        raise RequestError(f"preset {name!r} is not known", expected=f"one of {', '.join(list_presets(kind))}")
    return path


def preset_layers(preset: str | None, kind: str = PRESETS) -> list[tuple[str, Mapping[str, Any]]]:
    """The layer of a preset, for `build_config`; none for None."""
    return [] if preset is None else [(f"preset {preset}", read_yaml(preset_path(preset, kind)))]


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping.

    Raises:
        RequestError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot be read ({error.strerror})", where=path) from error
    if len(data) > _LARGEST_FILE_BYTES:
        raise RequestError("config file exceeds 200 kB", where=path, expected="at most 200 kB of YAML")
    try:
        document = _parsed(data.decode("utf-8"))
    except ValueError as error:
        raise RequestError(f"is not valid YAML: {error}", where=path) from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise RequestError("is not a mapping of names to values", where=path, expected="`section:` lines with keys")
    return document


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """`["training.lr=1e-3"]` to `{"training": {"lr": 0.001}}`; values are YAML.

    Raises:
        RequestError: an entry is not key=value.
    """
    nested: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"--set {setting!r} cannot be read", expected="key=value, such as training.lr=1e-3")
        try:
            value = _parsed(text)
        except ValueError as error:
            raise RequestError(f"--set {setting!r}: the value is not YAML") from error
        *sections, last = key.strip().split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise RequestError(f"--set {setting!r}: {section!r} was set to a value before")
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads `1e-3` as text
        target[last] = value
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by the values of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both_sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_sections else value
    return merged


def build_config(config_type: type[ConfigType], layers: Iterable[tuple[str, Mapping[str, Any]]]) -> ConfigType:
    """A configuration from named layers (file or option, mapping); later layers replace values of earlier ones.

    Raises:
        ConfigError: lists every problem with its layer, its key path, the reason and the nearest known key.
    """
    layers = list(layers)
    merged: dict[str, Any] = functools.reduce(merge, (layer for _, layer in layers), {})
    try:
        return config_type(**merged)
    except ValidationError as error:
        problems = [_problem(config_type, layers, dict(item)) for item in error.errors()]
        raise ConfigError(problems) from None


def _parsed(text: str) -> Any:
    """A YAML document; raises a ValueError if it is not YAML or has other than plain values."""
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader, which creates no objects
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # PyYAML's converters also raise KeyError, IndexError ...
        raise ValueError(" ".join(str(error).split())) from error


def _problem(
    config_type: type[BaseModel], layers: list[tuple[str, Mapping[str, Any]]], item: dict[str, Any]
) -> Problem:
    location = tuple(str(part) for part in item["loc"])
    key = ".".join(location) or "(whole file)"
    origin = next((name for name, layer in reversed(layers) if _holds(layer, location)), "configuration")
    if item["type"] == "extra_forbidden":
        known = _known_keys(config_type, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return Problem(f"{origin}: {key}", "no such key", remedy)
    reason = str(item["msg"]).removeprefix("Value error, ")
    if location:
        given = repr(item["input"])
        reason += f" (got {given if len(given) <= _LONGEST_VALUE else given[:_LONGEST_VALUE] + ' ...'})"
    return Problem(f"{origin}: {key}", reason)


def _holds(layer: Mapping[str, Any], location: tuple[str, ...]) -> bool:
    value: Any = layer
    for part in location:
        if not isinstance(value, Mapping):
            return True  # the layer set a section above the key of the validator
        if part not in value:
            return False
        value = value[part]
    return bool(location)


def _known_keys(config_type: type[BaseModel], sections: tuple[str, ...]) -> list[str]:
    for section in sections:
        field = config_type.model_fields.get(section)
        choices = () if field is None else (field.annotation, *get_args(field.annotation))
        inner = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        config_type = inner[0]
    return sorted(config_type.model_fields)


def annotated_yaml(config: BaseModel, reasons: Mapping[str, str] | None = None, *, has_help: bool = True) -> str:
    """A configuration as YAML with comments: the help of each key, and why it was chosen (`reasons`, by dotted key)."""
    return "\n".join(_annotated_lines(config, reasons or {}, has_help, prefix="")) + "\n"


def _annotated_lines(config: BaseModel, reasons: Mapping[str, str], has_help: bool, prefix: str) -> list[str]:
    lines: list[str] = []
    indent = "  " * prefix.count(".")
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), prefix + name
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}{name}:", *_annotated_lines(value, reasons, has_help, prefix=f"{key}.")]
            continue
        if has_help and field.description:
            lines += [f"{indent}# {line}" for line in field.description.splitlines()]
        if key in reasons:
            lines.append(f"{indent}# chosen: {reasons[key]}")
        plain = config.model_dump(mode="json", include={name})[name]
        text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000)
        lines.append(f"{indent}{name}: {text.removesuffix(_END_OF_DOCUMENT).strip()}")
    return lines
