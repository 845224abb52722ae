"""Retinal pictures from check to scores, as a user types them: both eyes, two readers, fields of view."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from segkit.reading.files import read_volume
from tests.helpers import run_segkit

_TINY = ["--preset", "tiny", "--set", "network.arguments={widths: [8, 12]}", "--set", "training.steps=30"]
_SHORT = ["--set", "training.steps_per_epoch=30", "--set", "planning.patch_limit=16", "-d", "cpu", "-q"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both eyes of three children, named as CHASE_DB1 names them: dark vessels in a round, coloured field of view."""
    folder, generator = tmp_path_factory.mktemp("eyes"), np.random.default_rng(0)
    rows, columns = np.ogrid[:40, :48]
    view = (rows - 20) ** 2 + (columns - 24) ** 2 < 19**2
    for stem in ("Image_01L", "Image_01R", "Image_02L", "Image_02R", "Image_03L", "Image_03R"):
        vessels = view & ((np.abs(columns - generator.integers(16, 33)) < 3) | (np.abs(rows - 20) < 2))
        brightness = np.where(view, 150 - 90 * vessels, 2) + generator.normal(0, 5, view.shape)
        picture = np.clip(brightness[..., None] * np.array([1.0, 0.6, 0.2]), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(picture).save(folder / f"{stem}.jpg", quality=95)
        PIL.Image.fromarray(vessels).save(folder / f"{stem}_1stHO.png")
        PIL.Image.fromarray(np.roll(vessels, 1, axis=0)).save(folder / f"{stem}_2ndHO.png")
        field_of_view = PIL.Image.fromarray(1 - view.astype(np.uint8))
        field_of_view.putpalette([255, 255, 255, 0, 0, 0])  # 0 is white: so are those of CHASE_DB1
        field_of_view.save(folder / f"{stem}.gif")
    return folder


def test_check_tells_pictures_readers_and_fields_of_view(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("check", data, "--json", "--no-estimate") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layout"] == "folder2d"
    assert document["label_scheme"] == {"name": "classes", "labels": {"foreground": 1}}
    assert [case["case"] for case in document["cases"]][:2] == ["Image_01L", "Image_01R"]
    first = document["cases"][0]
    assert (first["modalities"], first["shape"], first["spacing_mm"]) == (["red", "green", "blue"], [40, 48], [])
    assert (first["labels"], first["problems"]) == ([1], [])
    assert [problem["is_fatal"] for problem in document["problems"]] == [False, False]
    assert "fields of view" in document["problems"][0]["found"]
    assert "second reader" in document["problems"][1]["found"]


def test_from_pictures_to_scores(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out, run, masks = tmp_path / "test.txt", tmp_path / "run", tmp_path / "masks"
    held_out.write_text("Image_03L\nImage_03R\n", encoding="utf-8")
    assert run_segkit("train", data, "-o", run, "--exclude", held_out, *_TINY, *_SHORT) == 0
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    for side in ("training", "validation"):  # two children, two eyes each: one child learns, the other validates
        assert len(split[side]) == len({case_id[-1] for case_id in split[side]}) == 2
        assert len({case_id[:-1] for case_id in split[side]}) == 1

    chosen = ["--cases", held_out, "-q"]
    assert run_segkit("infer", "-m", run, "-i", data, "-o", masks, *chosen, "--save-probabilities", "-d", "cpu") == 0
    assert sorted(path.name for path in masks.glob("*.png")) == ["Image_03L.png", "Image_03R.png"]
    probabilities = read_volume(masks / "probabilities" / "Image_03L_foreground.tif")
    assert (probabilities.array.dtype, probabilities.array.shape) == (np.float32, (40, 48))
    mask = read_volume(masks / "Image_03L.png").array
    np.testing.assert_array_equal(mask > 0, probabilities.array > 0.5)

    capsys.readouterr()
    evaluate = ["evaluate", "-p", masks, "-r", data, *chosen, "--json"]
    assert run_segkit(*evaluate, "--roi", ".gif", "--probabilities", masks / "probabilities") == 0
    inside = json.loads(capsys.readouterr().out)["summary"]["foreground"]
    assert inside["dice"]["n"] == inside["auc"]["n"] == 2
    assert inside["dice"]["mean"] > 0.6
    assert inside["auc"]["mean"] > 0.9
    assert run_segkit(*evaluate) == 0
    everywhere = json.loads(capsys.readouterr().out)["summary"]["foreground"]
    assert "auc" not in everywhere
    assert everywhere["specificity"]["mean"] != inside["specificity"]["mean"]  # the black around counts here


def test_a_second_reader_is_scored_like_a_prediction(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in data.glob("*_2ndHO.png"):
        (tmp_path / path.name.replace("_2ndHO", "")).write_bytes(path.read_bytes())
    assert run_segkit("evaluate", "-p", tmp_path, "-r", data, "--roi", ".gif", "--json", "-q") == 0
    scores = json.loads(capsys.readouterr().out)["summary"]["foreground"]
    assert scores["dice"]["n"] == 6
    assert 0.5 < scores["dice"]["mean"] < 1


def test_real_retina_pictures_are_checked(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_segkit("check", real_data / "chase_db1", "--json", "--fast", "--no-estimate") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["layout"], len(document["cases"])) == ("folder2d", 20)
    assert all(case["shape"] == [120, 125] for case in document["cases"])
    listed = Path(__file__).resolve().parents[1] / "benchmarks" / "chase_db1_test.txt"
    held_out = [line for line in listed.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert held_out == [case["case"] for case in document["cases"]][-6:]
