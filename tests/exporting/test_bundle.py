"""MONAI bundles of run folders: the masks of `segkit infer`, computed by MONAI alone, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest

from segkit.checkpoint.card import ModelCard
from segkit.errors import CheckpointError, RequestError
from segkit.exporting import bundle
from segkit.exporting.bundle import export_bundle
from segkit.exporting.bundle_config import inference_config
from segkit.exporting.cases import named_cases
from segkit.inference.predictor import Predictor
from segkit.labels import classes_scheme
from segkit.phantoms.layouts import write_phantoms
from segkit.reading.layouts.table import find_cases
from tests.helpers import read_voxels, run_segkit, save_nifti, write_inpainting_run, write_segmentation_run

_OBLIQUE = np.array([[0, 0, -1.5, 9], [0.9, 0.1, 0, -3], [-0.1, 1.2, 0, 4], [0, 0, 0, 1]], np.float64)
_RULES = {
    "rules": [
        {"output": "WT", "part": "component", "smallest_mm3": 60.0},
        {"output": "ET", "part": "total", "smallest_mm3": 1e6},
    ]
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning"),
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader"),
]


def _small_run(folder: Path, *data: Any, **card: Any) -> Path:
    return write_segmentation_run(folder, *data, widths=(4, 8), **card)


def _run_in_monai(bundle: Path, data: Path, output: Path) -> None:
    """What `python -m monai.bundle run` does with these options, in this process."""
    from monai.bundle import run

    places = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(output)}
    run(config_file=str(bundle / "configs" / "inference.json"), device="$torch.device('cpu')", **places)


def test_monai_gives_the_masks_of_segkit(tmp_path: Path) -> None:
    """Four modalities, nested regions, rules, crop, resampling; phantoms and a small scan with oblique axes."""
    card = {"spacing_mm": (1.2, 1.0, 1.5), "normalisation": "zscore-nonzero", "crop": "nonzero"}
    run = _small_run(tmp_path / "run", postprocessing=_RULES, **card)
    document = export_bundle(run, tmp_path / "bundle")
    (model,) = document["models"]
    assert [case["case"] for case in model["parity"]] == ["phantom", "resampled phantom"]
    assert max(case["different_voxels"] for case in model["parity"]) <= 1
    data = tmp_path / "data"
    write_phantoms(data, range(2), convention="brats2021", size=24)
    rng = np.random.default_rng(0)
    for name in ("T1", "T1_CE", "T2", "T2-FLAIR"):
        save_nifti(data / "odd one" / f"x_{name}.nii.gz", rng.normal(5, 1, (9, 12, 7)).astype(np.float32), _OBLIQUE)
    _run_in_monai(tmp_path / "bundle", data, tmp_path / "out")
    predictor = Predictor.load(run)
    assert predictor.rules is not None
    cases = find_cases(data).cases
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{path.name}.nii.gz" for path in data.iterdir() if path.is_dir()
    )
    for case in cases:
        expected = predictor.predict_prepared(predictor.read_case(case)).labels
        found = read_voxels(tmp_path / "out" / f"{Path(case.images['t1n'].path).parent.name}.nii.gz")
        assert found.dtype == np.uint8
        assert np.count_nonzero(found != expected) <= 1
        assert np.unique(expected).size > 1


@pytest.mark.parametrize(
    "card",
    [
        {"orientation": "KJI", "normalisation": "scale-nonzero", "crop": "nonzero", "patch_size": (16, 8, 12)},
        {"orientation": "SPL", "normalisation": "ct-window", "ct_window": (400, 600), "ct_mean": 490, "ct_std": 50},
    ],
)
def test_other_axes_normalisations_and_labels(card: dict[str, Any], tmp_path: Path) -> None:
    scheme = classes_scheme("organs", {"liver": 7, "spleen": 3})
    run = _small_run(tmp_path / "run", ("CT",), scheme, spacing_mm=(1.0, 2.0, 1.5), **card)
    path = save_nifti(tmp_path / "data" / "case 1.nii.gz", np.zeros((3, 4, 5), np.int16), _OBLIQUE)
    rng = np.random.default_rng(0)
    save_nifti(path, rng.integers(300, 700, (14, 11, 9)).astype(np.int16), _OBLIQUE)
    document = export_bundle(run, tmp_path / "bundle", cases=named_cases(tmp_path / "data"))
    parity = document["models"][0]["parity"]
    assert [case["case"] for case in parity] == ["phantom", "resampled phantom", "case 1"]
    assert max(case["different_voxels"] for case in parity) <= 1
    assert parity[-1]["voxels"] == 14 * 11 * 9
    _run_in_monai(tmp_path / "bundle", tmp_path / "data", tmp_path / "out")
    expected = Predictor.load(run)(path).labels
    assert set(np.unique(expected)) <= {0, 3, 7}
    assert expected.any()
    assert np.count_nonzero(read_voxels(tmp_path / "out" / "case 1.nii.gz") != expected) <= 1


def test_monai_finds_the_bundle_complete(tmp_path: Path) -> None:
    from monai.bundle import ConfigWorkflow, verify_net_in_out

    export_bundle(_small_run(tmp_path / "run"), tmp_path / "bundle")
    files = sorted(str(path.relative_to(tmp_path / "bundle")) for path in (tmp_path / "bundle").rglob("*.*"))
    assert files == ["configs/inference.json", "configs/metadata.json", "docs/README.md", "models/model.ts"]
    with ZipFile(tmp_path / "bundle" / files[-1]) as network:
        here = str(Path(bundle.__file__).parents[1]).encode()
        assert not any(here in network.read(name) for name in network.namelist())
    config, metadata = (str(tmp_path / "bundle" / name) for name in files[:2])
    workflow = ConfigWorkflow(config, metadata, workflow_type="inference", bundle_root=str(tmp_path / "bundle"))
    workflow.initialize()
    assert workflow.check_properties() == []
    verify_net_in_out("network_def", metadata, config, device="cpu", bundle_root=str(tmp_path / "bundle"))


def test_a_pipeline_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MONAI's Spacingd the centres of the first voxels are aligned, not the outer faces of the volume."""

    def with_spacingd(card: ModelCard) -> dict[str, Any]:
        config = inference_config(card)
        steps = config["preprocessing"]["transforms"]
        names = [step["_target_"] for step in steps]
        place = names.index("CopyItemsd")
        steps[place : place + 4] = [{"_target_": "Spacingd", "keys": "image", "pixdim": config["spacing_mm"]}]
        return config

    monkeypatch.setattr(bundle, "inference_config", with_spacingd)
    run = _small_run(tmp_path / "run", spacing_mm=(1.0, 1.0, 2.0))
    with pytest.raises(CheckpointError, match=r"resampled phantom: in MONAI the logits .* Nothing was written"):
        export_bundle(run, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_bundle_cannot_hold_is_named(tmp_path: Path) -> None:
    run = _small_run(tmp_path / "run")
    for fold in (0, 1):
        shutil.copytree(run, tmp_path / "folds" / f"fold_{fold}")
    odd = _small_run(tmp_path / "odd", ("t1c", "a') or print('b"))
    picture = _small_run(tmp_path / "picture", ("grey",))
    document = json.loads((picture / "model.json").read_text())
    document |= {"dims": 2, "patch_size": [16, 16], "divisor": [2, 2]}
    (picture / "model.json").write_text(json.dumps(document))
    inpainting = write_inpainting_run(tmp_path / "inpainting")
    for model, options, message in (
        (tmp_path / "folds", {}, "holds 2 networks.*-m .*fold_0"),
        (odd, {}, "cannot be matched with file names"),
        (picture, {}, "segments pictures.*without --format"),
        (inpainting, {}, "segmentation"),
        (run, {"precision": "int8"}, "no precision int8"),
    ):
        with pytest.raises(RequestError, match=message):
            export_bundle(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_text_of_a_card_is_never_an_expression(tmp_path: Path) -> None:
    """MONAI evaluates any text that starts with $, and references after @ in it."""
    scheme = classes_scheme("odd", {"$__import__('os').abort()": 1, "@network_def": 2})
    training = {"identity": "$open('x', 'w')", "licence": "@run", "cases": 1}
    run = _small_run(tmp_path / "run", ("$print('one')",), scheme, training_data=training)
    export_bundle(run, tmp_path / "bundle")
    names = ("configs/metadata.json", "LICENSE", "docs/README.md")
    texts = [(tmp_path / "bundle" / name).read_text() for name in names]
    assert not any(
        sign in text for text in texts for sign in ("$open", "$__import__", "$print", "@run", "@network_def")
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _small_run(tmp_path / "run", ("one",))
    target = tmp_path / "bundle"
    assert run_segkit("export", "-m", run, "-o", target, "--format", "monai-bundle", "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["models"][0]["parity"][0]["dice"] >= 0.999
    assert run_segkit("export", "-m", run, "-o", target, "--format", "monai-bundle") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run_segkit("export", "-m", run, "-o", target, "--format", "monai-bundle", "--overwrite") == 0
    assert "voxels that differ" in capsys.readouterr().out
