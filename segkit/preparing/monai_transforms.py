"""MONAI's own transforms for the preparation that a MONAI bundle asks for, and their nearest equivalent in segkit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from monai.transforms import (
    Compose,
    CropForegroundd,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)

from segkit.errors import RequestError

IMAGE = "image"
"""Key of the image in the dictionaries that the transforms get."""


class Kind(NamedTuple):
    """A transform with the arguments that may be set."""

    transform: type[MapTransform]
    arguments: tuple[str, ...]
    is_spatial: bool = False


PREPARING: dict[str, Kind] = {
    "Orientationd": Kind(Orientationd, ("axcodes", "labels"), is_spatial=True),
    "Spacingd": Kind(
        Spacingd, ("pixdim", "mode", "padding_mode", "align_corners", "diagonal", "scale_extent"), is_spatial=True
    ),
    "CropForegroundd": Kind(CropForegroundd, ("source_key", "allow_smaller", "mode"), is_spatial=True),
    "NormalizeIntensityd": Kind(NormalizeIntensityd, ("nonzero", "channel_wise")),
    "ScaleIntensityd": Kind(ScaleIntensityd, ("minv", "maxv", "factor", "channel_wise")),
    "ScaleIntensityRanged": Kind(ScaleIntensityRanged, ("a_min", "a_max", "b_min", "b_max", "clip")),
    "ScaleIntensityRangePercentilesd": Kind(
        ScaleIntensityRangePercentilesd,
        ("lower", "upper", "b_min", "b_max", "clip", "relative", "channel_wise"),
    ),
}
"""`_target_` -> transform."""


def build_preparation(transforms: Sequence[Mapping[str, Any]]) -> Compose:
    """The transforms as one, for dictionaries with an `IMAGE`; equal transforms give the same object.

    Raises:
        RequestError: a transform or an argument is not one of `PREPARING`, or MONAI rejects a value.
    """
    return _build(json.dumps(list(transforms)))


@lru_cache(maxsize=8)
def _build(text: str) -> Compose:
    return Compose([_transform(one) for one in json.loads(text)])


def _transform(definition: Mapping[str, Any]) -> MapTransform:
    arguments = dict(definition)
    name = arguments.pop("_target_", None)
    kind = PREPARING.get(name)
    if kind is None:
        raise RequestError(f"_target_ is {name!r}", expected=f"one of {', '.join(PREPARING)}")
    for argument in arguments:
        if argument not in kind.arguments:
            raise RequestError(f"{name} has {argument!r}", expected=f"no others than {', '.join(kind.arguments)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about defaults that MONAI has changed
            return kind.transform(keys=IMAGE, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise RequestError(f"MONAI rejects the arguments of {name} ({error})") from error


def has_spatial_transforms(transforms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any of the transforms changes the grid."""
    return any(PREPARING[one["_target_"]].is_spatial for one in transforms)


class Counterpart(NamedTuple):
    """Fields of a `PreprocessingConfig`, and the positions of the transforms that they do not express."""

    fields: dict[str, Any]
    missing: tuple[int, ...]


def counterpart(transforms: Sequence[Mapping[str, Any]], channels: int) -> Counterpart:
    """The preprocessing of segkit that is nearest to these transforms for images of `channels` modalities."""
    fields: dict[str, Any] = {"orientation": "IJK", "crop": "none"}
    missing = []
    for position, definition in enumerate(transforms):
        found = _fields_of(definition, channels)
        is_second = "normalisation" in found and "normalisation" in fields
        if found and not is_second:
            fields |= found
        else:
            missing.append(position)
    return Counterpart({"normalisation": "zscore", **fields}, tuple(missing))


def _fields_of(definition: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """What one transform is in segkit; empty if there is no such thing."""
    name = definition["_target_"]
    if name == "Orientationd":
        return {"orientation": definition.get("axcodes", "RAS")}
    if name == "Spacingd":
        pixdim = definition["pixdim"]
        return {"spacing_mm": (pixdim,) * 3 if isinstance(pixdim, (int, float)) else tuple(pixdim)}
    if name == "CropForegroundd":
        return {"crop": "nonzero"}
    if name == "NormalizeIntensityd" and (definition.get("channel_wise") or channels == 1):
        return {"normalisation": "zscore-nonzero" if definition.get("nonzero") else "zscore"}
    if name == "ScaleIntensityRanged" and definition.get("clip"):
        low, high = definition["a_min"], definition["a_max"]
        lowest, highest = definition.get("b_min"), definition.get("b_max")
        if lowest is not None and highest is not None and highest > lowest and high > low:
            scale = (high - low) / (highest - lowest)
            window = {"ct_window": (low, high), "ct_mean": low - lowest * scale, "ct_std": scale}
            return {"normalisation": "ct-window", **window}
    return {}
