"""Scans as paths and as images in memory of every kind give the same mask, bit for bit; errors say what to pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.io.array import LoadImage
from monai.utils.enums import SpaceKeys
from numpy.typing import NDArray

from segkit.errors import DataError
from segkit.inference.predictor import Predictor
from segkit.preparing.resampling import resampled_shape
from segkit.reading.files import read_volume
from segkit.reading.volume import Grid, Volume
from tests.helpers import LPS

pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodec")  # MONAI looks for GPU readers

MakeRun = Callable[..., Path]
SHAPE = (15, 12, 11)  # at 0.9 mm the first axis is 13.5 mm long: a tie, where rounding of the affine shows
BRATS = ("t1n", "t1c", "t2w", "t2f")
USERS_NAMES = {"t1n": "t1", "t1c": "T1Gd", "t2w": "T2", "t2f": "flair"}


def diagonal() -> NDArray[np.float64]:
    """1 mm, turned by 135 degrees around the first axis: which axis is nearer to which depends on the last digit."""
    affine = np.eye(4)
    affine[1:3, 1:3] = np.array([[-1, -1], [1, -1]]) * np.sqrt(0.5)
    return affine


def oblique() -> NDArray[np.float64]:
    """0.9 x 1.1 x 1.3 mm, turned by 20 degrees around the first axis and 35 degrees around the third."""
    a, b = np.radians([20, 35])
    first = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    third = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = third @ first * [0.9, 1.1, 1.3]
    affine[:3, 3] = [-31.4, 27.1, 11.7]
    return affine


AFFINES = {
    "oblique": oblique(),
    "diagonal": diagonal(),
    "flipped": np.diag([-0.9, -1.1, 1.3, 1.0]),
    "reordered": np.array([[0, 0, -1.3, 9], [0.9, 0, 0, 2], [0, 1.1, 0, 5], [0, 0, 0, 1.0]]),
}


def image(seed: int) -> NDArray[np.float32]:
    """Different in every voxel, so that a wrong axis or direction changes the mask."""
    return np.random.default_rng(seed).uniform(0, 1, SHAPE).astype(np.float32)


Convert = Callable[[Path, NDArray[np.float32], NDArray[np.float64]], Any]
KINDS: dict[str, Convert] = {
    "text": lambda path, array, affine: str(path),
    "volume": lambda path, array, affine: read_volume(path),
    "nibabel file": lambda path, array, affine: nib.load(path),
    "nibabel": lambda path, array, affine: nib.Nifti1Image(array, affine),
    "nifti 2": lambda path, array, affine: nib.Nifti2Image(array, affine),
    "mgh": lambda path, array, affine: nib.MGHImage(array, affine),
    "SimpleITK": lambda path, array, affine: SimpleITK.ReadImage(str(path)),
    "numpy": lambda path, array, affine: (array, affine),
    "float64": lambda path, array, affine: (array.astype(np.float64), affine.tolist()),
    "one channel": lambda path, array, affine: (array[None], affine),
    "torch": lambda path, array, affine: (torch.from_numpy(array).requires_grad_(), torch.from_numpy(affine)),
    "MetaTensor": lambda path, array, affine: MetaTensor(torch.from_numpy(array)[None], torch.from_numpy(affine)),
    "MONAI file": lambda path, array, affine: LoadImage(image_only=True)(path),
    "MONAI in LPS": lambda path, array, affine: MetaTensor(
        torch.from_numpy(array), torch.from_numpy(LPS @ affine), {"space": SpaceKeys.LPS}
    ),
}


@pytest.fixture
def cases(tmp_path: Path, scans: Any) -> Callable[[str, str], dict[str, tuple[Path, NDArray[Any], NDArray[Any]]]]:
    """The files and arrays of four modalities on a grid, by modality."""

    def write(grid: str) -> dict[str, tuple[Path, NDArray[Any], NDArray[Any]]]:
        affine = AFFINES[grid]
        return {
            name: (scans.write(tmp_path / grid / f"{name}.nii.gz", image(seed), affine), image(seed), affine)
            for seed, name in enumerate(BRATS)
        }

    return write  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", AFFINES)
def test_one_modality_from_any_kind(make_run: MakeRun, cases: Any, grid: str, kind: str) -> None:
    predictor = Predictor.load(make_run(modalities=("t1c",), spacing_mm=(1.0, 1.0, 1.0), ct_std=0.4))
    made = cases(grid)["t1c"]
    expected = predictor(made[0])
    prediction = predictor(KINDS[kind](*made))
    assert len(np.unique(expected.labels)) >= 3
    assert np.array_equal(prediction.labels, expected.labels)
    np.testing.assert_allclose(prediction.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", ["oblique", "flipped", "reordered"])
def test_four_modalities_from_any_kind(make_run: MakeRun, cases: Any, grid: str, kind: str) -> None:
    predictor = Predictor.load(make_run(modalities=BRATS, spacing_mm=(1.0, 1.0, 1.0)))
    made = cases(grid)
    expected = predictor({name: path for name, (path, _, _) in made.items()})
    assert len(np.unique(expected.labels)) >= 3
    given = {USERS_NAMES[name]: KINDS[kind](*made[name]) for name in reversed(BRATS)}
    assert np.array_equal(predictor(given).labels, expected.labels)


@pytest.mark.parametrize("grid", AFFINES)
def test_mixed_kinds(make_run: MakeRun, cases: Any, grid: str) -> None:
    predictor = Predictor.load(make_run(modalities=BRATS, spacing_mm=(1.0, 1.0, 1.0)))
    made = cases(grid)
    expected = predictor({name: path for name, (path, _, _) in made.items()})
    given = {
        "t1": KINDS["SimpleITK"](*made["t1n"]),
        "t1ce": made["t1c"][0],
        "t2": made["t2w"][1],
        "FLAIR": KINDS["MetaTensor"](*made["t2f"]),
    }
    assert np.array_equal(predictor(given, affine=AFFINES[grid]).labels, expected.labels)


def test_array_with_affine_argument(make_run: MakeRun, scans: Any) -> None:
    predictor = Predictor.load(make_run())
    prediction = predictor(scans.stairs(), affine=LPS, with_probabilities=True)
    assert np.array_equal(prediction.labels, scans.labels())
    assert np.array_equal(prediction.affine, LPS)
    assert prediction.probabilities is not None
    half_precision = torch.from_numpy(scans.stairs()).bfloat16()
    assert np.array_equal(predictor(half_precision, affine=LPS).labels, scans.labels())


def test_rounding_of_the_affine_does_not_change_the_shape() -> None:
    # 15 voxels of 0.9 mm are 13.5 mm, and 13.4999996 mm once 0.9 is rounded to float32.
    spacings = 0.9, float(np.float32(0.9)), 0.9 * (1 + 1e-7)
    assert {resampled_shape((15,), (spacing,), (1.0,)) for spacing in spacings} == {(14,)}


def test_scaled_integers_of_a_file_in_nibabel(make_run: MakeRun, tmp_path: Path) -> None:
    """The stored numbers are scaled in float32, as in a file that is read here."""
    predictor = Predictor.load(make_run(ct_std=0.4), uses_postprocessing=False)
    written = nib.Nifti1Image(image(0).astype(np.float64), AFFINES["flipped"])
    written.set_data_dtype(np.int16)
    nib.save(written, tmp_path / "t1c.nii.gz")
    loaded = nib.load(tmp_path / "t1c.nii.gz")
    assert loaded.dataobj.slope != 1
    path, memory = (
        predictor(scan, with_probabilities=True).probabilities for scan in (tmp_path / "t1c.nii.gz", loaded)
    )
    assert path is not None
    assert np.array_equal(path, memory)  # type: ignore[arg-type]


def test_channels_without_names_are_taken_in_order_unless_they_are_brats(make_run: MakeRun, scans: Any) -> None:
    predictor = Predictor.load(make_run(modalities=("PET", "CT")))
    halves = np.stack([scans.stairs() / 2] * 2)
    assert np.array_equal(predictor((halves, LPS)).labels, scans.labels())
    assert np.array_equal(predictor(nib.Nifti1Image(np.moveaxis(halves, 0, -1), LPS)).labels, scans.labels())
    vectors = SimpleITK.GetImageFromArray(np.ascontiguousarray(np.moveaxis(halves, 0, -1).transpose(2, 1, 0, 3)), True)
    assert np.array_equal(predictor(vectors).labels, scans.labels())
    with pytest.raises(DataError, match=r"2 channels without names were given; expected t1c, t2f. .*'t2f': scan\[1\]"):
        Predictor.load(make_run("two", modalities=("t1c", "t2f")))((halves, LPS))
    with pytest.raises(DataError, match=r"2 channels without names were given; expected t1c. .*such as scan\[0\]"):
        Predictor.load(make_run("one"))((halves, LPS))
    with pytest.raises(DataError, match="PET: holds 2 channels; expected one"):
        predictor({"PET": (halves, LPS), "CT": (halves, LPS)})


def test_pictures(make_run: MakeRun, scans: Any, tmp_path: Path) -> None:
    shape = (6, 5)
    predictor = Predictor.load(make_run(dims=2, modalities=("0",)))
    values = scans.stairs(shape).astype(np.uint8)
    expected = scans.labels(shape)
    picture = SimpleITK.GetImageFromArray(values)
    for scan in (values, torch.from_numpy(values)[None], picture, MetaTensor(torch.from_numpy(values)[None])):
        prediction = predictor(scan)
        assert np.array_equal(prediction.labels, expected)
        assert np.array_equal(SimpleITK.GetArrayFromImage(prediction.to_sitk()), expected)
    saved = predictor(values).save(tmp_path / "mask")
    assert saved == tmp_path / "mask.png"
    assert np.array_equal(read_volume(saved).array, expected)
    with pytest.raises(DataError, match="masks of pictures have no affine"):
        predictor(values).to_nibabel()
    with pytest.raises(DataError, match=r"3 channels without names were given; expected 0"):
        predictor(np.zeros((3, 6, 5)))
    with pytest.raises(DataError, match="is a volume; expected a picture"):
        predictor(nib.Nifti1Image(scans.stairs(), LPS))


@pytest.mark.parametrize("suffix", ["", ".nii.gz", ".nii", ".mgz", ".nrrd", ".mha"])
def test_saved_masks_lie_on_the_grid_of_the_scan(make_run: MakeRun, cases: Any, tmp_path: Path, suffix: str) -> None:
    predictor = Predictor.load(make_run())
    prediction = predictor(cases("oblique")["t1c"][0])
    saved = prediction.save(tmp_path / "new" / f"mask{suffix}")
    assert saved.name == f"mask{suffix or '.nii.gz'}"
    mask = read_volume(saved)
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, prediction.labels)
    np.testing.assert_allclose(mask.grid.affine, prediction.affine, atol=1e-4)


def test_saved_masks_have_the_header_of_the_scan(make_run: MakeRun, cases: Any, tmp_path: Path) -> None:
    predictor = Predictor.load(make_run())
    path, *_ = cases("oblique")["t1c"]  # sform code 4, qform code 1
    prediction = predictor(nib.load(path))
    saved = nib.load(prediction.save(tmp_path / "mask.nii.gz"))
    assert (int(saved.header["sform_code"]), int(saved.header["qform_code"])) == (4, 1)
    assert saved.get_data_dtype() == np.uint8
    assert np.array_equal(saved.affine, nib.load(path).affine)
    converted = prediction.to_nibabel()
    assert converted.header.binaryblock == saved.header.binaryblock
    assert np.array_equal(np.asarray(converted.dataobj), prediction.labels)
    assert np.array_equal(converted.affine, saved.affine)
    with pytest.raises(DataError, match="is a folder; expected the name of a file"):
        prediction.save(tmp_path)
    with pytest.raises(DataError, match=r"3D images are not written as '\.png'"):
        prediction.save(tmp_path / "mask.png")


@pytest.mark.parametrize("grid", AFFINES)
def test_simpleitk_masks_lie_on_the_scan(make_run: MakeRun, cases: Any, grid: str) -> None:
    scan = KINDS["SimpleITK"](*cases(grid)["t1c"])
    prediction = Predictor.load(make_run())(scan)
    mask = prediction.to_sitk()
    assert mask.GetPixelID() == SimpleITK.sitkUInt8
    assert mask.GetSize() == scan.GetSize()
    for ours, theirs in (
        (mask.GetOrigin(), scan.GetOrigin()),
        (mask.GetSpacing(), scan.GetSpacing()),
        (mask.GetDirection(), scan.GetDirection()),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(SimpleITK.GetArrayFromImage(mask), prediction.labels.T)


def test_sheared_grids_have_no_simpleitk_image(make_run: MakeRun, scans: Any) -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    prediction = Predictor.load(make_run())(scans.stairs(), affine=sheared)
    with pytest.raises(DataError, match="its axes are not at right angles"):
        prediction.to_sitk()


LAZY = MetaTensor(torch.zeros(1, 6, 5, 4))
LAZY.push_pending_operation({"affine": np.eye(4)})
SINGULAR = np.diag([1.0, 0, 1, 1])


@pytest.mark.parametrize(
    ("scan", "affine", "message"),
    [
        (np.zeros((6, 5, 4)), None, r"the scan: is an array without an affine; expected .*\(4, 4\).* Pass affine="),
        (torch.zeros(6, 5, 4), None, r"is an array without an affine"),
        ({"t1c": np.zeros((6, 5, 4))}, None, "t1c: is an array without an affine"),
        (np.zeros((6, 5)), LPS, r"is an array of 2 axes \(6 x 5\); expected a volume, \(D, H, W\) or \(C, D, H, W\)"),
        (np.zeros((1, 1, 6, 5, 4)), LPS, "is an array of 5 axes"),
        (np.zeros((6, 0, 4)), LPS, r"is an array of 3 axes \(6 x 0 x 4\)"),
        (MetaTensor(torch.zeros(6, 5)), None, "is an array of 2 axes"),
        (SimpleITK.Image(6, 5, SimpleITK.sitkFloat32), None, "is an array of 2 axes"),
        (np.zeros((6, 5, 4)), np.eye(3), "has an affine that cannot be used"),
        (np.zeros((6, 5, 4)), "RAS", "has an affine that cannot be used"),
        (np.zeros((6, 5, 4)), SINGULAR, "has an affine that cannot be used"),
        ((np.zeros((6, 5, 4)), LPS * np.nan), None, "has an affine that cannot be used"),
        (nib.Nifti1Image(np.zeros((6, 5, 4)), LPS), LPS, "`affine` was passed without an array"),
        ("scan.nii.gz", LPS, "`affine` was passed without an array"),
        (np.full((6, 5, 4), np.inf), LPS, "the scan: 120 voxels are NaN or infinite"),
        (np.zeros((6, 5, 4), complex), LPS, "voxels are of the type complex128"),
        (np.full((6, 5, 4), "a"), LPS, "voxels are of the type <U1"),
        (torch.zeros(6, 5, 4).to_sparse(), LPS, "its voxels cannot be read"),
        (Volume(np.zeros((6, 5, 4)), Grid((5, 6, 4), LPS)), None, "its array has the shape"),
        (LAZY, None, "has transforms that were not applied yet"),
        (nib.Nifti1Image(np.zeros((6, 5, 4, 2, 2)), LPS), None, "is an image of 5 axes"),
        (SimpleITK.Image([6, 5, 4, 2], SimpleITK.sitkVectorFloat32), None, "is an image of 4 axes with 4 values"),
        (None, None, "cannot be read from an object of type NoneType; expected a path, a nibabel"),
        ([Path("a.nii.gz")], None, "cannot be read from an object of type list; .* a dict of images by modality name"),
        ({"t1c": 3}, None, "t1c: cannot be read from an object of type int"),
        (nib.GiftiImage(), None, "cannot be read from an object of type GiftiImage"),
        ({}, None, r"modality t1c is missing \(found: no image\)"),
        ({"flair": np.zeros((6, 5, 4))}, LPS, r"modality t1c is missing \(found: flair\)"),
        ({0: np.zeros((6, 5, 4))}, LPS, "the key 0 is not the name of a modality; expected t1c as keys"),
    ],
)
def test_errors(make_run: MakeRun, scan: Any, affine: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Predictor.load(make_run())(scan, affine=affine)


def test_errors_of_several_modalities(make_run: MakeRun, scans: Any) -> None:
    predictor = Predictor.load(make_run(modalities=("t1c", "t2f")))
    half = scans.stairs() / 2
    with pytest.raises(
        DataError, match=r"modality t2f is missing \(found: t1ce, flare\).* Nearest names: 'fla\w+' for"
    ):
        predictor({"t1ce": half, "flare": half}, affine=LPS)
    with pytest.raises(DataError, match=r"modalities t1c, t2f are missing \(found: PET\)"):
        predictor({"PET": half}, affine=LPS)
    with pytest.raises(DataError, match="'t1ce' and 'T1Gd' name the same modality"):
        predictor({"t1ce": half, "T1Gd": half, "flair": half}, affine=LPS)
    with pytest.raises(DataError, match=r"one volume was given; expected t1c, t2f. Pass them by name: \{'t1c': \.\.\."):
        predictor(half, affine=LPS)
    with pytest.raises(DataError, match=r"flair: does not lie on the grid of t1c: .* 6 x 5 x 4 .* 5 x 5 x 4"):
        predictor({"t1c": half, "flair": half[1:]}, affine=LPS)
    with pytest.raises(DataError, match=r"flair: does not lie on the grid of t1c: .* oriented"):
        predictor({"t1c": half, "flair": (half, np.eye(4))}, affine=LPS)


def test_paths_need_no_torch_and_no_simpleitk(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from segkit.inference.scans import read_scan\n"
        "from segkit.reading.files import write_image\n"
        "from segkit.reading.volume import Grid\n"
        f"path = Path({str(tmp_path)!r}, 'scan.nii.gz')\n"
        "array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)\n"
        "write_image(path, array, Grid((3, 4, 5), np.eye(4)))\n"
        "for scan in (path, {'t1c': path}, (array, np.eye(4))):\n"
        "    assert read_scan(scan, None, ('t1c',), 3).image.shape == (1, 3, 4, 5)\n"
        "print(sorted({'torch', 'monai', 'SimpleITK'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
