"""Which image of a case is which input channel of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from segkit.data.case import BRATS_MODALITIES, Case
from segkit.data.layouts.modality import canonical_modality
from segkit.errors import DataError

_UNSPECIFIC = ("image", "mr", "mri")
"""Modalities of a model that say nothing of the sequence."""


def match_modalities(case: Case, wanted: Sequence[str], *, allow_missing: bool = False) -> Case:
    """The case with its images under the names of the model's input channels, reference left out.

    Names are compared as they are, then by what they are called elsewhere (`t1ce` is `t1c`). A model of one modality
    takes the only image of a case whatever its name, unless that is known to be another sequence. Images numbered 0,
    1, 2 ... or channel_0, channel_1 ... (nnU-Net, Decathlon, 4D files) are taken in order where the model's own
    modalities are not among the four of BraTS, whose numbers differ from source to source.

    Raises:
        DataError: a modality is missing (unless `allow_missing` and at least one is there).
    """
    by_name = {_plain_name(name): file for name, file in case.images.items()}
    images = {name: by_name[_plain_name(name)] for name in wanted if _plain_name(name) in by_name}
    if not images and _may_take_in_order(case, wanted):
        images = dict(zip(wanted, case.images.values(), strict=True))
    missing = [name for name in wanted if name not in images]
    if missing and not (allow_missing and images):
        several = len(missing) > 1
        raise DataError(
            f"modalit{'ies' if several else 'y'} {', '.join(missing)} {'are' if several else 'is'} missing"
            f" (found: {', '.join(case.images) or 'no image'})",
            expected=f"{', '.join(wanted)}, as this model was trained on",
            remedy="Add the file" + ("s" if several else "") + ", say which file is which with --modality NAME=SUFFIX"
            + (", or pass --allow-missing to go on without" if images else ""),
        )  # fmt: skip
    return dataclasses.replace(case, images=images, label=None)


def _plain_name(name: str) -> str:
    return canonical_modality(name) or name.casefold()


def _may_take_in_order(case: Case, wanted: Sequence[str]) -> bool:
    if len(case.images) != len(wanted):
        return False
    if len(wanted) == 1:
        (found,) = case.images
        says_nothing = wanted[0].casefold() in _UNSPECIFIC or _is_number(wanted[0])
        return canonical_modality(found) is None or says_nothing
    is_numbered = all(_is_number(name) for name in case.images)
    return is_numbered and not any(name in BRATS_MODALITIES for name in wanted)


def _is_number(name: str) -> bool:
    """Whether a layout found a channel without a name: "0" or "channel_0"."""
    return name.removeprefix("channel_").isdigit()
