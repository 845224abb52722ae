"""DICOM: series, multi-frame files, and masks written over a series."""

from __future__ import annotations

from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.raw import mutated_bytes
from fuzzing.parser import Files, Parser
from fuzzing.parsers.volumes import read_image


def _slices() -> list[Files]:
    return [{f"{n}.dcm": seeds.dicom_slice(n) for n in range(5)}]


def _series(folder: Path, _: Path) -> None:
    from segkit.reading.dicom import frames_of, holds_frames, is_dicom_file
    from segkit.reading.files import read_volume

    for path in folder.iterdir():
        if is_dicom_file(path):
            holds_frames(path)
    frames_of(folder)
    read_volume(folder)


def _frames(folder: Path, path: Path) -> None:
    from segkit.reading.dicom import frames_of, holds_frames

    holds_frames(path)
    read_image(folder, path)
    frames_of(path)


def _seg(folder: Path, _: Path) -> None:
    import numpy as np

    from segkit.reading.dicom_seg import write_dicom_seg
    from segkit.reading.files import read_grid

    series = folder / "series"
    series.mkdir()
    for path in list(folder.glob("*.dcm")):
        path.rename(series / path.name)
    labels = np.zeros(read_grid(series).shape, np.uint8)
    labels.flat[0] = 1
    write_dicom_seg(folder / "mask.dcm", labels, series, {"edema": 1})


PARSERS = (
    Parser("dicom-series", _slices, {"": mutated_bytes}, _series),
    Parser("dicom-frames", lambda: [{"x.dcm": seeds.dicom_frames()}], {"": mutated_bytes}, _frames),
    Parser("dicom-seg", _slices, {"": mutated_bytes}, _seg),
)
