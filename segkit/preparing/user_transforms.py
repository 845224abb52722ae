"""The user's own transforms of training patches: MONAI's by name from the settings, or a `Compose` from Python.

A setting is a mapping such as `{name: RandBiasFieldd, prob: 0.2}`: the public name of one of MONAI's dictionary
transforms, and its arguments as plain values. Nothing is evaluated or imported by it. `place` is "after" (the default)
or "before" our own random changes; with `augmentation.enabled` false there are none.
"""

import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai import transforms as monai_transforms
from monai.transforms import Compose, MapTransform, RandomizableTransform
from monai.utils import GridSampleMode, InterpolateMode

from segkit.errors import RequestError, SegkitError, is_memory_error
from segkit.preparing.transforms import IMAGE, LABEL, KeepBackground, run

_ROOMS = ("intensity", "spatial", "smooth_field", "croppad")
"""Modules of `monai.transforms` with changes of images; others read and write files, or call functions."""
_ARE_INTENSITIES = ("RandSimulateLowResolutiond",)
"""Those in `spatial` that move no voxels."""
_DRAWS = 4
"""Random changes that a transform is tried with."""

KNOWN: Mapping[str, type[MapTransform]] = {
    kind.__name__: kind
    for _, kind in inspect.getmembers(monai_transforms, inspect.isclass)
    if issubclass(kind, MapTransform) and kind.__module__ in {f"monai.transforms.{room}.dictionary" for room in _ROOMS}
}
"""The transforms that settings may name."""


def checked_setting(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """The setting of one transform.

    Raises:
        ValueError: name, place or arguments are not valid, with the nearest valid one.
    """
    keeping_background(_build(setting))
    return setting


def build_transforms(settings: Sequence[Mapping[str, Any]], place: str) -> list[Any]:
    """The transforms of settings with this place."""
    return [keeping_background(_build(setting)) for setting in settings if setting.get("place", "after") == place]


def _build(setting: Mapping[str, Any]) -> Any:
    arguments = {key: value for key, value in setting.items() if key not in ("name", "place")}
    name, place = setting.get("name"), setting.get("place", "after")
    kind = KNOWN.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{name!r} is not one of MONAI's dictionary transforms of images{_nearest(str(name), KNOWN)}")
    if place not in ("before", "after"):
        raise ValueError(f"{name}: place {place!r} is neither 'before' nor 'after'")
    parameters = inspect.signature(kind).parameters
    for key in arguments:
        if key not in parameters:
            raise ValueError(f"{name} has no argument {key!r}{_nearest(key, parameters)}")
    if expression := next((text for text in _texts(arguments) if text.startswith(("$", "@", "%"))), None):
        raise ValueError(f"{name}: {expression!r} is an expression; only plain values are accepted")
    keys = arguments.get("keys", (IMAGE, LABEL) if _moves_voxels(kind) else (IMAGE,))
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    for key in keys:
        if key not in (IMAGE, LABEL):
            raise ValueError(f"{name}: {key!r} is not a key of a patch{_nearest(str(key), (IMAGE, LABEL))}")
    arguments["keys"] = keys
    if "allow_missing_keys" in parameters:
        arguments.setdefault("allow_missing_keys", True)  # data without a reference
    interpolation = parameters.get("mode")
    if interpolation is not None and isinstance(interpolation.default, GridSampleMode | InterpolateMode):
        mode = arguments.get("mode", interpolation.default)
        if not isinstance(mode, list | tuple):
            arguments["mode"] = tuple("nearest" if key == LABEL else mode for key in keys)
    try:
        transform = kind(**arguments)
    except Exception as error:  # MONAI raises errors of many kinds
        raise ValueError(f"{name} does not accept its arguments: {error}") from error
    return transform


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested values and keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _moves_voxels(kind: type) -> bool:
    room = kind.__module__.removeprefix("monai.transforms.")
    is_spatial = room in ("spatial.dictionary", "croppad.dictionary") or kind.__name__ == "RandSmoothDeformd"
    return is_spatial and kind.__name__ not in _ARE_INTENSITIES


def parts_of(transforms: Compose) -> list[Any]:
    """The transforms of a `Compose`; a nested one stays whole."""
    return list(transforms.transforms) if type(transforms) is Compose else [transforms]


def keeping_background(transform: Any) -> Any:
    """The transform; one that changes the intensities of the image alone leaves voxels that are exactly 0 at 0.

    Raises:
        ValueError: one of MONAI's moves the voxels of the image alone.
    """
    if not isinstance(transform, MapTransform) or LABEL in transform.keys:
        return transform
    if _moves_voxels(type(transform)):
        raise ValueError(f"{type(transform).__name__} moves voxels, so its keys must be 'image' and 'label'")
    return KeepBackground([transform])


def name_of(transform: Any) -> str:
    """The class of a transform."""
    return type(transform.transforms[0] if isinstance(transform, KeepBackground) else transform).__name__


def require_usable(transforms: Sequence[Any], patch: Mapping[str, torch.Tensor]) -> None:
    """Try each transform on one real patch, as if its probability were 1.

    Raises:
        RequestError: one fails, changes channels, size or label values, or does not follow the seed.
    """
    for transform in transforms:
        certain = copy.deepcopy(transform)
        for part in _all_in(certain):
            if isinstance(part, RandomizableTransform):
                part.prob = 1.0
        for seed in range(_DRAWS):
            if (problem := _problem(certain, patch, seed)) is not None:
                raise RequestError(
                    f"{name_of(transform)} {problem}",
                    where="training.transforms",
                    expected="image and label of the same shapes, and label values of the data",
                )


def _all_in(transform: Any) -> Iterator[Any]:
    yield transform
    for part in transform.transforms if isinstance(transform, Compose) else ():
        yield from _all_in(part)


def _problem(transform: Any, patch: Mapping[str, torch.Tensor], seed: int) -> str | None:
    results, transforms = [], Compose([transform])
    for _ in range(2):
        transforms.set_random_state(seed)
        try:
            result = run(transforms, {key: tensor.clone() for key, tensor in patch.items()})
        except Exception as error:
            if isinstance(error, SegkitError) or is_memory_error(error):
                raise
            return f"fails on a patch of this data: {type(error).__name__}: {error}"
        if not isinstance(result, Mapping):
            return "returns several patches"
        results.append(result)
    first, again = results
    for key, before in patch.items():
        after = first.get(key)
        if not isinstance(after, torch.Tensor) or after.shape != before.shape:
            found = tuple(after.shape) if isinstance(after, torch.Tensor) else "nothing"
            return f"changes the shape of the {key} from {tuple(before.shape)} to {found}"
        if not torch.isfinite(after).all():
            return f"gives NaN or infinity in the {key}"
        if not torch.equal(after, again[key]):
            return "gives another result for the same seed, so a resumed run would not be exact"
    if LABEL in patch and not np.isin(first[LABEL].cpu().numpy(), [0, *np.unique(patch[LABEL].cpu().numpy())]).all():
        return "changes the values of the label"
    return None
