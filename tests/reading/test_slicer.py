"""Segmentations of 3D Slicer: layers of segments that overlap, and the part of the scan that was drawn on."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from segkit.preparing.preprocessing import load_case
from segkit.reading.checks import check_cohort
from segkit.reading.files import count_channels, read_grid, read_labels, read_volume
from segkit.reading.layouts.table import find_cases
from tests.helpers import save_nifti


def save_segmentation(
    path: Path,
    layers: NDArray[np.uint8],
    segments: Sequence[tuple[str, int, int]],
    origin: tuple[float, float, float] = (0, 0, 0),
) -> Path:
    """A `.seg.nrrd` of `layers` (N, D, H, W) of 1 x 1 x 2 mm in LPS; name, label value and layer of each segment."""
    axes, shape = ["domain"] * 3, layers.shape[1:]
    lines = ["NRRD0004", "type: unsigned char", "space: left-posterior-superior", "encoding: gzip"]
    if len(layers) > 1:
        axes, shape = ["list", *axes], layers.shape
    directions = ["none"] * (len(axes) - 3) + ["(1,0,0)", "(0,1,0)", "(0,0,2)"]
    lines[2:2] = [f"dimension: {len(axes)}", f"sizes: {' '.join(map(str, shape))}"]
    lines += [f"space directions: {' '.join(directions)}", f"kinds: {' '.join(axes)}"]
    lines += [f"space origin: ({','.join(map(str, origin))})"]
    for number, (name, value, layer) in enumerate(segments):
        for key, text in (("ID", f"Segment_{number}"), ("LabelValue", value), ("Layer", layer), ("Name", name)):
            lines.append(f"Segment{number}_{key}:={text}")
    voxels = (layers if len(layers) > 1 else layers[0]).tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join([*lines, "", ""]).encode() + gzip.compress(voxels))
    return path


def layered(values: tuple[int, int]) -> NDArray[np.uint8]:
    layers = np.zeros((2, 4, 5, 6), np.uint8)
    layers[0, 1:3, 1:3, 1:3] = values[0]
    layers[1, 2:4, 2:4, 2:4] = values[1]
    return layers


@pytest.mark.parametrize("values", [(1, 2), (3, 7), (1, 1)])
def test_layers_are_joined_by_layer_and_value(tmp_path: Path, values: tuple[int, int]) -> None:
    path = save_segmentation(
        tmp_path / "a.seg.nrrd", layered(values), [("liver", values[0], 0), ("lesion", values[1], 1)]
    )
    liver, lesion = values if values != (1, 1) else (1, 2)
    expected = np.zeros((4, 5, 6), np.uint8)
    expected[1:3, 1:3, 1:3] = liver
    expected[2:4, 2:4, 2:4] = lesion  # the later segment over the earlier one
    labels, grid = read_labels(path)
    assert np.array_equal(labels, expected)
    assert count_channels(path) == 1
    assert grid.notes[0].endswith(f"{liver} liver, {lesion} lesion")
    assert grid.spacing_mm == (1, 1, 2)


def test_segments_may_share_a_layer(tmp_path: Path) -> None:
    layers = layered((1, 1))
    layers[0, 0, 0, 0] = 2
    segments = [("a", 1, 0), ("b", 2, 0), ("c", 1, 1)]
    labels = read_labels(save_segmentation(tmp_path / "a.seg.nrrd", layers, segments))[0]
    assert [labels[1, 1, 1], labels[0, 0, 0], labels[3, 3, 3], labels[3, 4, 5]] == [1, 2, 3, 0]


def test_one_layer_is_a_label_map_and_other_vectors_are_channels(tmp_path: Path) -> None:
    path = save_segmentation(tmp_path / "a.seg.nrrd", layered((4, 0))[:1], [("liver", 4, 0)])
    assert set(np.unique(read_labels(path)[0])) == {0, 4}
    assert read_grid(path).notes == ()
    vectors = save_segmentation(tmp_path / "b.nrrd", layered((4, 5)), [])
    assert count_channels(vectors) == 2
    assert read_volume(vectors, 1).array.max() == 5


def test_a_layered_part_of_a_scan_is_trained_on(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    save_nifti(tmp_path / "p1.nii.gz", np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10), affine)
    segments = [("liver", 1, 0), ("lesion", 1, 1)]
    save_segmentation(tmp_path / "p1.seg.nrrd", layered((1, 1)), segments, origin=(2, 3, 8))  # from voxel (2, 3, 4)
    cohort = find_cases(tmp_path)
    (report,) = check_cohort(cohort)
    assert report.is_usable, report.problems
    labels = load_case(cohort.cases[0], cohort.modalities, cohort.scheme).labels
    assert labels is not None
    assert (labels[3, 4, 5], labels[5, 6, 7], labels[2, 3, 4]) == (1, 2, 0)
    assert (int((labels == 1).sum()), int((labels == 2).sum())) == (7, 8)
