"""Configuration files: layers, overrides, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from segkit.config import Config, annotated_yaml, build_config, list_presets, merge, parse_overrides, read_yaml
from segkit.errors import ConfigError, RequestError


class Inner(Config):
    rate: float = 0.5
    """How fast."""
    names: tuple[str, ...] = ()


class Outer(Config):
    inner: Inner = Inner()
    count: int = 1


def test_later_layers_win_key_by_key() -> None:
    config = build_config(
        Outer, [("a.yaml", {"inner": {"rate": 1, "names": ["x"]}}), ("--set", {"inner": {"rate": 2}})]
    )
    assert config == Outer(inner=Inner(rate=2, names=("x",)))


def test_overrides_are_dotted_yaml() -> None:
    settings = ["inner.rate=1e-3", "inner.names=[a, b]", "count=4", "flag=true", "nothing=null"]
    assert parse_overrides(settings) == {
        "inner": {"rate": 0.001, "names": ["a", "b"]},
        "count": 4,
        "flag": True,
        "nothing": None,
    }


def test_merge_keeps_both_sides_untouched() -> None:
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


def test_all_problems_are_reported_with_origin_key_and_suggestion() -> None:
    layers = [
        ("a.yaml", {"inner": {"rat": 3, "rate": "fast"}, "cout": 2}),
        ("--set", {"count": "many"}),
    ]
    with pytest.raises(ConfigError) as caught:
        build_config(Outer, layers)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "a.yaml: inner.rat: no such key -> did you mean 'rate'?" in text
    assert "a.yaml: inner.rate: Input should be a valid number" in text
    assert "a.yaml: cout: no such key -> did you mean 'count'?" in text
    assert "--set: count: Input should be a valid integer" in text
    assert caught.value.exit_code == 2


def test_unknown_key_without_a_near_one_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"inner\.zzz: no such key -> known keys here: names, rate"):
        build_config(Outer, [("a.yaml", {"inner": {"zzz": 1}})])


def test_annotated_yaml_reads_back_and_tells_meaning_and_reason() -> None:
    config = Outer(inner=Inner(names=("ä", "b")))
    text = annotated_yaml(config, {"inner.rate": "the data are slow"})
    assert "  # How fast.\n  # chosen: the data are slow\n  rate: 0.5\n" in text
    assert Outer(**yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [("a: [1", "is not valid YAML"), ("- 1\n- 2", "is not a mapping"), ("1: 2", "is not a mapping")],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(RequestError, match=reason):
        read_yaml(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("setting", ["rate", "=3"])
def test_override_without_key_or_value(setting: str) -> None:
    with pytest.raises(RequestError, match="expected key=value"):
        parse_overrides([setting])


def test_every_preset_is_found() -> None:
    assert list_presets() == ["cpu", "default", "large", "tiny"]
