"""Data folders of any layout that segkit reads as MONAI's lists of dictionaries and data sets."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from monai.data import Dataset
from monai.transforms import Compose

from segkit.errors import DataError
from segkit.monai.transforms import IMAGE, LABEL, SCHEME, LoadCased
from segkit.reading.case import Case, Cohort
from segkit.reading.layouts.table import find_cases


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
