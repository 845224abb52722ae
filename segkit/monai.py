"""segkit's data in MONAI: lists of cases, and its reading and preprocessing as dictionary transforms.

Unlike MONAI's readers, these may be called from several threads, name the file of every error, and refuse files that do
not lie on one grid.
"""

import json
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose, InvertibleTransform, MapTransform
from monai.utils import TraceKeys

from segkit.checkpoint.run_folder import load_card
from segkit.errors import DataError, RequestError
from segkit.labels import LabelScheme, classes_scheme, scheme_from_json
from segkit.preparing.preprocessing import LoadedCase, Preparation, PreprocessingConfig, load_case, prepare
from segkit.preparing.resampling import resample_image, resample_labels
from segkit.reading.case import Case, Cohort, ImageFile
from segkit.reading.files import count_channels
from segkit.reading.in_memory import read_channels
from segkit.reading.layouts.table import find_cases
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray

__all__ = ["LoadCased", "Prepared", "as_dataset", "datalist"]

IMAGE, LABEL, SCHEME = "image", "label", "label_scheme"
"""Keys of a case: its files, or what was read from them."""

_ANY_LABELS = classes_scheme("values", {str(value): value for value in range(1, 256)})


class LoadCased(MapTransform):  # type: ignore[misc]
    """Reads the files of a case, as `segkit.monai.datalist` lists them.

    "image", a path or a list of paths, becomes a MetaTensor (C, *spatial) float32; "label", if there is one, of uint8,
    (1, *spatial). Both have the orientation and the affine of the file (RAS+ world, mm). With a `scheme` labels get its
    values; "label_scheme" of the dictionary describes those of the file.

    Raises:
        DataError: a file cannot be read or holds NaN or infinity, files disagree about their grid, or the label has
            values that its scheme does not know.
    """

    def __init__(self, keys: tuple[str, str] = (IMAGE, LABEL), scheme: LabelScheme | None = None) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.scheme = scheme

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its files read."""
        image_key, label_key = self.keys
        d = dict(data)
        paths = [d[image_key]] if isinstance(d[image_key], (str, os.PathLike)) else list(d[image_key])
        files = [file for path in paths for file in _channels(Path(path))]
        names = tuple(map(str, range(len(files))))
        label = ImageFile(Path(d[label_key])) if label_key in d else None
        own = scheme_from_json(d[SCHEME]) if SCHEME in d else _ANY_LABELS
        case = Case(str(d.get("case", paths[0])), "", dict(zip(names, files, strict=True)), label, own)
        loaded = load_case(case, names, self.scheme if SCHEME in d and self.scheme is not None else own)
        d[image_key] = _tensor(loaded.image, loaded.grid, paths[0])
        if loaded.labels is not None:
            d[label_key] = _tensor(loaded.labels[None], loaded.grid, d[label_key])
        return d


class Prepared(MapTransform, InvertibleTransform):  # type: ignore[misc]
    """segkit's preprocessing: orient, crop, normalise and resample, as the networks of segkit expect it.

    `settings` are those of a run folder, or a `segkit.preparing.preprocessing.PreprocessingConfig`. MetaTensors "image"
    (C, *spatial) and "label" (1, *spatial) become MetaTensors (C, *prepared) float32 and (1, *prepared) uint8 with the
    affine of the prepared grid. The inverse, alone or in MONAI's `Invertd`, returns labels (integers) or logits
    (floats), (K, *prepared), to the grid of the file: labels are resampled by their largest share, logits linearly;
    outside the crop both are 0.

    Raises:
        CheckpointError: the run folder has no model card.
        RequestError: normalisation or crop is not decided, or the folder is a MONAI bundle.
        DataError: resampling would give more than 2 ** 31 voxels.
    """

    def __init__(
        self, settings: str | os.PathLike[str] | PreprocessingConfig, keys: tuple[str, str] = (IMAGE, LABEL)
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        if not isinstance(settings, PreprocessingConfig):
            card = load_card(Path(settings))
            if card.bundle is not None:
                remedy = "Use its own: monai.bundle.ConfigParser"
                raise RequestError("is a MONAI bundle, which has its own preprocessing", where=settings, remedy=remedy)
            settings = card.preprocessing
        self.config = settings

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with its image and its label prepared."""
        image_key, label_key = self.keys
        d = dict(data)
        image, grid = read_channels(d[image_key], None, len(d[image_key].shape) - 1, "the image")
        labels = None if label_key not in d else np.asarray(d[label_key])[0].astype(np.uint8)
        available = tuple(bool(plane.any()) for plane in image)
        loaded = LoadedCase("the case", np.asarray(image, np.float32), labels, grid, available)
        prepared = prepare(loaded, self.config)
        d[image_key] = self._tracked(prepared.image, d[image_key], prepared.preparation)
        if prepared.labels is not None:
            d[label_key] = self._tracked(prepared.labels[None], d[label_key], prepared.preparation)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary with labels or logits (K, *prepared) on the grid of the file, (K, *source)."""
        d = dict(data)
        for key in self.key_iterator(d):
            info = self.pop_transform(d[key])[TraceKeys.EXTRA_INFO]
            preparation = Preparation.from_json(json.loads(info["preparation"]))
            are_labels = not d[key].is_floating_point() or info["mode"] == "nearest"
            array = _on_source(np.asarray(d[key].detach().cpu()), preparation, are_labels=are_labels)
            d[key] = _like(d[key], array, preparation.source_grid.affine)
        return d

    def _tracked(self, array: AnyArray, before: MetaTensor, preparation: Preparation) -> MetaTensor:
        after = _like(before, array, preparation.affine)
        # As text: a batch of it is a list. `mode` is what `Invertd(nearest_interp=True)` changes.
        info = {"preparation": json.dumps(preparation.to_json()), "mode": "bilinear"}
        self.push_transform(after, orig_size=tuple(before.shape[1:]), extra_info=info)
        return after


def _channels(path: Path) -> list[ImageFile]:
    count = count_channels(path)
    return [ImageFile(path, None if count == 1 else channel) for channel in range(count)]


def _tensor(array: AnyArray, grid: Grid, path: str | os.PathLike[str]) -> MetaTensor:
    meta = {"filename_or_obj": str(path), "original_affine": grid.affine.copy(), "space": "RAS"}
    meta["spatial_shape"] = np.asarray(grid.shape)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=torch.from_numpy(grid.affine), meta=meta)


def _like(before: MetaTensor, array: AnyArray, affine: AnyArray) -> MetaTensor:
    """A MetaTensor of an array with the facts and the history of another, on the same device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(before.device)
    meta = {key: value for key, value in before.meta.items() if key != "affine"}
    history = list(before.applied_operations)
    return MetaTensor(tensor, affine=torch.from_numpy(affine), meta=meta, applied_operations=history)


