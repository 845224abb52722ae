"""Writing phantoms in the names, folders, labels, orientations and documents of published data sets.

Case n of a seed is the same patient in every convention: reoriented to RAS its arrays are equal, voxel for voxel.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from segkit.errors import DataError, Problem, RequestError
from segkit.labels import SCHEMES, translate
from segkit.phantoms.phantom import PHANTOM_SCHEME, Phantom, make_phantom
from segkit.preparing.holes import ChallengeRules, brain_mask, challenge_hole, tumour_components, unhealthy_region
from segkit.reading.files import write_image, write_labels
from segkit.reading.geometry import Reorientation, reorientation_to, reoriented_grid
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray, LabelMap

_log = logging.getLogger(__name__)

STRAY_VALUE = 7
"""A label value that no scheme has."""

_LICENCE = "CC0-1.0"
_HOLE_STREAM = 4
"""The stream of random numbers for the hole of a case; 0 to 3 make the phantom itself."""
_DONORS = range(1, 9)
"""The cases whose tumours give the shapes of all holes; fixed, so that a case does not depend on the others written."""

Document = str | dict[str, object]
"""The text of a file, or its content as JSON."""


@dataclass(frozen=True)
class PhantomLayout:
    """How a data set names, orients and describes its files.

    The template `case` has the field {number}; `image` and `label` have {case}, {grade} (HGG or LGG) and, for images,
    {suffix}. The order of `suffixes` is the channel order. An image template without {suffix} is one 4D file with the
    channels on its last axis.
    """

    scheme: str
    orientation: str
    case: str
    image: str
    label: str
    suffixes: Mapping[str, str]
    origin: Literal["atlas", "corner", "centre"]
    """The world origin. atlas: as SRI24 in BraTS, whose first voxel in LPS order has x 0 and y 239; corner:
    the first voxel along x and z and the last along y; centre: the middle of the volume."""
    documents: Callable[[Sequence[str]], dict[str, Document]] = lambda _: {}
    odd_labels: Mapping[int, str] = field(default_factory=dict)
    """Label files that break the rule, by case number."""
    resection_probability: float = 0.0

    def place(self, shape: tuple[int, ...]) -> tuple[Reorientation, Grid]:
        """The reorientation of arrays of a shape in RAS order to that of the files, and the grid of the files."""
        last = np.array(shape) - 1.0
        first_voxel_mm = {"atlas": (-last[0], 0, 0), "corner": (0, -last[1], 0), "centre": tuple(-last / 2)}
        affine = np.eye(4)
        affine[:3, 3] = first_voxel_mm[self.origin]
        upright = Grid(shape, affine)
        turn = reorientation_to(upright, self.orientation)
        return turn, reoriented_grid(upright, turn)


def _msd_documents(cases: Sequence[str]) -> dict[str, Document]:
    return {
        "dataset.json": {
            "name": "BRATS",
            "description": "Gliomas segmentation in phantoms: oedema, necrotic core and enhancing tumour",
            "reference": "segkit phantom",
            "licence": _LICENCE,
            "tensorImageSize": "4D",
            "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
            "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
            "numTraining": len(cases),
            "numTest": 0,
            "training": [{name: f"./{name}sTr/{case}.nii.gz" for name in ("image", "label")} for case in cases],
            "test": [],
        }
    }


def _nnunet_documents(cases: Sequence[str]) -> dict[str, Document]:
    return {
        "dataset.json": {
            "channel_names": {"0": "FLAIR", "1": "T1", "2": "T1ce", "3": "T2"},
            "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
            "regions_class_order": [1, 2, 3],
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
            "name": "Dataset137_Phantom",
            "licence": _LICENCE,
        }
    }


def _bids_documents(cases: Sequence[str]) -> dict[str, Document]:
    raw: dict[str, object] = {"Name": "Phantoms", "BIDSVersion": "1.9.0", "DatasetType": "raw", "License": _LICENCE}
    made_by = [{"Name": "segkit phantom", "Description": "the tissues that the images were made from"}]
    derived = {**raw, "Name": "Reference segmentations", "DatasetType": "derivative", "GeneratedBy": made_by}
    classes = (("NCR", "necrotic tumor core"), ("ED", "peritumoral edema"), ("ET", "enhancing tumor"))
    values = SCHEMES["brats2023"].values
    lookup = "".join(f"{values[short]}\t{name}\t{short}\n" for short, name in classes)
    return {
        "dataset_description.json": raw,
        "participants.tsv": "participant_id\n" + "".join(f"{case}\n" for case in cases),
        "derivatives/reference/dataset_description.json": derived,
        "derivatives/reference/dseg.tsv": "index\tname\tabbreviation\n" + lookup,
    }


_BRATS_2021 = PhantomLayout(
    scheme="brats2017",
    orientation="LPS",
    case="BraTS2021_{number:05d}",
    image="{case}/{case}_{suffix}.nii.gz",
    label="{case}/{case}_seg.nii.gz",
    suffixes={"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"},
    origin="atlas",
)
_BRATS_2023 = PhantomLayout(
    scheme="brats2023",
    orientation="LPS",
    case="BraTS-GLI-{number:05d}-000",
    image="{case}/{case}-{suffix}.nii.gz",
    label="{case}/{case}-seg.nii.gz",
    suffixes={"t1n": "t1n", "t1c": "t1c", "t2w": "t2w", "t2f": "t2f"},
    origin="atlas",
)

PHANTOM_LAYOUTS: dict[str, PhantomLayout] = {
    "brats2018": replace(
        _BRATS_2021,
        case="Brats18_PHANTOM_{number:03d}_1",
        image="{grade}/{case}/{case}_{suffix}.nii.gz",
        label="{grade}/{case}/{case}_seg.nii.gz",
    ),
    "brats2020": replace(
        _BRATS_2021,
        case="BraTS20_Training_{number:03d}",
        image="{case}/{case}_{suffix}.nii",
        label="{case}/{case}_seg.nii",
        odd_labels={355: "{case}/W39_1998.09.19_Segm.nii"},  # as published; many loaders fail on it
    ),
    "brats2021": _BRATS_2021,
    "brats2023": _BRATS_2023,
    "brats2024": replace(
        _BRATS_2023,
        scheme="brats2024",
        orientation="LAS",  # of the MNI152 template
        case="BraTS-GLI-{number:05d}-100",
        origin="centre",
        resection_probability=0.6,
    ),
    "msd": PhantomLayout(
        scheme="msd-brats",
        orientation="RAS",
        case="BRATS_{number:03d}",
        image="imagesTr/{case}.nii.gz",
        label="labelsTr/{case}.nii.gz",
        suffixes={"t2f": "FLAIR", "t1n": "T1w", "t1c": "T1gd", "t2w": "T2w"},
        origin="corner",
        documents=_msd_documents,
    ),
    "nnunet": PhantomLayout(
        scheme="msd-brats",
        orientation="RAS",
        case="PHANTOM_{number:03d}",
        image="imagesTr/{case}_{suffix}.nii.gz",
        label="labelsTr/{case}.nii.gz",
        suffixes={"t2f": "0000", "t1n": "0001", "t1c": "0002", "t2w": "0003"},
        origin="centre",
        documents=_nnunet_documents,
    ),
    "bids": PhantomLayout(
        scheme="brats2023",
        orientation="ASL",  # sagittal slices, as most 3D T1-weighted scans are acquired
        case="sub-{number:04d}",
        image="{case}/anat/{case}_{suffix}.nii.gz",
        label="derivatives/reference/{case}/anat/{case}_dseg.nii.gz",
        suffixes={"t1n": "T1w", "t1c": "ce-gadolinium_T1w", "t2w": "T2w", "t2f": "FLAIR"},
        origin="centre",
        documents=_bids_documents,
    ),
}
"""Every convention that phantoms can be written in, by the name that `segkit phantom --convention` takes."""


@dataclass(frozen=True)
class WrittenPhantom:
    """The files of one case; `images` maps each sequence to its file, the same one for all if it is 4D."""

    case: str
    number: int
    images: Mapping[str, Path]
    label: Path


@dataclass
class _Session:
    """A phantom in the orientation and label values of a convention; the T2 has a grid of its own for a flaw."""

    images: dict[str, AnyArray]
    labels: LabelMap
    grid: Grid
    t2w_grid: Grid


def write_phantoms(
    root: Path, numbers: Sequence[int], *, convention: str = "brats2021", size: int = 64, seed: int = 0
) -> list[WrittenPhantom]:
    """Write the cases `numbers` of a seed below `root`, with the documents of the data set.

    Raises RequestError where the convention is unknown, `root` is not empty or the size is too small, DataError where
    the disk is full or `root` cannot be written to.
    """
    return _write_all(root, convention, numbers, size, seed, flaws={})


def write_phantoms_with_problems(
    root: Path, numbers: Sequence[int], *, convention: str = "brats2021", size: int = 64, seed: int = 0
) -> tuple[list[WrittenPhantom], list[Problem]]:
    """As `write_phantoms`, but four cases, drawn by the seed, get one problem each.

    - missing modality: there is no contrast-enhanced T1 (a 4D file has three channels instead of four);
    - flipped affine: the header of the T2 (of the image, if it is 4D) exchanges left and right, its voxels do not;
    - truncated file: the FLAIR (or the 4D image) ends half-way;
    - stray label: some voxels of the reference are `STRAY_VALUE`.

    Returns the written cases and the four problems. Raises RequestError for fewer than four cases, and as
    `write_phantoms` does.
    """
    if len(numbers) < 4:
        raise RequestError(f"{len(numbers)} cases cannot hold four problems", expected="4 cases or more")
    chosen = np.random.default_rng((seed, len(numbers))).permutation(len(numbers))[:4].tolist()
    flaws = dict(zip(chosen, (_remove_t1c, _flip_affine, _add_stray_label), strict=False))
    written = _write_all(root, convention, numbers, size, seed, flaws)
    bare, flipped, stray, truncated = (written[place] for place in chosen)
    content = truncated.images["t2f"].read_bytes()
    truncated.images["t2f"].write_bytes(content[: len(content) // 2])
    return written, [
        Problem(bare.case, "missing modality: there is no t1c"),
        Problem(str(flipped.images["t2w"]), "flipped affine: the header exchanges left and right"),
        Problem(str(truncated.images["t2f"]), "truncated file: it ends half-way"),
        Problem(str(stray.label), f"stray label: some voxels are {STRAY_VALUE}"),
    ]


def write_inpainting_phantoms(
    root: Path, numbers: Sequence[int], *, size: int = 64, seed: int = 0, rules: ChallengeRules | None = None
) -> list[WrittenPhantom]:
    """Write the cases `numbers` of a seed as in the training folders of the BraTS local-synthesis challenge.

    A case has the five files of the challenge, `images` by their endings, of which `label` is the mask, and no
    segmentation. Its healthy hole, made by the procedure of the challenge, has the shape of the tumour of one of the
    first eight cases of the seed, written or not. `rules` are the limits of the procedure. Phantoms show a whole head
    in few voxels, so by default the margin and the smallest tumour shrink with the size: 5 voxels of 240 are 1.3 of 64.
    Raises as `write_phantoms` does, and DataError where a case has no room for a hole.
    """
    require_empty(root)
    layout = PHANTOM_LAYOUTS["brats2023"]  # the year of the first such challenge
    rules = rules or ChallengeRules().scaled_to(size)
    pool = [
        shape
        for donor in (make_phantom(number, size=size, seed=seed) for number in _DONORS)
        for shape in tumour_components(donor.labels > 0, brain_mask(donor.images["t1n"]), rules)
    ]
    written = []
    for number in numbers:
        phantom = make_phantom(number, size=size, seed=seed)
        image, tumour = phantom.images["t1n"], phantom.labels > 0
        generator = np.random.default_rng((seed, number, _HOLE_STREAM))
        healthy = challenge_hole(brain_mask(image), tumour, pool, generator, rules)
        unhealthy = unhealthy_region(tumour, rules)
        hole = healthy | unhealthy
        images = {"t1n": image, "t1n-voided": np.where(hole, 0, image).astype(image.dtype)}
        masks = {"mask": hole, "mask-healthy": healthy, "mask-unhealthy": unhealthy}
        turn, grid = layout.place(phantom.shape)
        case = layout.case.format(number=number)
        files = {ending: root / case / f"{case}-{ending}.nii.gz" for ending in (*images, *masks)}
        for ending, array in images.items():
            write_image(files[ending], turn.apply(array), grid)
        for ending, mask in masks.items():
            write_labels(files[ending], turn.apply(mask).astype(np.uint8), grid)
        written.append(WrittenPhantom(case, number, files, files["mask"]))
        _log.info("wrote phantom %s, %d of %d", case, len(written), len(numbers))
    return written


def require_empty(root: Path) -> None:
    """Raise a RequestError unless `root` is new or an empty folder."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RequestError("this folder is not empty", where=root, remedy="Name a new or an empty folder")


