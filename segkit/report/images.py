"""Images of the cases of a page: their files, their arrays, and the planes and colours in which they are shown.

Scans are searched in the folder that the user names, else in those of the documents (`data` of a manifest, `references`
of scores.json, `data` of split.json; relative to the document) that are on this machine.
"""

import glob
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import DataError, as_request
from segkit.evaluation.pairing import declared_schemes, match_files
from segkit.labels import SCHEMES, LabelScheme, outputs_of, scheme_from_json, translate, without_ignored
from segkit.metrics.overlap import box_of
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_reference, read_volume
from segkit.reading.geometry import onto_grid, reorientation_to, reoriented_grid, same_grid
from segkit.reading.layouts.layout import list_images
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from segkit.report.sources import Findings, mapping
from segkit.shapes import AnyArray, LabelMap

COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
"""Okabe & Ito's palette, distinct in every common colour blindness; reordered for contrast on grey."""

MASK_OPACITY = 0.55

_BACKGROUNDS = ("t2f", "t1c", "t2w", "t1n", "green")
"""The whole tumour shows best on FLAIR, and of colour pictures the green channel has the most contrast."""

_NO_MASKS = ("uncertainty", "probabilities", "classes", "figures")
"""Folders of an output folder that hold no masks."""


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case; `modality` names the image, `predicted_in` the label scheme of the prediction."""

    modality: str
    image: ImageFile
    reference: ImageFile | None = None
    prediction: Path | None = None
    uncertainty: Path | None = None
    predicted_in: LabelScheme | None = None


@dataclass(frozen=True)
class CaseArrays:
    """The arrays of one case on one grid, label maps in one scheme; None where the case lacks one."""

    modality: str
    grid: Grid
    image: AnyArray
    prediction: LabelMap | None = None
    reference: LabelMap | None = None
    uncertainty: AnyArray | None = None

    @property
    def masks(self) -> dict[str, LabelMap]:
        """The label maps of the case by name: "prediction" and "reference"."""
        return {name: mask for name in ("prediction", "reference") if (mask := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Gallery:
    """Files by case id, the label scheme to show them in, and notes on files that were not found."""

    files: Mapping[str, CaseFiles] = field(default_factory=dict)
    scheme: LabelScheme | None = None
    notes: tuple[str, ...] = ()

    def colours(self) -> dict[int, tuple[str, str]]:
        """Label value -> name and colour."""
        return label_colours(self.scheme)


def find_gallery(findings: Findings, ids: Collection[str], data: Path | None) -> Gallery:
    """The images of the cases with these ids, in `data` or in the folders that the documents name.

    Raises:
        RequestError: `data` was named and holds no images.
    """
    scheme = _label_scheme(findings)
    if not ids or not (findings.outputs or findings.evaluations):
        return Gallery(scheme=scheme)
    named = [*_named_folders(findings, "data"), *_named_folders(findings, "references")]
    named += [folder for run in findings.runs for folder in run.data if folder.is_dir()]
    cases: list[Case] = []
    for folder in dict.fromkeys(named) if data is None else [data]:
        try:
            cohort = find_cases(folder)
        except DataError as error:
            if data is not None:
                raise as_request(error) from error
            continue
        cases = [case for case in cohort.cases if case.id in ids and case.images]
        if cases:
            scheme = cohort.scheme or scheme
            break
    files = dict(_with_masks(cases, findings))
    note = "The masks were not found; name their folder beside that of the evaluation."
    if not cases:
        note = "The images of these cases were not found; name their folder with --data."
    return Gallery(files, scheme, () if any(found.prediction for found in files.values()) else (note,))


def load_arrays(files: CaseFiles, scheme: LabelScheme | None) -> CaseArrays:
    """Read the files of one case, label maps in the values of `scheme`.

    Raises:
        DataError: a file is unusable, or does not lie on the grid of the image.
    """
    image = read_volume(files.image.path, files.image.channel)
    arrays = {"image": np.nan_to_num(image.array, nan=0.0, posinf=0.0, neginf=0.0)}
    predicted = None if files.prediction is None else ImageFile(files.prediction)
    for name, file in (("prediction", predicted), ("reference", files.reference)):
        if file is not None:
            arrays[name] = _on_image(*read_reference(file), image.grid)
    if predicted is not None and files.predicted_in is not None and scheme is not None:
        arrays["prediction"] = translate(arrays["prediction"], files.predicted_in, scheme)
    if "reference" in arrays:
        arrays["reference"] = without_ignored(arrays["reference"], scheme)
    if files.uncertainty is not None:
        volume = read_volume(files.uncertainty)
        arrays["uncertainty"] = _on_image(volume.array, volume.grid, image.grid)
    return CaseArrays(files.modality, image.grid, **arrays)


def _with_masks(cases: list[Case], findings: Findings) -> Iterable[tuple[str, CaseFiles]]:
    masks: dict[str, Path] = {}
    uncertain: dict[str, Path] = {}
    schemes: dict[str, LabelScheme] = {}
    folders = [output.folder for output in findings.outputs] or _named_folders(findings, "predictions")
    for folder in dict.fromkeys(folders):
        listing = list_images(folder)
        listed = [path for path in listing.images if path.relative_to(listing.root).parts[0] not in _NO_MASKS]
        masks |= match_files(cases, listed, folder)[0]
        for case in cases:
            found = sorted((folder / "uncertainty").glob(f"{glob.escape(case.id)}_entropy.*"))
            uncertain |= {case.id: found[0]} if found else {}
    for output in findings.outputs:
        schemes |= declared_schemes(output.manifest)
    for case in cases:
        modality = background_of(case.images)
        own = (case.label, masks.get(case.id), uncertain.get(case.id), schemes.get(case.id))
        yield case.id, CaseFiles(modality, case.images[modality], *own)


def _on_image(array: AnyArray, own: Grid, grid: Grid) -> AnyArray:
    whole = onto_grid(array, own, grid, turns=True)
    if whole is None:
        raise DataError(same_grid(own, grid) or "", where=own.source)
    return whole


def _label_scheme(findings: Findings) -> LabelScheme | None:
    schemes = (scored.document.label_scheme for scored in findings.evaluations)
    documents: list[Mapping[str, object]] = [scheme.model_dump() for scheme in schemes if scheme is not None]
    documents += [mapping(run.card, "label_scheme") for run in findings.runs]
    for document in documents:
        try:
            return scheme_from_json(document)
        except (KeyError, TypeError, ValueError):
            continue
    names = [str(mapping(output.manifest, "model").get("label_scheme")) for output in findings.outputs]
    return next((SCHEMES[name] for name in names if name in SCHEMES), None)


def _named_folders(findings: Findings, key: str) -> list[Path]:
    """The folders that manifests and scores name under `key` and that are on this machine."""
    named = [(output.folder, output.manifest.get(key)) for output in findings.outputs]
    named += [(scored.folder, getattr(scored.document, key, None)) for scored in findings.evaluations]
    folders = [folder / name for folder, name in named if isinstance(name, str)]
    return [folder for folder in folders if folder.is_dir()]


def background_of(modalities: Iterable[str]) -> str:
    """The image to draw masks over."""
    names = list(modalities)
    return next((name for name in _BACKGROUNDS if name in names), names[0])


def label_colours(scheme: LabelScheme | None) -> dict[int, tuple[str, str]]:
    """Label value -> name and colour, the same in every picture; a region has the colour of the tissue it paints.

    Without a scheme a label is named by its value.
    """
    if scheme is None:
        return {value: unnamed_label(value) for value in range(1, 256)}
    painted = [output.label for output in outputs_of(scheme) if output.label]
    names = {value: tissue for tissue, value in scheme.values.items()}
    values = list(dict.fromkeys([*painted, *names]))
    return {value: (names[value], COLOURS[position % len(COLOURS)]) for position, value in enumerate(values)}


def unnamed_label(value: int) -> tuple[str, str]:
    """Name and colour of a label value that no scheme names."""
    return f"label {value}", COLOURS[(value - 1) % len(COLOURS)]


@dataclass(frozen=True)
class View:
    """One plane ready to be shown: rows from top to bottom, columns from left to right.

    `letters` name what lies left, right, top and bottom; empty for pictures without anatomy. `maps` are other arrays of
    the plane, such as the uncertainty.
    """

    title: str
    image: AnyArray
    masks: tuple[LabelMap, ...]
    aspect: float
    letters: tuple[str, str, str, str]
    maps: tuple[AnyArray, ...] = ()


def views_of(image: AnyArray, masks: Sequence[LabelMap], grid: Grid, maps: Sequence[AnyArray] = ()) -> list[View]:
    """The planes in which a case is shown: axial, coronal and sagittal of a volume, or the whole of a picture.

    Each plane is the one that shows most of all structures of the masks, cropped to the content of the image, in
    radiological orientation; planes of one row or column of voxels are left out, if others remain. Image, masks and
    maps (which do not influence the choice) are (D, H, W) or (H, W) on `grid`.
    """
    if grid.dims == 2:
        rows_mm, columns_mm = grid.spacing_mm
        return [View("", image, tuple(masks), rows_mm / columns_mm, ("", "", "", ""), tuple(maps))]
    way = reorientation_to(grid, "RAS")
    spacing = reoriented_grid(grid, way).spacing_mm
    upright = [way.apply(array) for array in (image, *masks, *maps)]
    box = content_box(upright[0])
    upright = [array[box] for array in upright]
    views = []
    for title, axis, letters in (
        ("axial", 2, ("R", "L", "A", "P")),
        ("coronal", 1, ("R", "L", "S", "I")),
        ("sagittal", 0, ("A", "P", "S", "I")),
    ):
        index = _richest_slice(upright[1 : 1 + len(masks)], axis) if masks else upright[0].shape[axis] // 2
        # The remaining two axes grow to the right or front, then to the front or top: the second becomes the rows,
        # top first, and the first becomes the columns, right or front first.
        shown = [array.take(index, axis).T[::-1, ::-1] for array in upright]
        columns_mm, rows_mm = (spacing[other] for other in range(3) if other != axis)
        own, others = tuple(shown[1 : 1 + len(masks)]), tuple(shown[1 + len(masks) :])
        views.append(View(title, shown[0], own, rows_mm / columns_mm, letters, others))
    return [view for view in views if min(view.image.shape) > 1] or views


def content_box(image: AnyArray) -> tuple[slice, ...]:
    """The box of the voxels that differ from the corner voxel, or the whole volume if none does."""
    return box_of(image != image.flat[0]) or tuple(slice(0, length) for length in image.shape)


def _richest_slice(masks: Sequence[LabelMap], axis: int) -> int:
    """The slice along `axis` that shows most of all structures, each measured against its own largest slice."""
    others = tuple(other for other in range(masks[0].ndim) if other != axis)
    richness = np.zeros(masks[0].shape[axis])
    for mask in masks:
        for value in present_labels(mask):
            areas = np.count_nonzero(mask == value, axis=others)
            richness += areas / areas.max()
    return int(richness.argmax()) if richness.any() else masks[0].shape[axis] // 2


def present_labels(mask: LabelMap) -> list[int]:
    """The label values that occur, without the background."""
    return [int(value) for value in np.unique(mask) if value]


def intensity_window(image: AnyArray) -> tuple[float, float]:
    """Black and white level: the 1st and 99.5th percentile of the foreground."""
    content = image[image != image.flat[0]]
    if not content.size:
        return 0.0, 1.0
    low, high = np.percentile(content, (1.0, 99.5))
    return float(low), float(max(high, low + 1e-6))
