"""Both eyes of a person as in CHASE_DB1, with fields of view and probabilities beside the masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

from segkit.reading.case import Case, ImageFile

REFERENCE = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], np.uint8)
PREDICTION = np.array([[1, 0, 1, 0], [0, 0, 0, 0]], np.uint8)
ROI = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.uint8)
PROBABILITIES = np.array([[0.9, 0.4, 0.6, 0.1], [0.2, 0.7, 0.7, 0.7]], np.float32)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)
    return path


def save_white_first(path: Path, array: np.ndarray) -> Path:
    """0 is white and 1 black in this palette, as in the fields of view of CHASE_DB1; 1 of `array` becomes white."""
    picture = PIL.Image.fromarray(1 - array)
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(path)
    return path


def write_eyes(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of masks and data: the left eye is predicted as `PREDICTION`, the right exactly."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    colour = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for case, prediction in (("Image_01L", PREDICTION), ("Image_01R", REFERENCE)):
        save(data / f"{case}.jpg", colour)
        save(data / f"{case}_1stHO.png", REFERENCE > 0)
        save(data / f"{case}_2ndHO.png", PREDICTION > 0)
        save_white_first(data / f"{case}.gif", ROI)
        save(masks / f"{case}.png", prediction)
        save(masks / "probabilities" / f"{case}_foreground.tif", PROBABILITIES)
        save(masks / "probabilities" / f"{case}_background.tif", 1 - PROBABILITIES)
    return masks, data


def cases(*names: str) -> list[Case]:
    return [Case(name, name, {"grey": ImageFile(Path(f"{name}_training.tif"))}) for name in names]