def _write_all(
    root: Path,
    convention: str,
    numbers: Sequence[int],
    size: int,
    seed: int,
    flaws: Mapping[int, Callable[[_Session], None]],
) -> list[WrittenPhantom]:
    """Write the cases and the documents; `flaws` changes the cases at some places of `numbers`."""
    layout = PHANTOM_LAYOUTS.get(convention)
    if layout is None:
        raise RequestError(f"convention {convention!r} is not known", expected="one of " + ", ".join(PHANTOM_LAYOUTS))
    require_empty(root)
    written = []
    for place, number in enumerate(numbers):
        phantom = make_phantom(number, size=size, seed=seed, resection_probability=layout.resection_probability)
        turn, grid = layout.place(phantom.shape)
        images = {modality: turn.apply(phantom.images[modality]) for modality in layout.suffixes}
        labels = turn.apply(translate(phantom.labels, PHANTOM_SCHEME, SCHEMES[layout.scheme]))
        session = _Session(images, labels, grid, grid)
        if place in flaws:
            flaws[place](session)
        written.append(_write(root, layout, phantom, session))
        _log.info("wrote phantom %s, %d of %d", written[-1].case, len(written), len(numbers))
    for name, document in layout.documents([phantom.case for phantom in written]).items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = document if isinstance(document, str) else json.dumps(document, indent=2) + "\n"
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"the file cannot be written: {error.strerror}", where=path) from error
    return written


