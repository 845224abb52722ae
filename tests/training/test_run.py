"""From a data folder to a run folder, on phantoms small enough for seconds."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segkit.checkpoint.card import PostprocessingCard, SizeRule
from segkit.checkpoint.model import load_model
from segkit.checkpoint.run_folder import load_card
from segkit.config import build_config
from segkit.errors import RequestError, TrainingError
from segkit.inference.predictor import Predictor
from segkit.phantoms.layouts import write_phantoms
from segkit.training import choose_postprocessing as postprocessing
from segkit.training import run as run_module
from segkit.training.config import TrainConfig, with_values
from segkit.training.folder import read_config
from segkit.training.run import cross_validate, plan_run, train
from segkit.training.segmentation import SegmentationKind, SegmentationTask
from segkit.training.task import Summary, TrainingRequest

_SETTINGS = {
    "network": {"size": "tiny", "arguments": {"widths": [8, 12]}},
    "planning": {"patch_limit": 16, "batch_limit": 1},
    "training": {"steps": 4, "steps_per_epoch": 2},
    "data": {"folds": 3},
}


@pytest.fixture(scope="module")
def phantoms(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(3)


def _request(folder: Path, run: Path, /, **sections: dict[str, object]) -> TrainingRequest[TrainConfig]:
    config = build_config(TrainConfig, [("test", {**_SETTINGS}), ("over", sections)])
    return TrainingRequest(data=(folder,), run=run, config=config, device=torch.device("cpu"))


def train_run(request: TrainingRequest[TrainConfig]) -> Summary:
    return train(request, SegmentationKind())


def split_of(request: TrainingRequest[TrainConfig]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ids that train and the ids that validate, as planned."""
    (data,) = plan_run(request, SegmentationKind()).data
    return data.training_ids, data.validation_ids


