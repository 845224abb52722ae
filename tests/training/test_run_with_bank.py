"""A whole training run with a lesion bank, on phantoms whose lesions are filled by the mean of the brain."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.checkpoint.tensors import load_state
from segkit.config import build_config
from segkit.errors import RequestError
from segkit.preparing.lesion_bank import Bank, BankedCase, LesionBank, Transplant, image_path, lesion_path
from segkit.preparing.preprocessing import PreparedCase
from segkit.reading.files import read_labels, read_volume, write_image, write_labels
from segkit.training.config import TrainConfig, with_values
from segkit.training.folder import read_config
from segkit.training.run import plan_run, train
from segkit.training.segmentation import SegmentationKind
from segkit.training.task import TrainingRequest

KIND = SegmentationKind()
MODALITIES = ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="module")
def data(phantom_data: Callable[[int], Path]) -> Path:
    return phantom_data(4)


@pytest.fixture(scope="module")
def bank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of all cases, those that validate too."""
    folder = tmp_path_factory.mktemp("bank")
    names = sorted(path.name for path in data.iterdir() if path.is_dir())
    for name in names:
        labels, grid = read_labels(data / name / f"{name}-seg.nii.gz")
        lesion_path(folder, name).parent.mkdir()
        write_labels(lesion_path(folder, name), (labels > 0).astype("uint8"), grid)
        for modality in MODALITIES:
            array = read_volume(data / name / f"{name}-{modality}.nii.gz").array.astype("float32")
            array[labels > 0] = array[(array != 0) & (labels == 0)].mean()
            write_image(image_path(folder, name, modality), array, grid)
    cases = tuple(BankedCase(case=name, patient=name.rsplit("-", 1)[0]) for name in names)
    (folder / "bank.json").write_text(Bank(modalities=MODALITIES, cases=cases).model_dump_json())
    return folder


def _request(data: Path, run: Path, bank: Path, steps: int = 10) -> TrainingRequest[TrainConfig]:
    config = build_config(
        TrainConfig,
        [
            ("test", {"network": {"size": "tiny", "arguments": {"widths": [8, 12]}}, "data": {"folds": 4}}),
            ("test", {"planning": {"patch_limit": 16, "batch_limit": 1}}),
            ("test", {"training": {"steps": steps, "steps_per_epoch": 5, "workers": 0}}),
            ("test", {"augmentation": {"lesion_bank": bank, "lesion_share": 0.5, "lesion_free_share": 0.2}}),
        ],
    )
    return TrainingRequest(data=(data,), run=run, config=config, device=torch.device("cpu"))


def test_only_copies_of_training_cases_take_part(data: Path, bank: Path, tmp_path: Path) -> None:
    planned = plan_run(_request(data, tmp_path / "run", bank), KIND)
    assert sorted(copy.id for copy in planned.copies) == sorted(planned.data[0].training_ids)
    assert len(planned.copies) == 3
    off = with_values(planned.request.config, "augmentation", enabled=False)
    assert plan_run(replace(planned.request, config=off), KIND).copies == ()


def test_a_bank_that_leaks_or_is_none_is_refused_before_the_run_folder_is_made(
    data: Path, bank: Path, tmp_path: Path
) -> None:
    request = _request(data, tmp_path / "run", bank)
    (validating,) = plan_run(request, KIND).data[0].validation_ids
    document = json.loads((bank / "bank.json").read_text())
    document["cases"] = [entry for entry in document["cases"] if entry["case"] == validating]
    (tmp_path / "leak").mkdir()
    (tmp_path / "leak" / "bank.json").write_text(json.dumps(document))
    with pytest.raises(RequestError, match="none of its 1 copies is of a training case"):
        train(_request(data, tmp_path / "run", tmp_path / "leak"), KIND)
    with pytest.raises(RequestError, match=r"nowhere: contains no readable bank\.json"):
        train(_request(data, tmp_path / "run", tmp_path / "nowhere"), KIND)
    assert not (tmp_path / "run").exists()


class _SwitchedOffError(Exception):
    """Stands for a machine that is switched off."""


def _cut_after_five(_: float, text: str) -> None:
    if text.startswith("step 7 "):
        raise _SwitchedOffError


def test_a_run_with_a_bank_resume_exactly(
    data: Path, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps at once, and five and five: the same weights, of patches of which half have a lesion moved."""
    moved: list[bool] = []
    exchange = LesionBank.exchange

    def recorded(
        self: LesionBank, case: PreparedCase, generator: np.random.Generator
    ) -> tuple[PreparedCase, Transplant | None]:
        exchanged, transplant = exchange(self, case, generator)
        moved.append(transplant is not None)
        return exchanged, transplant

    monkeypatch.setattr(LesionBank, "exchange", recorded)
    whole, halves = (_request(data, tmp_path / name, bank) for name in ("whole", "halves"))
    train(whole, KIND)
    assert len(moved) >= 10
    assert 2 <= sum(moved[:10]) <= 8
    with pytest.raises(_SwitchedOffError):
        train(replace(halves, on_progress=_cut_after_five), KIND)
    assert load_state(halves.run)["progress"]["step"] == 5
    train(replace(halves, config=read_config(halves.run), resume=True), KIND)
    states = [load_state(request.run)["model"] for request in (whole, halves)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
