"""Images of the cases of a page: where their files are, and their arrays (scan, prediction, reference, uncertainty).

Scans are searched in the folder that the user names, else in those of the documents (`data` of a manifest, `references`
of scores.json, `data` of split.json; relative to the document) that are on this machine.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import DataError, as_request
from segkit.evaluation.pairing import declared_schemes, match_files
from segkit.labels import SCHEMES, LabelScheme, scheme_from_json, translate
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_labels, read_volume
from segkit.reading.geometry import same_grid
from segkit.reading.layouts.layout import list_images
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from segkit.report.planes import background_of, label_colours
from segkit.report.sources import Findings, mapping
from segkit.shapes import AnyArray, LabelMap

_COMPANIONS = ("uncertainty", "probabilities", "figures")
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
    """The arrays of one case on one grid, label maps in one scheme; None is what the case lacks."""

    modality: str
    grid: Grid
    image: AnyArray
    prediction: LabelMap | None = None
    reference: LabelMap | None = None
    uncertainty: AnyArray | None = None

    @property
    def masks(self) -> dict[str, LabelMap]:
        """The label maps of the case by name: "prediction" and "reference"."""
        named = {"prediction": self.prediction, "reference": self.reference}
        return {name: mask for name, mask in named.items() if mask is not None}


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
    """The images of the cases with these ids, in `data` or in the folders that the findings name.

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
    if not cases:
        return Gallery({}, scheme, ("The images of these cases were not found; name their folder with --data.",))
    files = dict(_with_masks(cases, findings))
    has_masks = any(found.prediction for found in files.values())
    note = "The masks were not found; name their folder beside that of the evaluation."
    return Gallery(files, scheme, () if has_masks else (note,))


def load_arrays(files: CaseFiles, scheme: LabelScheme | None) -> CaseArrays:
    """Read the files of one case, label maps in the values of `scheme`.

    Raises:
        DataError: a file is unusable, or does not lie on the grid of the image.
    """
    image = read_volume(files.image.path, files.image.channel)
    prediction = None if files.prediction is None else _labels(ImageFile(files.prediction), image.grid)
    if prediction is not None and files.predicted_in is not None and scheme is not None:
        prediction = translate(prediction, files.predicted_in, scheme)
    reference = None if files.reference is None else _labels(files.reference, image.grid)
    uncertainty = None
    if files.uncertainty is not None:
        volume = read_volume(files.uncertainty)
        _require_same(volume.grid, image.grid, files.uncertainty)
        uncertainty = volume.array
    finite = np.nan_to_num(image.array, nan=0.0, posinf=0.0, neginf=0.0)
    return CaseArrays(files.modality, image.grid, finite, prediction, reference, uncertainty)


def _with_masks(cases: list[Case], findings: Findings) -> Iterable[tuple[str, CaseFiles]]:
    masks: dict[str, Path] = {}
    uncertain: dict[str, Path] = {}
    schemes: dict[str, LabelScheme] = {}
    folders = [output.folder for output in findings.outputs] or _named_folders(findings, "predictions")
    for folder in dict.fromkeys(folders):
        listing = list_images(folder)
        listed = [path for path in listing.images if path.relative_to(listing.root).parts[0] not in _COMPANIONS]
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


def _labels(file: ImageFile, grid: Grid) -> LabelMap:
    labels, own = read_labels(file.path, file.channel)
    _require_same(own, grid, file.path)
    return labels


def _require_same(own: Grid, grid: Grid, path: Path) -> None:
    difference = same_grid(own, grid)
    if difference is not None:
        raise DataError(difference, where=path)


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