@pytest.fixture(scope="module")
def finished(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train_run(_request(phantoms, run))
    return run


def test_run_folder_holds_what_the_contract_says(finished: Path, phantoms: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("config.yaml", "model.safetensors", "model.json", "last.ckpt", "previous.ckpt"),
        *("metrics.jsonl", "split.json", "validation.json", "figures"),
    }
    assert {path.name for path in (finished / "figures").iterdir()} == {"curves.png", "validation_0.png"}
    split = json.loads((finished / "split.json").read_text())
    assert len(split["training"]) == 2
    assert len(split["validation"]) == 1
    assert [Path(folder) for folder in split["data"]] == [phantoms]
    assert not set(split["training"]) & set(split["validation"])


def test_card_says_what_inference_needs(finished: Path) -> None:
    card = load_card(finished)
    assert card.modalities == ("t1n", "t1c", "t2w", "t2f")
    assert [(output.name, output.label) for output in card.outputs] == [("WT", 2), ("TC", 1), ("ET", 3)]
    segmentation, preprocessing = card.segmentation, card.preprocessing
    assert segmentation is not None
    assert (preprocessing.normalisation, preprocessing.crop) == ("zscore-nonzero", "nonzero")
    assert (segmentation.activation, segmentation.modality_dropout) == ("sigmoid", 0.2)
    assert segmentation.postprocessing is None  # one case is too few to choose on
    assert card.divisor == (2, 2, 2)
    assert load_model(finished).divisor == (2, 2, 2)


def test_settings_are_resolved_and_explained(finished: Path) -> None:
    text = (finished / "config.yaml").read_text()
    document = yaml.safe_load(text)
    assert document["planning"]["patch_size"] == [16, 16, 16]
    assert document["preprocessing"]["normalisation"] == "zscore-nonzero"
    assert document["augmentation"]["mirror_axes"] == [0, 1, 2]
    assert document["augmentation"]["modality_dropout"] == 0.2
    assert "may lack a sequence" in text
    assert text.count("# chosen: ") >= 5
    TrainConfig(**document)


def test_validation_scores_are_those_of_the_predictor(finished: Path, phantoms: Path) -> None:
    document = json.loads((finished / "validation.json").read_text())
    (case_id,) = document["cases"]
    files = {path.name.removesuffix(".nii.gz")[-3:]: path for path in (phantoms / case_id).iterdir()}
    prediction = Predictor.load(finished)({name: files[name] for name in ("t1n", "t1c", "t2w", "t2f")})
    import nibabel as nib

    reference = np.asarray(nib.load(files["seg"]).dataobj)
    whole, expected = prediction.labels > 0, reference > 0
    dice = 2 * (whole & expected).sum() / (whole.sum() + expected.sum())
    assert document["cases"][case_id]["WT"] == pytest.approx(dice)
    assert document["estimated_memory_gb"] > 0.3
    assert document["postprocessed"] is None


def test_a_used_folder_is_not_overwritten_unasked(finished: Path, phantoms: Path) -> None:
    with pytest.raises(RequestError, match=r"holds a run already.*--resume.*--overwrite"):
        train_run(_request(phantoms, finished))


@pytest.mark.parametrize(("memory_gb", "expected"), [(8.0, "kept"), (1.1, "returned")])
def test_freed_memory_is_returned_where_the_plan_fills_the_memory(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_gb: float, expected: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(run_module, "keep_freed_memory", lambda device: told.append("kept"))
    monkeypatch.setattr(run_module, "return_freed_memory", lambda device: told.append("returned"))
    train_run(replace(_request(phantoms, tmp_path / "run"), memory_gb=memory_gb))
    assert told == [expected]


@pytest.mark.parametrize(
    ("batch", "remedy"),
    [(2, r"--set planning\.batch_size=1, or"), (1, r"--set planning\.patch_size=\[\d+,\d+,\d+\], or")],
)
def test_out_of_memory_ends_with_the_smaller_batch_or_patch(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, remedy: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(SegmentationTask, "loss", fails)
    patch = {"batch_size": batch, "patch_size": [32, 16, 16]}
    with pytest.raises(TrainingError, match=rf"run: cpu ran out of memory with batches of {batch} and .*{remedy}"):
        train_run(_request(phantoms, tmp_path / "run", planning=patch))


def test_two_threads_train_and_validate_in_bfloat16(phantoms: Path, tmp_path: Path, two_threads: None) -> None:
    two = {"planning": {"batch_limit": 2}, "training": {"precision": "bf16"}}
    summary = train_run(_request(phantoms, tmp_path / "run", **two))
    assert summary.steps == 4
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["score" in row for row in rows] == [False, True, False, True]
    assert read_config(tmp_path / "run").planning.batch_size == 2


def test_resume_goes_on_to_more_steps(finished: Path, phantoms: Path) -> None:
    longer = _request(phantoms, finished)
    longer = replace(longer, config=with_values(read_config(finished), "training", steps=6), resume=True)
    with pytest.raises(
        RequestError, match=r"settings differ from those of the run: training\.steps 4 -> 6\. .*--allow-changes"
    ):
        train_run(longer)
    summary = train_run(replace(longer, allow_changes=True))
    assert summary.steps == 6
    changes = [json.loads(line)["changes"] for line in (finished / "changes.jsonl").read_text().splitlines()]
    assert changes == [{"training.steps": {"old": 4, "new": 6}}]
    assert (finished / "config.yaml").read_text().count("# chosen: ") >= 5
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_changes_that_do_not_fit_leave_the_settings_as_they_were(finished: Path, phantoms: Path) -> None:
    """Whether the state goes with another network is known only once that is built."""
    names = ("config.yaml", "settings.json", "changes.jsonl")
    before = {name: (finished / name).read_bytes() for name in names if (finished / name).exists()}
    kept = read_config(finished)
    wider = with_values(kept, "network", arguments={**kept.network.arguments, "widths": [8, 16]})
    request = replace(_request(phantoms, finished), config=wider, resume=True, allow_changes=True)
    with pytest.raises(RequestError, match="the checkpoint does not match the network"):
        train_run(request)
    assert {name: (finished / name).read_bytes() for name in names if (finished / name).exists()} == before


def test_resuming_with_another_fold_is_refused(finished: Path, phantoms: Path) -> None:
    """What validated would be trained on."""
    request = replace(_request(phantoms, finished, data={"folds": 3, "fold": 1}), resume=True)
    with pytest.raises(RequestError, match=r"differ from those of the run: .*data.fold 0 -> 1"):
        train_run(request)
    with pytest.raises(RequestError, match="the training cases are not those that the run began with"):
        train_run(replace(request, allow_changes=True))


def test_a_wrong_request_leaves_the_old_run_alone(phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(_request(phantoms, run, training={"steps": 2, "steps_per_epoch": 2}))
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    wrong = _request(phantoms, run, network={"size": "tiny", "arguments": {"widht": 4}})
    with pytest.raises(RequestError, match="revmbunet: widht"):
        train_run(replace(wrong, overwrite=True))
    with pytest.raises(RequestError, match="no such file or folder"):
        train_run(replace(_request(tmp_path / "nowhere", run), overwrite=True))
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_a_file_is_no_run_folder(phantoms: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("x")
    with pytest.raises(RequestError, match="is a file; expected a folder"):
        train_run(_request(phantoms, path))


def test_nothing_to_resume(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to resume"):
        train_run(replace(_request(phantoms, tmp_path / "new"), resume=True))


def test_cross_validation_scores_every_case_out_of_fold(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One case a fold is too few to choose post-processing on, so the choice, to remove everything, is given."""
    rules = PostprocessingCard(rules=(SizeRule(output="WT", part="total", smallest_mm3=1e9),), cases=1)
    monkeypatch.setattr(postprocessing, "choose_postprocessing", lambda scored, outputs, ignore: rules)
    summary = cross_validate(_request(phantoms, tmp_path, training={"steps": 2, "steps_per_epoch": 2}))
    assert summary.scores["dice"]["WT"] > 0.01
    document = json.loads((tmp_path / "validation.json").read_text())
    assert set(document["postprocessed"]["cases"]) == set(document["cases"]) == set(summary.scores["cases"])
    assert document["postprocessed"]["dice"] == {"WT": 0, "TC": 0, "ET": 0}
    assert [load_card(tmp_path / f"fold_{k}").segmentation.postprocessing for k in range(3)] == [rules] * 3
    assert len(summary.scores["cases"]) == 3
    validated = [json.loads((tmp_path / f"fold_{k}" / "split.json").read_text())["validation"] for k in range(3)]
    assert sorted(case_id for fold in validated for case_id in fold) == sorted(summary.scores["cases"])
    assert json.loads((tmp_path / "validation.json").read_text())["dice"] == pytest.approx(summary.scores["dice"])
    ensemble = Predictor.load(tmp_path)
    assert len(ensemble.digests) == 3


def test_a_resumed_cross_validation_changes_the_folds_that_are_left(phantoms: Path, tmp_path: Path) -> None:
    class CutError(Exception):
        pass

    told: list[str] = []

    def fall_in_the_second_fold(done: float, message: str) -> None:
        told.append(message)
        if len(told) == 4:  # in the second step of the fold
            raise CutError

    shape: dict[str, object] = {"steps": 2, "steps_per_epoch": 1, "live_page": False}
    request = replace(_request(phantoms, tmp_path, training=shape), on_progress=fall_in_the_second_fold)
    with pytest.raises(CutError):
        cross_validate(request)
    slower = replace(_request(phantoms, tmp_path, training=shape, optimiser={"lr": 1e-4}), resume=True)
    with pytest.raises(RequestError, match=r"optimiser.lr 0.002 -> 0.0001"):
        cross_validate(slower)
    cross_validate(replace(slower, allow_changes=True))
    assert not (tmp_path / "fold_0" / "changes.jsonl").exists()
    assert '"optimiser.lr": {"old": 0.002, "new": 0.0001}' in (tmp_path / "fold_1" / "changes.jsonl").read_text()
    assert read_config(tmp_path / "fold_1").data.fold == 1
    assert [read_config(tmp_path / f"fold_{fold}").optimiser.lr for fold in range(3)] == [0.002, 1e-4, 1e-4]


def test_cross_validation_of_few_patients(phantoms: Path, tmp_path: Path) -> None:
    """Three patients and five folds asked for: three folds; one patient: refused."""
    few = _request(phantoms, tmp_path / "few", data={"folds": 5}, training={"steps": 2, "steps_per_epoch": 2})
    assert len(cross_validate(few).scores["cases"]) == 3
    one = ["BraTS-GLI-00001-000", "BraTS-GLI-00002-000"]
    with pytest.raises(RequestError, match="one patient cannot be cross-validated"):
        cross_validate(_request(phantoms, tmp_path / "one", data={"exclude": one}))


def test_excluded_cases_touch_nothing(phantoms: Path, tmp_path: Path) -> None:
    excluded = "BraTS-GLI-00002-000"
    training, validation = split_of(_request(phantoms, tmp_path, data={"exclude": [excluded], "folds": 2}))
    assert excluded not in {*training, *validation}
    assert len({*training, *validation}) == 2
    with pytest.raises(RequestError, match="cases to exclude do not exist: nobody"):
        split_of(_request(phantoms, tmp_path, data={"exclude": ["nobody"]}))


def test_a_bad_case_is_left_out_and_named(phantoms: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_phantoms(data, range(1, 6), convention="brats2023", size=24)
    broken = data / "BraTS-GLI-00003-000" / "BraTS-GLI-00003-000-t1c.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    summary = train_run(_request(data, tmp_path / "run", training={"steps": 2, "steps_per_epoch": 2}))
    assert list(summary.skipped) == ["BraTS-GLI-00003-000"]
    assert "BraTS-GLI-00003-000-t1c.nii.gz" in summary.skipped["BraTS-GLI-00003-000"]


def test_no_usable_case_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for written in write_phantoms(data, range(1, 3), convention="brats2023", size=24):
        written.images["t2f"].write_bytes(gzip.compress(b"not an image"))
    with pytest.raises(RequestError, match="none of the 2 cases looked at can be read"):
        train_run(_request(data, tmp_path / "run", data={"folds": 2}))


def test_one_patient_trains_and_validates_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    write_phantoms(data, [1], convention="brats2021", size=24)
    caplog.set_level("WARNING", logger="segkit")
    assert split_of(_request(data, tmp_path / "run")) == (("BraTS2021_00001",), ("BraTS2021_00001",))
    assert "the scores do not generalise" in caplog.text


def test_the_other_eye_of_an_excluded_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = np.arange(24 * 24, dtype=np.uint8).reshape(24, 24)
    for stem in ("1L", "1R", "2L", "2R", "3L", "3R"):
        Image.fromarray(picture).save(tmp_path / f"{stem}.png")
        Image.fromarray(picture > 99).save(tmp_path / f"{stem}_mask.png")
    split_of(_request(tmp_path, tmp_path / "run", data={"exclude": ["1L", "1R"]}))
    assert "same patient" not in caplog.text
    training, _ = split_of(_request(tmp_path, tmp_path / "run", data={"exclude": ["1L", "3R"]}))
    assert "others of the same patient in training; exclude these too: 1R, 3L" in caplog.text
    sides = {case_id in training for case_id in ("2L", "2R")}
    assert len(sides) == 1


def test_pictures_train_too(tmp_path: Path) -> None:
    data, generator = tmp_path / "data", np.random.default_rng(0)
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
    for number in range(3):
        mask = np.zeros((24, 32), np.uint8)
        mask[5:15, 6 : 12 + number] = 1
        picture = generator.integers(0, 60, (24, 32, 3)) + 120 * mask[..., None]
        Image.fromarray(picture.astype(np.uint8)).save(data / "images" / f"p{number}.png")
        Image.fromarray(mask).save(data / "masks" / f"p{number}.png")
    run = tmp_path / "run"
    summary = train_run(_request(data, run, training={"steps": 2, "steps_per_epoch": 2}))
    assert load_card(run).dims == 2
    assert load_card(run).modalities == ("red", "green", "blue")
    assert len(summary.scores["cases"]) == 1