def _write(root: Path, layout: PhantomLayout, phantom: Phantom, session: _Session) -> WrittenPhantom:
    case = layout.case.format(number=phantom.number)
    words = {"case": case, "grade": "LGG" if phantom.is_low_grade else "HGG"}
    paths = {m: root / layout.image.format(suffix=layout.suffixes[m], **words) for m in session.images}
    label = root / layout.odd_labels.get(phantom.number, layout.label).format(**words)
    if "{suffix}" not in layout.image:
        write_image(next(iter(paths.values())), np.stack(list(session.images.values()), axis=-1), session.t2w_grid)
    else:
        for modality, array in session.images.items():
            write_image(paths[modality], array, session.t2w_grid if modality == "t2w" else session.grid)
    write_labels(label, session.labels, session.grid)
    return WrittenPhantom(case, phantom.number, paths, label)


def _remove_t1c(session: _Session) -> None:
    del session.images["t1c"]


def _flip_affine(session: _Session) -> None:
    session.t2w_grid = replace(session.grid, affine=np.diag([-1.0, 1.0, 1.0, 1.0]) @ session.grid.affine)


def _add_stray_label(session: _Session) -> None:
    labels = session.labels.copy()
    labels[tuple(np.argwhere(labels == labels.max())[:5].T)] = STRAY_VALUE
    session.labels = labels
