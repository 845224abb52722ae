"""Masks of nnU-Net's models are those that nnU-Net makes: tests/data/nnunet, and golden folders beside the checkout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import SimpleITK
import torch

from segkit.api.folder import FolderOptions, open_segmentation
from segkit.errors import RequestError
from segkit.inference.decode import decode
from segkit.inference.nnunet import NnUnetPredictor, nnunet_options
from segkit.inference.predictor import Predictor
from segkit.inference.sliding_window import Slab, nnunet_weight, plan_windows, predict_slabs
from segkit.models.table import build_model
from segkit.preparing.nnunet import ResamplingConfig, nnunet_shape
from segkit.preparing.preprocessing import Preparation
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_labels, read_volume
from segkit.reading.geometry import reorientation_to
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from tests.checkpoint.test_nnunet import DATASET, make_network, make_plans, write_result
from tests.checkpoint.test_nnunet_golden import GOLDEN
from tests.helpers import LPS, run_segkit, save_nifti

FULL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
SHIPPED = Path(__file__).parents[1] / "data" / "nnunet"
NOT_SHIPPED = [name for name in GOLDEN if not (SHIPPED / name).is_dir()]
MIRRORED = ("Dataset402", "Dataset403", "Dataset412", "Dataset414")
"""Golden folders whose masks with mirroring are tested each time: a network of slices, a cascade, torch resampling."""
MOST_ON_OTHER_PROCESSORS = 2
"""Voxels that may differ: their best two logits are equal but for the last bits, which depend on the processor."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of torch depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def find_differences(results: Path, expected: str, *, uses_tta: bool | None, most: int | None = None) -> list[str]:
    """The voxels that differ from the masks in the folder `expected`, or from its `most` smallest ones."""
    predictor, root = Predictor.load(results, "cpu", "torch", threads=1, uses_tta=uses_tta), results.parent
    found = []
    for path in sorted((root / expected).glob("*.nii.gz"), key=lambda path: path.stat().st_size)[:most]:
        name = path.name.removesuffix(".nii.gz")
        files = sorted((root / "inputs").glob(f"{name}_0???.nii.gz"))
        case = predictor.match(Case(name, name, {str(channel): ImageFile(file) for channel, file in enumerate(files)}))
        mask = predictor.predict_prepared(predictor.read_case(case)).labels
        found += [f"{root.name} {name} {voxel}" for voxel in np.argwhere(mask != read_labels(path)[0]).tolist()]
    return found


@pytest.mark.parametrize("name", ["Dataset404_TwoFolds", "Dataset409_Transposed", "Dataset410_Aniso"])
def test_masks_of_nnunet(name: str) -> None:
    differing = find_differences(SHIPPED / name / FULL, "expected_notta", uses_tta=False)
    differing += find_differences(SHIPPED / name / FULL, "expected", uses_tta=None, most=1)
    assert len(differing) <= MOST_ON_OTHER_PROCESSORS, differing


@pytest.mark.parametrize("name", NOT_SHIPPED)
def test_masks_of_golden_folders(shared_data: Path, name: str) -> None:
    expected = "expected_lowres_notta" if name.endswith("lowres") else "expected_notta"
    differing = find_differences(shared_data / "nnunet_golden" / name, expected, uses_tta=False)
    assert len(differing) <= MOST_ON_OTHER_PROCESSORS, differing


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name.startswith(MIRRORED) else pytest.mark.slow) for name in NOT_SHIPPED],
)
def test_masks_of_golden_folders_with_mirroring(shared_data: Path, name: str) -> None:
    expected = "expected_lowres" if name.endswith("lowres") else "expected"
    differing = find_differences(shared_data / "nnunet_golden" / name, expected, uses_tta=None, most=1)
    assert len(differing) <= MOST_ON_OTHER_PROCESSORS, differing


