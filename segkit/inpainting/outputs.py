"""Output of a filled case: images, anomaly map, and the bank of lesion-free copies (see `preparing.lesion_bank`)."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.errors import RequestError
from segkit.preparing.holes import brain_mask
from segkit.preparing.lesion_bank import BANK_NAME, Bank, BankedCase, read_bank
from segkit.preparing.preprocessing import deviation_of_tissue
from segkit.reading.case import Case, ImageFile
from segkit.reading.files import read_volume, rewrite_image, write_image, written_atomically
from segkit.reading.volume import Grid, in_type
from segkit.shapes import Image

SMOOTHING_MM = 1.0
"""Standard deviation of the Gaussian of anomaly maps, which suppresses single voxels of noise."""

_TRUNCATED = 4.0
"""Standard deviations at which the Gaussian ends."""


def write_filled(
    files: Sequence[ImageFile], targets: Sequence[Path], filled: Image, hole: NDArray[np.bool_], grid: Grid
) -> None:
    """Write images (C, *spatial), each to its target, in type and geometry of its file; DataError if that fails.

    Voxels outside the hole (*spatial) are those of the files. Images with one target are channels of a picture.
    """
    for target in dict.fromkeys(targets):
        indices = [index for index, one in enumerate(targets) if one == target]
        if len(indices) == 1:
            file = files[indices[0]]
            rewrite_image(target, file.path, hole, filled[indices[0], hole], file.channel)
            continue
        planes = [read_volume(files[index].path, files[index].channel).array.copy() for index in indices]
        for plane, index in zip(planes, indices, strict=True):
            plane[hole] = in_type(filled[index, hole], plane.dtype)
        write_image(target, np.stack(planes, -1), grid)  # (H, W, C)


def anomaly_map(
    image: Image,
    healthy: Image,
    hole: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    smoothing_mm: float = SMOOTHING_MM,
) -> NDArray[np.float32]:
    """The difference of two images, |image - healthy|, smoothed, inside the brain.

    Each modality counts in units of its standard deviation over the brain outside the hole, so that sequences and
    scanners compare; of several modalities it is the mean.

    Args:
        image: The scan (C, *spatial), 0 outside the brain.
        healthy: The scan with the hole filled, (C, *spatial).
        hole: The filled voxels, (*spatial).
        spacing_mm: Of the voxels.
        smoothing_mm: Standard deviation of the Gaussian; 0: no smoothing.

    Returns:
        (*spatial), 0 and above; 0 outside the brain and away from the hole.
    """
    result = np.zeros(hole.shape, np.float32)
    if not hole.any():
        return result
    sigma = [smoothing_mm / spacing for spacing in spacing_mm]
    (box,) = ndimage.find_objects(hole.astype(np.uint8))
    reach = [int(_TRUNCATED * one + 0.5) for one in sigma]
    near = tuple(slice(max(0, one.start - more), one.stop + more) for one, more in zip(box, reach, strict=True))
    part = np.zeros(result[near].shape, np.float32)
    for scan, filled in zip(image, healthy, strict=True):
        difference = np.where(hole[near], np.abs(scan[near] - filled[near]), np.float32(0))
        smooth = ndimage.gaussian_filter(difference, sigma, mode="constant", truncate=_TRUNCATED)
        part += smooth / deviation_of_tissue(np.where(hole, np.float32(0), scan))
    result[near] = part / len(image)
    result[~brain_mask((image != 0).any(0))] = 0
    return result


class BankWriter:
    """A bank to which cases are added; `bank.json` names only cases whose files are complete.

    `model` describes the model and the holes, which all copies of a bank share.

    Raises:
        RequestError: the folder holds a bank of another model, of other modalities, or with other holes.
    """

    def __init__(self, folder: Path, modalities: tuple[str, ...], model: Mapping[str, Any]) -> None:
        self.folder = folder
        self._bank = Bank(modalities=modalities, cases=(), model=dict(model))
        if not (folder / BANK_NAME).exists():
            return
        before = read_bank(folder)
        if (before.modalities, before.model) != (self._bank.modalities, self._bank.model):
            found = "holds a bank that was made by another model or with other holes"
            raise RequestError(found, where=folder, remedy="Choose another folder for --bank")
        self._bank = before

    def add(self, case: Case) -> None:
        """Record a complete case on disk; raises DataError if the folder cannot be written."""
        entry = BankedCase(case=case.id, patient=case.patient)
        if entry in self._bank.cases:
            return
        others = (one for one in self._bank.cases if one.case != case.id)
        cases = tuple(sorted((*others, entry), key=lambda one: one.case))  # they are finished in any order
        self._bank = self._bank.model_copy(update={"cases": cases})
        with written_atomically(self.folder / BANK_NAME) as temporary:
            text = json.dumps(self._bank.model_dump(), indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically; raises DataError if the folder cannot be written."""
    with written_atomically(target) as temporary:
        shutil.copyfile(source, temporary)
