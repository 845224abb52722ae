"""Folders of cases: every case accounted for, nothing lost, nothing replaced that is not ours."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from segkit.batch.cases import choose_cases, find_input
from segkit.batch.runner import run_folder
from segkit.batch.segment import Segment
from segkit.batch.worker import CaseWorker, LocalExecutor
from segkit.errors import RequestError, warning
from segkit.inference.predictor import Predictor
from segkit.inference.sliding_window import Slab
from segkit.labels import SCHEMES, classes_scheme
from segkit.preparing.preprocessing import PreparedCase
from segkit.reading.case import Case, Cohort, ImageFile

MakeRun = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path, scans: Any) -> Path:
    for number in (1, 2, 3):
        scans.write_case(tmp_path / "data", f"BraTS2021_0000{number}", {"t1c": scans.stairs()})
    return tmp_path / "data"


def statuses(manifest: dict[str, Any]) -> dict[str, str]:
    return {entry["case"][-1]: entry["status"] for entry in manifest["cases"]}


def errors(manifest: dict[str, Any]) -> dict[str, str]:
    return {entry["case"][-1]: entry["error"] for entry in manifest["cases"] if entry["error"]}


def test_masks_and_manifest(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = []
    manifest = run_folder(
        Segment(Predictor.load(make_run())),
        find_input(data),
        out,
        on_record=lambda record: shown.append(record.case),
        model="r",
    )
    names = [f"BraTS2021_0000{number}" for number in (1, 2, 3)]
    assert sorted(path.name for path in out.iterdir()) == [*(f"{name}.nii.gz" for name in names), "manifest.json"]
    assert json.loads((out / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert shown == names
    first = manifest["cases"][0]
    assert first["status"] == "done"
    assert first["error"] is None
    assert first["backend"] == "torch"
    assert first["label_scheme"] == "brats2017"
    assert all(first["seconds"][stage] >= 0 for stage in ("read", "preprocess", "predict", "decode", "write"))
    assert first["seconds"]["predict"] > 0
    assert first["peak_rss_mb"] > 10
    assert manifest["model"]["name"] == "r"
    assert manifest["summary"]["done"] == 3


def test_mask_has_the_header_of_its_input(make_run: MakeRun, tmp_path: Path, scans: Any) -> None:
    oblique = np.array([[0, -1.9, 0.3, 5], [1.1, 0, 0, -7], [0, 0.3, 1.9, 9], [0, 0, 0, 1]])
    scans.write_case(tmp_path / "data", "BraTS2021_00001", {"t1c": scans.stairs()}, oblique)
    run_folder(Segment(Predictor.load(make_run())), find_input(tmp_path / "data"), tmp_path / "out")
    image, labels = scans.read(tmp_path / "out" / "BraTS2021_00001.nii.gz")
    assert np.array_equal(labels, scans.labels())
    assert labels.dtype == np.uint8
    np.testing.assert_allclose(image.affine, oblique, atol=1e-5)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 1)


def test_bad_cases_do_not_stop_the_others(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    case_4 = scans.write_case(data, "BraTS2021_00004", {"t1c": scans.stairs()})
    scan = next(case_4.iterdir())
    scan.write_bytes(scan.read_bytes()[:-40])
    with_nan = scans.stairs()
    with_nan[0, 0, 0] = np.nan
    scans.write_case(data, "BraTS2021_00005", {"t1c": with_nan})
    scans.write_case(data, "BraTS2021_00006", {"t2f": scans.stairs()})
    scans.write(data / "BraTS2021_00007" / "BraTS2021_00007_t1ce.nii.gz", scans.stairs())
    scans.write(data / "BraTS2021_00007" / "BraTS2021_00007_t1gd.nii.gz", scans.stairs())
    manifest = run_folder(Segment(Predictor.load(make_run())), find_input(data), tmp_path / "out")
    assert statuses(manifest) == dict.fromkeys("123", "done") | dict.fromkeys("4567", "failed")
    reasons = errors(manifest)
    assert "BraTS2021_00004_t1ce.nii.gz" in reasons["4"]
    assert "1 voxels are NaN" in reasons["5"]
    assert "modality t1c is missing (found: t2f)" in reasons["6"]
    assert "2 files for the modality t1c" in reasons["7"]
    assert not any("\n" in reason or "Traceback" in reason for reason in reasons.values())
    assert manifest["summary"]["failed"] == 4
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


@dataclass(frozen=True, eq=False)
class Stumbling(Predictor):
    """Fails in the way it is told, at the second case only."""

    error: BaseException = field(default_factory=KeyError)

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        if prepared.id.endswith("2"):
            raise self.error
        return super().slabs(prepared, axis)


def stumbling(run: Path, error: BaseException) -> Stumbling:
    whole = Predictor.load(run)
    return Stumbling(whole.backend, whole.card, error=error)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "out of memory after"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory after"),
        (OSError(5, "Input/output error", "/scans/a.nii"), "/scans/a.nii: Input/output error"),
        (KeyError("boom"), "unexpected KeyError: 'boom'. This is a bug of segkit: run again with -v"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_failure_of_one_case_is_a_sentence(
    make_run: MakeRun, data: Path, tmp_path: Path, error: BaseException, sentence: str, workers: int
) -> None:
    executor = LocalExecutor(workers)
    manifest = run_folder(Segment(stumbling(make_run(), error)), find_input(data), tmp_path / "out", executor=executor)
    assert statuses(manifest) == {"1": "done", "2": "failed", "3": "done"}
    assert errors(manifest)["2"].startswith(sentence)


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_run_goes_on_where_it_stopped(make_run: MakeRun, data: Path, tmp_path: Path, workers: int) -> None:
    run, out = make_run(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_folder(Segment(stumbling(run, KeyboardInterrupt())), find_input(data), out, executor=LocalExecutor(workers))
    kept = json.loads((out / "manifest.json").read_text())
    assert statuses(kept) == {"1": "done"}
    assert kept["remaining"] == ["BraTS2021_00002", "BraTS2021_00003"]
    (out / "BraTS2021_00002.nii.gz").write_bytes((out / "BraTS2021_00001.nii.gz").read_bytes())  # record was lost
    again = run_folder(Segment(Predictor.load(run)), find_input(data), out)
    assert statuses(again) == {"1": "skipped", "2": "done", "3": "done"}
    assert again["cases"][0]["label_scheme"] == "brats2017"


def test_second_run_skips_unless_told_to_overwrite(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    predictor, cohort, out = Predictor.load(make_run()), find_input(data), tmp_path / "out"
    run_folder(Segment(predictor), cohort, out)
    (out / "BraTS2021_00001.nii.gz").write_bytes(b"damaged")
    (out / "BraTS2021_00003.nii.gz").unlink()
    assert statuses(run_folder(Segment(predictor), cohort, out)) == {"1": "done", "2": "skipped", "3": "done"}
    again = run_folder(Segment(predictor), cohort, out, overwrite=True)
    assert statuses(again) == dict.fromkeys("123", "done")


def test_masks_of_another_model_are_not_replaced_silently(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    cohort, out = find_input(data), tmp_path / "out"
    run_folder(Segment(Predictor.load(make_run("first"))), cohort, out)
    before = (out / "BraTS2021_00001.nii.gz").read_bytes()
    second = Predictor.load(make_run("second", bias=-10.0))
    manifest = run_folder(Segment(second), cohort, out)
    assert statuses(manifest) == dict.fromkeys("123", "failed")
    assert "pass --overwrite to replace it" in errors(manifest)["1"]
    assert (out / "BraTS2021_00001.nii.gz").read_bytes() == before
    assert statuses(run_folder(Segment(Predictor.load(make_run("first"))), cohort, out)) == dict.fromkeys(
        "123", "skipped"
    )
    replaced = run_folder(Segment(second), cohort, out, overwrite=True)
    assert statuses(replaced) == dict.fromkeys("123", "done")
    assert (out / "BraTS2021_00001.nii.gz").read_bytes() != before


def test_the_input_itself_is_never_replaced(make_run: MakeRun, tmp_path: Path, scans: Any) -> None:
    scan = scans.write(tmp_path / "scan.nii.gz", scans.stairs())
    before = scan.read_bytes()

    manifest = run_folder(Segment(Predictor.load(make_run())), find_input(scan), tmp_path, overwrite=True)
    assert "would replace an input file of the case" in manifest["cases"][0]["error"]
    assert scan.read_bytes() == before


@pytest.mark.parametrize("case_id", ["../escaped", "..", "a/b", "a\\b", "a\nb", "C:evil"])
def test_case_ids_cannot_leave_the_output_folder(make_run: MakeRun, tmp_path: Path, case_id: str, scans: Any) -> None:
    scan = scans.write(tmp_path / "in" / "scan.nii.gz", scans.stairs())
    case = Case(case_id, "p", {"t1c": ImageFile(scan)})
    cohort = Cohort(tmp_path, "folder", None, ("t1c",), (case, replace(case, id="good")))
    manifest = run_folder(Segment(Predictor.load(make_run())), cohort, tmp_path / "out")
    assert [entry["status"] for entry in manifest["cases"]] == ["failed", "done"]
    assert "cannot be used as a file name" in manifest["cases"][0]["error"]
    assert sorted(path.name for path in tmp_path.rglob("*.nii.gz")) == ["good.nii.gz", "scan.nii.gz"]


def test_cases_may_be_chosen_by_id(data: Path) -> None:
    chosen = find_input(data, case_ids=["BraTS2021_00003", "BraTS2021_00001", "BraTS2021_00003"])
    assert [case.id for case in chosen.cases] == ["BraTS2021_00003", "BraTS2021_00001"]
    with pytest.raises(RequestError, match=r"1 of the requested cases .*'BraTS2021_0002' \(nearest: BraTS2021_00002"):
        find_input(data, case_ids=["BraTS2021_00001", "BraTS2021_0002"])


def test_input_that_is_not_there_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file or folder"):
        find_input(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no layout matches"):
        find_input(tmp_path / "empty")


def test_one_unreadable_file_is_a_failed_case(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(b"no gzip")
    manifest = run_folder(Segment(Predictor.load(make_run())), find_input(tmp_path / "scan.nii.gz"), tmp_path / "out")
    (entry,) = manifest["cases"]
    assert (entry["case"], entry["status"]) == ("scan", "failed")
    assert "scan.nii.gz" in entry["error"]


def test_labels_follow_the_naming_of_the_input(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    trained_2023 = Predictor.load(make_run(scheme=SCHEMES["brats2023"]))
    manifest = run_folder(Segment(trained_2023), find_input(data), tmp_path / "out")
    assert manifest["cases"][0]["label_scheme"] == "brats2017"
    assert np.array_equal(scans.read(tmp_path / "out" / "BraTS2021_00001.nii.gz")[1], scans.labels(painted=(2, 1, 4)))


def test_labels_stay_those_of_the_training_where_the_input_has_no_value_for_a_tissue(
    make_run: MakeRun, data: Path, tmp_path: Path, scans: Any
) -> None:
    organs = Predictor.load(make_run(scheme=classes_scheme("organs", {"liver": 5})))
    manifest = run_folder(Segment(organs), find_input(data), tmp_path / "out")
    assert manifest["cases"][0]["label_scheme"] == "organs"
    assert np.array_equal(scans.read(tmp_path / "out" / "BraTS2021_00001.nii.gz")[1], scans.labels(painted=(5, 5, 5)))


def test_label_scheme_may_be_asked_for(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    predictor, cohort = Predictor.load(make_run()), find_input(data)
    manifest = run_folder(Segment(predictor, label_scheme="msd-brats"), cohort, tmp_path / "out")
    assert (
        "with these options is already there" in errors(run_folder(Segment(predictor), cohort, tmp_path / "out"))["1"]
    )
    assert manifest["cases"][0]["label_scheme"] == "msd-brats"
    assert np.array_equal(scans.read(tmp_path / "out" / "BraTS2021_00001.nii.gz")[1], scans.labels(painted=(1, 2, 3)))
    with pytest.raises(RequestError, match="'brats1999' is not known"):
        run_folder(Segment(predictor, label_scheme="brats1999"), cohort, tmp_path / "other")
    with pytest.raises(RequestError, match="brats-men-rt lacks tissues of this model"):
        run_folder(Segment(predictor, label_scheme="brats-men-rt"), cohort, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_missing_modalities_are_zeros_when_allowed(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    predictor, cohort = Predictor.load(make_run(modalities=("t1c", "t2f"))), find_input(data)
    refused = run_folder(Segment(predictor), cohort, tmp_path / "out")
    assert statuses(refused) == dict.fromkeys("123", "failed")
    assert "pass --allow-missing" in errors(refused)["1"]
    allowed = run_folder(Segment(predictor, allow_missing=True), cohort, tmp_path / "out")
    assert statuses(allowed) == dict.fromkeys("123", "done")
    assert tuple(allowed["cases"][0]["missing_modalities"]) == ("t2f",)
    assert np.array_equal(scans.read(tmp_path / "out" / "BraTS2021_00001.nii.gz")[1], scans.labels())


def test_probabilities_lie_beside_the_masks(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    predictor, out = Predictor.load(make_run()), tmp_path / "out"
    cohort = find_input(data, case_ids=["BraTS2021_00002"])
    run_folder(Segment(predictor), cohort, out)

    assert statuses(run_folder(Segment(predictor, save_probabilities=True), cohort, out)) == {"2": "done"}
    names = sorted(path.name for path in (out / "probabilities").iterdir())
    assert names == [f"BraTS2021_00002_{region}.nii.gz" for region in ("ET", "TC", "WT")]
    plane = scans.read(out / "probabilities" / names[2])[1]
    np.testing.assert_allclose(plane[:, 0, 0], [0, 0.993307, 1, 1, 0, 0], atol=1e-5)  # 0 outside the crop
    assert statuses(run_folder(Segment(predictor, save_probabilities=True), cohort, out)) == {"2": "skipped"}


def test_a_mask_of_each_class_lies_beside_the_mask(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    predictor, out = Predictor.load(make_run()), tmp_path / "out"
    cohort = find_input(data, case_ids=["BraTS2021_00002"])
    assert statuses(run_folder(Segment(predictor, class_masks=True), cohort, out)) == {"2": "done"}
    mask = scans.read(out / "BraTS2021_00002.nii.gz")[1]
    for tissue, value in SCHEMES["brats2017"].values.items():
        own = scans.read(out / "classes" / f"BraTS2021_00002_{tissue}.nii.gz")[1]
        assert np.array_equal(own, (mask == value).astype(np.uint8))
        assert own.any()


def test_pictures_get_masks_as_png(make_run: MakeRun, tmp_path: Path, scans: Any) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Picture.fromarray(scans.stairs((6, 7)).astype(np.uint8)).save(tmp_path / "images" / f"{name}.png")
    run = make_run(modalities=("grey",), dims=2, scheme=classes_scheme("steps", {"low": 1, "high": 200}))

    manifest = run_folder(
        Segment(Predictor.load(run), save_probabilities=True), find_input(tmp_path / "images"), tmp_path / "out"
    )
    assert statuses(manifest) == {"a": "done", "b": "done"}, errors(manifest)
    mask = np.asarray(Picture.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(mask, scans.labels((6, 7), (1, 200, 200)))
    probability = np.asarray(Picture.open(tmp_path / "out" / "probabilities" / "a_low.tif"))
    assert probability.dtype == np.float32
    assert probability[1].argmax() == 0
    assert probability.max() < 1


def test_pictures_are_no_volumes(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds volumes; expected pictures"):
        run_folder(Segment(Predictor.load(make_run(dims=2))), find_input(data), tmp_path / "out")


def test_two_references_do_not_hinder(make_run: MakeRun, data: Path, tmp_path: Path, scans: Any) -> None:
    for tail in ("seg", "segm"):
        scans.write(data / "BraTS2021_00001" / f"BraTS2021_00001_{tail}.nii.gz", scans.labels())
    assert statuses(run_folder(Segment(Predictor.load(make_run())), find_input(data), tmp_path / "out"))["1"] == "done"


def test_work_may_be_done_elsewhere_in_any_order(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    class Backwards:
        def map(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
            worker, copies = pickle.loads(pickle.dumps((work, list(tasks))))
            assert isinstance(worker, CaseWorker)
            return LocalExecutor().map(worker, reversed(copies))

    predictor = Predictor.load(make_run())
    manifest = run_folder(Segment(predictor), find_input(data), tmp_path / "out", executor=Backwards())
    assert [entry["case"][-1] for entry in manifest["cases"]] == ["3", "2", "1"]
    assert statuses(manifest) == dict.fromkeys("123", "done")


def test_unwritable_output_is_told_before_any_work(make_run: MakeRun, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(RequestError, match="cannot be written"):
        run_folder(Segment(stumbling(make_run(), AssertionError())), find_input(data), tmp_path / "out")


def test_without_workers_no_thread_is_started(
    make_run: MakeRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor.load(make_run())
    started: list[str] = []
    whole = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self.name), whole(self))[1])
    run_folder(Segment(predictor), find_input(data), tmp_path / "none", executor=LocalExecutor(0))
    assert started == []
    run_folder(Segment(predictor), find_input(data), tmp_path / "some", executor=LocalExecutor(1))
    assert len(started) >= 2


def test_images_that_belong_to_no_case_are_in_the_manifest_unless_cases_were_chosen(
    make_run: MakeRun, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cohort = find_input(data)
    assert cohort.files == {"images": 3, "references": 0, "companions": 0, "others": 0}
    stray = data / "notes" / "stray.nii.gz"
    problem = warning(data, "1 file left out, which fits no case: stray.nii.gz")
    cohort = replace(cohort, problems=(replace(problem, left_out=(str(stray), str(stray))),))
    manifest = run_folder(Segment(Predictor.load(make_run())), cohort, tmp_path / "out")
    assert manifest["left_out"] == ["notes/stray.nii.gz"]
    assert manifest["files"]["images"] == 3
    (record,) = [one for one in caplog.records if "stray.nii.gz" in one.getMessage()]
    assert record.levelname == "WARNING"
    assert choose_cases(cohort, None).left_out == ("notes/stray.nii.gz",)
    assert choose_cases(cohort, ["BraTS2021_00002"]).left_out == ()
