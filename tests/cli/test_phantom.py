from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from segkit.cli.phantom import phantom
from segkit.errors import RequestError
from segkit.phantoms.layouts import PHANTOM_LAYOUTS


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()
    application.command()(phantom)
    return application


def test_writes_the_cases_and_says_what_to_do_next(app: typer.Typer, tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    result = CliRunner().invoke(app, [str(folder), "--cases", "2", "--size", "24"], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["BraTS2021_00001", "BraTS2021_00002"]
    assert f"segkit check '{folder}'" in result.stdout


def test_lists_planted_problems(app: typer.Typer, tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--cases", "4", "--size", "24", "--convention", "brats2023", "--with-problems"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    planted = [line for line in result.stdout.splitlines() if line.startswith("Planted in ")]
    assert len(planted) == 4
    for word in ("missing modality", "flipped affine", "truncated file", "stray label"):
        assert sum(word in line for line in planted) == 1


def test_help_names_every_convention(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "400"}).stdout
    assert [name for name in PHANTOM_LAYOUTS if name not in text] == []


def test_an_unknown_convention_is_a_wrong_request(app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="convention 'brats1999' is not known") as caught:
        CliRunner().invoke(app, [str(tmp_path / "x"), "--convention", "brats1999"], catch_exceptions=False)
    assert caught.value.exit_code == 2


def test_writes_the_folders_of_local_synthesis(app: typer.Typer, tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--cases", "1", "--size", "32", "--inpainting"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "in the convention brats-inpainting" in result.stdout
    assert sorted(path.name.removeprefix("BraTS-GLI-00001-000-") for path in tmp_path.rglob("*.nii.gz")) == [
        f"{ending}.nii.gz" for ending in ("mask-healthy", "mask-unhealthy", "mask", "t1n-voided", "t1n")
    ]


@pytest.mark.parametrize("other", [["--with-problems"], ["--convention", "msd"]])
def test_inpainting_has_a_convention_of_its_own(other: list[str], app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"--inpainting and {other[0]} do not go together"):
        CliRunner().invoke(app, [str(tmp_path / "x"), "--inpainting", *other], catch_exceptions=False)
    assert not (tmp_path / "x").exists()