def _on_source(array: AnyArray, preparation: Preparation, *, are_labels: bool) -> AnyArray:
    """(K, *prepared) to (K, *source), in the same type of numbers."""
    if are_labels:
        planes = [resample_labels(plane.astype(np.uint8), preparation.cropped_shape) for plane in array]
        box: AnyArray = np.stack(planes)
    else:
        box = resample_image(array.astype(np.float32, copy=False), preparation.cropped_shape)
    whole = np.zeros((len(array), *preparation.reoriented_shape), array.dtype)
    whole[(slice(None), *preparation.crop_slices)] = box
    return preparation.reorientation.undo(whole)


def datalist(
    data: str | os.PathLike[str],
    *,
    layout: str | None = None,
    modalities: Mapping[str, str] | None = None,
    label_scheme: str | None = None,
) -> list[dict[str, Any]]:
    """The cases of a data folder as MONAI's list of dictionaries of paths; the options are those of `find_cases`.

    Each has "image": the files of its modalities in channel order, or one file that holds them all; "label": its
    reference, if it has one; "label_scheme": names and values of the labels in that file, if known; "case": its id.
    Both `LoadCased` and MONAI's `LoadImaged(["image", "label"], ensure_channel_first=True)` read it.

    Raises:
        DataError: nothing is found or recognised, or a case lacks a modality; all such cases are named.
        RequestError: unknown layout or label scheme.

    Example:
        >>> segkit.monai.datalist("data")[0]["image"]  # doctest: +SKIP
        ['data/a/a_t1.nii.gz', 'data/a/a_t1ce.nii.gz', 'data/a/a_t2.nii.gz', 'data/a/a_flair.nii.gz']
    """
    return _items(find_cases(data, layout=layout, modalities=modalities, label_scheme=label_scheme))


def as_dataset(data: str | os.PathLike[str], transform: Callable[[Any], Any] | None = None, **options: Any) -> Dataset:
    """A `monai.data.Dataset` of a data folder, for MONAI's `DataLoader`; the options are those of `datalist`.

    Its items are read by `LoadCased`: MetaTensors "image" (C, D, H, W) float32 and "label" (1, D, H, W) uint8 with
    their affines, the labels of all cases in one scheme. `transform` then gets the dictionary: `Prepared`, or any of
    MONAI's dictionary transforms.

    Raises:
        DataError: nothing is found or recognised, or a case lacks a modality; later, a case that cannot be read.
        RequestError: unknown layout or label scheme.
    """
    cohort = find_cases(data, **options)
    load = LoadCased(scheme=cohort.scheme)
    return Dataset(_items(cohort), load if transform is None else Compose([load, transform]))


def _items(cohort: Cohort) -> list[dict[str, Any]]:
    incomplete = [case.id for case in cohort.cases if set(cohort.modalities) - set(case.images)]
    if incomplete:
        raise DataError(
            f"{len(incomplete)} of {len(cohort.cases)} cases lack a modality: {', '.join(incomplete[:20])}",
            where=cohort.root,
            expected=f"{', '.join(cohort.modalities)} in each case",
            remedy=f"Add the files, or move these cases; details: segkit check {cohort.root}",
        )
    return [_item(case, cohort.modalities) for case in cohort.cases]


def _item(case: Case, modalities: tuple[str, ...]) -> dict[str, Any]:
    files = [case.images[name] for name in modalities]
    paths = [str(file.path) for file in files]
    is_one_file = len(set(paths)) == 1 and [file.channel or 0 for file in files] == list(range(len(files)))
    item: dict[str, Any] = {IMAGE: paths[0] if is_one_file else paths}
    if case.label is not None:
        item[LABEL] = str(case.label.path)
        if case.scheme is not None:
            item[SCHEME] = case.scheme.to_json()
    return {**item, "case": case.id}
