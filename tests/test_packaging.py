"""The built wheel works outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("segkit-*.whl")
    return path


def test_configurations_and_assets_travel_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"segkit/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(shipped) >= 4
    assert shipped <= names
    assert "segkit/py.typed" in names
    templates = ("chart.html", "legend.html", "page.html", "planes.html", "sections.html", "viewer.html")
    assert {f"segkit/report/assets/{name}" for name in (*templates, "page.css", "page.js", "viewer.js")} <= names
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in names)


def test_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = (
        "import sys, segkit, segkit.cli; from segkit.config import list_presets;"
        "print(segkit.__file__); print(list_presets());"
        "segkit.cli.main(['config', 'show', '--preset', 'cpu'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert str(site) in done.stdout.splitlines()[0], done.stdout + done.stderr
    assert done.stdout.splitlines()[1] == "['cpu', 'default', 'large', 'tiny']"
    assert "patch_limit: 48" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_needs_no_heavy_import(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom segkit.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as leave:\n    assert not leave.code\n"
        "heavy = {'torch', 'monai', 'nibabel', 'numpy', 'scipy', 'SimpleITK', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_nothing_inside_imports_the_public_face() -> None:
    face = re.compile(r"^\s*(import segkit$|from segkit import )", re.MULTILINE)
    sources = list((ROOT / "segkit").rglob("*.py"))
    assert len(sources) > 50
    assert [str(path) for path in sources if face.search(path.read_text(encoding="utf-8"))] == []