def test_infer_goes_on_after_bad_files_and_keeps_the_labels_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for file in (SHIPPED / "Dataset410_Aniso" / "inputs").glob("thick*"):
        (scans / file.name).write_bytes(file.read_bytes())
    whole = (scans / "thick_0000.nii.gz").read_bytes()
    (scans / "cut_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (scans / "noise_0000.nii.gz").write_bytes(np.random.default_rng(0).bytes(4000))
    results = SHIPPED / "Dataset410_Aniso" / FULL
    request = ("infer", "-m", results, "-i", scans, "-o", out, "-d", "cpu", "--no-tta", "--threads", "1")
    assert run_segkit(*request, "--backend", "torch") == 1
    shown = capsys.readouterr().err
    assert [f"{name}: failed: " in shown for name in ("cut", "noise")] == [True, True]
    for name in ("thick", "thick2"):
        expected = nib.load(results.parent / "expected_notta" / f"{name}.nii.gz")
        mask = nib.load(out / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(expected.dataobj))
        np.testing.assert_allclose(mask.affine, expected.affine, atol=1e-6)
    facts = json.loads((out / "manifest.json").read_text())
    assert (facts["summary"]["failed"], facts["model"]["tta"]) == (2, False)


@pytest.mark.parametrize(("suffix", "backend"), [(".mha", "onnxruntime"), (".nrrd", "openvino")])
def test_other_formats_give_the_same_mask(tmp_path: Path, suffix: str, backend: str) -> None:
    data = SHIPPED / "Dataset409_Transposed"
    SimpleITK.WriteImage(
        SimpleITK.ReadImage(str(data / "inputs" / "mixed_0000.nii.gz")), str(tmp_path / f"mixed{suffix}"), True
    )
    predictor = Predictor.load(data / FULL, "cpu", backend, threads=1, uses_tta=False)
    mask = predictor(tmp_path / f"mixed{suffix}").labels
    np.testing.assert_array_equal(mask, read_labels(data / "expected_notta" / "mixed.nii.gz")[0])


def test_an_export_gives_the_same_masks(tmp_path: Path) -> None:
    results = SHIPPED / "Dataset404_TwoFolds" / FULL
    assert run_segkit("export", "-m", results, "-o", tmp_path / "export") == 0
    predictor = Predictor.load(tmp_path / "export", "cpu", "onnxruntime", threads=1)
    assert isinstance(predictor, NnUnetPredictor)
    assert (len(predictor.members), predictor.uses_tta) == (2, True)
    mask = predictor.ensemble([replace(member, uses_tta=False) for member in predictor.members])(
        results.parent / "inputs" / "iso_0000.nii.gz"
    ).labels
    np.testing.assert_array_equal(mask, read_labels(results.parent / "expected_notta" / "iso.nii.gz")[0])
    assert run_segkit("export", "-m", results / "fold_0", "-o", tmp_path / "bundle", "--format", "monai-bundle") == 2


def test_a_checkpoint_may_be_named(tmp_path: Path) -> None:
    source, results = SHIPPED / "Dataset404_TwoFolds" / FULL, tmp_path / FULL
    (results / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (results / name).write_bytes((source / name).read_bytes())
    for fold, name in ((0, "final"), (1, "best")):
        content = (source / f"fold_{fold}" / "checkpoint_final.pth").read_bytes()
        (results / "fold_0" / f"checkpoint_{name}.pth").write_bytes(content)
    final, best = (Predictor.load(one) for one in (source / "fold_0", source / "fold_1"))
    assert Predictor.load(results / "fold_0").digests == Predictor.load(results).digests == final.digests
    assert Predictor.load(results / "fold_0" / "checkpoint_best.pth").digests == best.digests


def test_the_number_of_a_file_is_its_channel(tmp_path: Path) -> None:
    predictor = Predictor.load(SHIPPED / "Dataset409_Transposed" / FULL)
    card = predictor.card.model_copy(update={"modalities": ("t1n", "t1c", "t2f")})
    files = {str(number): ImageFile(tmp_path / f"{number}.nii.gz") for number in (2, 0, 1)}
    several = NnUnetPredictor(predictor.backend, card)
    matched = several.match(Case("case", "case", files)).images
    assert {name: file.path.name for name, file in matched.items()} == {
        "t1n": "0.nii.gz",
        "t1c": "1.nii.gz",
        "t2f": "2.nii.gz",
    }


def test_numbered_files_are_the_channels_of_a_case_that_stands_alone(tmp_path: Path) -> None:
    """Without a model, four scans of one kind: scan_0000 to scan_0003."""
    dataset = {**DATASET, "channel_names": {"0": "a", "1": "b"}}
    plans = make_plans(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[False] * 2)
    result = write_result(tmp_path / "result", network=make_network(2), plans=plans, dataset=dataset)
    values = np.random.default_rng(0).uniform(1, 9, (2, 20, 20, 20)).astype(np.float32)
    for channel, image in enumerate(values):
        save_nifti(tmp_path / "scan" / f"scan_000{channel}.nii.gz", image)
    options = FolderOptions(tmp_path / "scan", tmp_path / "out", backend="torch", device="cpu")
    with open_segmentation(options, result, 1, 0, tta=False, postprocessing=True) as folder:
        assert [sorted(plan.case.images) for plan in folder.plan()[0]] == [["a", "b"]]
        mask = folder.task.predictor(tmp_path / "scan").labels
    np.testing.assert_array_equal(mask, Predictor.load(result, uses_tta=False)((values, LPS)).labels)
    assert [case.id for case in find_cases(tmp_path / "scan").cases] == ["scan_0000", "scan_0001"]


@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_a_picture_in_colour_stands_for_its_channels(
    tmp_path: Path, make_flat: Callable[[str], Path], names: str
) -> None:
    predictor = Predictor.load(make_flat("NaturalImage2DIO"))
    card = predictor.card.model_copy(update={"modalities": tuple(names)})
    values = np.arange(6 * 5 * len(names), dtype=np.uint8).reshape(6, 5, -1)
    PIL.Image.fromarray(values).save(tmp_path / "x_0000.png")
    file = ImageFile(tmp_path / "x_0000.png")
    planes = {colour: replace(file, channel=number) for number, colour in enumerate(("red", "green", "blue"))}
    for images in ({"channel_0": file}, *([planes] if names == "RGB" else [])):
        found = NnUnetPredictor(predictor.backend, card).match(Case("x", "x", images)).images
        assert list(found) == list(names)
        for number, plane in enumerate(found.values()):
            np.testing.assert_array_equal(read_volume(plane.path, plane.channel).array, values[..., number])


def test_readers_that_reorient_see_the_same_scan_in_any_orientation() -> None:
    data = SHIPPED / "Dataset409_Transposed"
    predictor = Predictor.load(data / FULL, threads=1, uses_tta=False)
    letters = str.maketrans("IJK", "RAS")
    config = predictor.card.preprocessing
    turned = config.model_copy(update={"orientation": config.orientation.translate(letters)})
    predictor = replace(predictor, card=predictor.card.model_copy(update={"preprocessing": turned}))
    image = nib.load(data / "inputs" / "mixed_0000.nii.gz")
    other = image.slicer[::-1].as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
    assert other.shape != image.shape
    one, two = (predictor(each) for each in (image, other))
    back = nib.Nifti1Image(two.labels, two.affine).as_reoriented(np.array([[2, 1], [0, 1], [1, -1]]))
    np.testing.assert_array_equal(np.asarray(back.dataobj)[::-1], one.labels)


def test_a_cascade_needs_its_previous_stage(tmp_path: Path) -> None:
    card = Predictor.load(SHIPPED / "Dataset409_Transposed" / FULL).card
    assert card.nnunet is not None
    card = card.model_copy(update={"nnunet": card.nnunet.model_copy(update={"previous_stage": "3d_lowres"})})
    lowres, opened = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_lowres", []
    fold = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres" / "fold_0"
    with pytest.raises(RequestError, match=r"needs the masks of 3d_lowres.*expected the folder .*__3d_lowres"):
        nnunet_options(fold, card, opened.append, None)
    lowres.mkdir()
    nnunet_options(fold, card, opened.append, None)
    assert opened == [lowres]


@pytest.mark.parametrize("name", ["Dataset409_Transposed", "Dataset404_TwoFolds"])
def test_with_less_memory_scans_are_resampled_in_slabs_before_windows_become_smaller(name: str) -> None:
    predictor = Predictor.load(SHIPPED / name / FULL, threads=1, uses_tta=False)
    less = predictor.with_smaller_window()
    assert isinstance(less, NnUnetPredictor)
    assert (less.in_slabs, less.window) == (True, predictor.window)
    grid = Grid((400, 400, 300), np.diag([0.5, 0.5, 0.5, 1]))
    shape = predictor.prepared_shape(grid)
    spared = predictor.preparing_bytes(shape, grid) - less.preparing_bytes(shape, grid)
    assert spared > 12 * 424 * 424 * 324 - 13 * 400 * 400 * 300  # the copies of the spline, but not those of a z-score
    scan = next((SHIPPED / name / "inputs").glob("*.nii.gz"))
    np.testing.assert_array_equal(less(scan).labels, predictor(scan).labels)
    while less.window == predictor.window:
        less = less.with_smaller_window()
        assert isinstance(less, NnUnetPredictor)
        assert less.in_slabs


def test_windows_and_weights() -> None:
    predictor = Predictor.load(SHIPPED / "Dataset409_Transposed" / FULL)
    assert predictor.window == (32, 32, 24)
    plan = predictor.plan((57, 32, 20))
    # ceil((57 - 32) / 16) + 1 = 3 windows, 12.5 voxels apart: half to even.
    assert (plan.starts, plan.shape, plan.axis) == (((0, 12, 25), (0,), (0,)), (57, 32, 24), 0)
    weight = nnunet_weight((8, 8))
    assert (weight.dtype, weight[4, 4], weight.min() > 0) == (np.float16, 10, True)
    # One voxel from the centre, with a deviation of one voxel: exp(-1 / 2) of it.
    assert weight[4, 5] == pytest.approx(10 * np.exp(-0.5), rel=1e-3)


def test_sums_are_rounded_to_half_precision() -> None:
    values: Iterator[float] = iter((1.0, 1.001))

    def network(windows: np.ndarray) -> np.ndarray:
        return np.full_like(windows, next(values))

    plan = plan_windows((6,), (4,), 0.5, 0)
    half = type(plan)(plan.shape, plan.window, ((0, 2),), 0, "half")
    image = np.arange(6, dtype=np.float32)[None]
    logits = np.concatenate([slab.logits for slab in predict_slabs(network, image, half)], 1)[0]
    weight = nnunet_weight((4,)).astype(np.float32)
    expected = []
    for place in range(6):
        total = weights = np.float16(0)
        for start, value in ((0, 1.0), (2, 1.001)):
            if start <= place < start + 4:
                share = weight[place - start]
                total = np.float16(np.float32(total) + np.float32(value) * share)
                weights = np.float16(np.float32(weights) + share)
        expected.append(np.float32(np.float16(np.float32(total) / np.float32(weights))))
    np.testing.assert_array_equal(logits, expected)


def test_slices_are_resampled_one_by_one_only_along_one_coarse_axis() -> None:
    config = ResamplingConfig(function="resample_data_or_seg_to_shape")
    assert config.coarse_axis((5.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == 0
    assert config.coarse_axis((1.0, 1.0, 1.0), (1.0, 4.0, 1.0)) == 1
    assert config.coarse_axis((3.0, 1.0, 1.0), (1.0, 1.0, 1.0)) is None  # not more than 3
    assert config.coarse_axis((5.0, 5.0, 1.0), (1.0, 1.0, 1.0)) is None  # two axes are coarse
    assert config.model_copy(update={"force_separate_z": False}).coarse_axis((9.0, 1.0, 1.0), (1, 1, 1)) is None
    assert nnunet_shape((45, 45), (0.9, float(np.float32(0.9))), (1.0, 1.0)) == (40, 40)
    assert nnunet_shape((5, 7), (0.5, 0.5), (1.0, 1.0)) == (2, 4)  # 2.5 and 3.5: half to even


@pytest.mark.parametrize("nearest", [None, 0, 1, 2])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_decoding_of_half_precision_is_that_of_whole_arrays(nearest: int | None, activation: str) -> None:
    """Against interpolation of all voxels in float64, rounded; logits with many ties."""
    old, new, rng = (6, 7, 5), (9, 5, 8), np.random.default_rng(0)
    logits = np.round(rng.normal(size=(3, *old)) * 2, 1).astype(np.float16)
    logits[1] = np.where(rng.random(old) < 0.7, logits[0] + np.float16(0.002), logits[1])
    grid = Grid(new, np.eye(4))
    preparation = Preparation(
        grid,
        reorientation_to(grid, "IJK"),
        ((0, 0, 0), new),
        old,
        (1.0,) * 3,
        nearest_axis=nearest,
        rounds_to_half=True,
    )
    slabs = [Slab(0, z, z + 2, logits[:, z : z + 2].astype(np.float32)) for z in (0, 2, 4)]
    mask = decode(slabs, preparation, activation, (0, 1, 2) if activation == "softmax" else (1, 2, 3))  # type: ignore[arg-type]
    whole = logits.astype(np.float64)
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        place = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
        if axis == nearest:
            place = np.clip(np.floor(before / after * (np.arange(after) + 0.5)), 0, before - 1)
        lower = np.floor(place).astype(int)
        upper = np.minimum(lower + 1, before - 1)
        weight = (place - lower).reshape(-1, *(1,) * (2 - axis))
        whole = whole.take(lower, axis + 1) * (1 - weight) + whole.take(upper, axis + 1) * weight
    rounded = whole.astype(np.float16)
    expected = rounded.argmax(0) if activation == "softmax" else np.zeros(new, int)
    if activation == "sigmoid":
        for position, plane in enumerate(rounded):
            expected[plane > 0] = position + 1
    assert np.count_nonzero(mask != expected) == 0


def test_slices_of_volumes_and_pictures(make_flat: Callable[[str], Path]) -> None:
    volumes, pictures = (Predictor.load(make_flat(reader)) for reader in ("SimpleITKIO", "NaturalImage2DIO"))
    assert (volumes.card.dims, volumes.dims, pictures.dims) == (2, 3, 2)
    rng = np.random.default_rng(0)
    slices = rng.integers(1, 255, (3, 30, 40)).astype(np.float32)  # z, y, x
    of_volume = volumes((slices.transpose(2, 1, 0), np.diag([1.0, 1.0, 5.0, 1.0]))).labels
    assert (of_volume.shape, of_volume.any()) == ((40, 30, 3), True)
    assert volumes.plan((3, 30, 40)).starts[0] == (0, 1, 2)
    # Normalised alone, the first slice of a volume of one slice is the picture.
    first = volumes((slices[:1].transpose(2, 1, 0), np.diag([1.0, 1.0, 5.0, 1.0]))).labels
    np.testing.assert_array_equal(pictures(slices[0]).labels, first[..., 0].T)


@pytest.fixture
def make_flat(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the results folder of a 2d network of random weights, trained on the files of a reader."""

    def write(reader: str) -> Path:
        shape = {"widths": (4, 8), "kernels": ((3, 3), (3, 3)), "strides": ((2, 2),)}
        torch.manual_seed(0)
        network = build_model("plainunet", dims=2, in_channels=1, out_channels=3, **shape)
        plans = make_plans()
        plans["image_reader_writer"] = reader
        plans["configurations"]["2d"] |= {
            **{"UNet_base_num_features": 4, "unet_max_num_features": 8, "patch_size": [32, 32]},
            **{"pool_op_kernel_sizes": [[1, 1], [2, 2]], "conv_kernel_sizes": [[3, 3], [3, 3]]},
            **{"n_conv_per_stage_encoder": [2, 2], "n_conv_per_stage_decoder": [2], "spacing": [1.0, 1.0]},
        }
        options = {"network": network, "plans": plans, "configuration": "2d", "trainer": "nnUNetTrainer"}
        return write_result(tmp_path / reader, inference_allowed_mirroring_axes=(0, 1), **options)

    return write
