"""Pictures: masks over an image, and the curves of a training run.

matplotlib is imported inside the functions that draw and used through `Figure` objects only, so that no window system
is needed and no state is shared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import DataError, RequestError, on_one_line
from segkit.evaluation.pairing import Pair, Pairing
from segkit.evaluation.score_folder import read_prediction, read_reference
from segkit.evaluation.scores import Evaluation, worst_first
from segkit.labels import LabelScheme, outputs_of, translate
from segkit.metrics.lesions import Scores
from segkit.reading.files import read_volume, written_atomically
from segkit.reading.geometry import reorientation_to, reoriented_grid, same_grid
from segkit.reading.volume import Grid
from segkit.shapes import AnyArray, LabelMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

_log = logging.getLogger(__name__)

COLOURS = ("#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
"""Okabe & Ito's palette, told apart in every common colour blindness; reordered for contrast on grey."""

_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The same palette in an order that reads on white."""

BACKGROUNDS = ("t2f", "t1c", "t2w", "t1n", "green")
"""Which image to draw masks over, first that exists: the whole tumour shows best on FLAIR, and of colour pictures the
green channel has the most contrast."""

_OPACITY = 0.55
_LETTER_PLACES = (
    (0.01, 0.5, "left", "center"),
    (0.99, 0.5, "right", "center"),
    (0.5, 0.99, "center", "top"),
    (0.5, 0.01, "center", "bottom"),
)
"""Where the letters left, right, top and bottom stand in a panel, and how they are aligned."""
_RELIABILITY = {"whole": ("all voxels", "#56B4E9", 6.0), "box": ("around the reference", "#D55E00", 3.0)}
"""Name, colour (Okabe & Ito's sky blue and vermilion) and marker size of a curve: where two agree, both can be seen."""
_FEW_POINTS = 30
_LOSS, _VALIDATION, _RATE = "loss", "validation", "learning rate"
_PANEL_OF = {"dice": _VALIDATION, "measures": _VALIDATION, "score": _VALIDATION, "lr": _RATE}
_RADIOLOGICAL = "radiological view: the patient's right is on the left of axial and coronal planes"


@dataclass(frozen=True)
class View:
    """One plane ready to be shown: rows from top to bottom, columns from left to right."""

    title: str
    image: AnyArray
    masks: tuple[LabelMap, ...]
    aspect: float
    letters: tuple[str, str, str, str]
    """What lies left, right, top and bottom of the picture; empty for pictures without anatomy."""
    maps: tuple[AnyArray, ...] = ()
    """Other arrays of the same plane, such as the uncertainty."""


def overlay_figure(
    path: Path,
    image: AnyArray,
    labels: LabelMap,
    grid: Grid,
    *,
    reference: LabelMap | None = None,
    scheme: LabelScheme | None = None,
    title: str = "",
) -> None:
    """Draw a mask over its image: axial, coronal and sagittal plane of a volume, or the whole of a picture.

    Each plane is the one that shows most of all structures. Volumes are shown in radiological orientation (the
    patient's right on the left), to scale whatever the spacing.

    Args:
        path: The picture to write; its suffix chooses the format (.png, .pdf, .svg).
        image: (D, H, W) or (H, W) intensities on `grid`.
        labels: The predicted label values on `grid`, 0 = background.
        grid: Where the voxels lie.
        reference: The reference on the same grid and in the same label scheme; drawn in a row of its own, and as a
            white outline over the prediction.
        scheme: Names the labels, each in the colour of `label_colours`; None tells them apart by value.
        title: Printed above, such as the case id.
    """
    from matplotlib.figure import Figure

    maps = (labels,) if reference is None else (labels, reference)
    views = views_of(image, maps, grid)
    window = intensity_window(image)
    known = label_colours(scheme)
    present = sorted({value for mask in maps for value in _present(mask)})
    colours = {value: known.get(value, _unnamed(value)) for value in present}
    rows = ("image", "prediction", "reference")[: 1 + len(maps)]
    if len(views) > 1:
        figure = Figure(figsize=(3.0 * len(views), 3.0 * len(rows)), facecolor="black", layout="constrained")
        panels = figure.subplots(len(rows), len(views))
    else:  # side by side, as a screen is wider than high
        figure = Figure(figsize=(4.5 * len(rows), 5.0), facecolor="black", layout="constrained")
        panels = figure.subplots(1, len(rows)).reshape(-1, 1)
    for row, name in enumerate(rows):
        panels[row, 0].set_ylabel(name, color="white", fontsize=11)
        for axes, view in zip(panels[row], views, strict=True):
            _show(axes, view, window)
            if row > 0:
                axes.imshow(_tint(view.masks[row - 1], colours), aspect=view.aspect, interpolation="nearest")
            if name == "prediction" and len(maps) > 1:
                _outline(axes, view.masks[1] > 0)
    for axes, view in zip(panels[0], views, strict=True):
        axes.set_title(view.title, color="white", fontsize=10)
    _legend(figure, colours.values(), has_reference=len(maps) > 1)
    notes = [note for note in (on_one_line(title), _RADIOLOGICAL if grid.dims == 3 else "") if note]
    figure.suptitle("\n".join(notes), color="white", fontsize=11, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="black")


def curves_figure(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Draw the course of a run: losses, validation scores, and learning rate, against its steps.

    Args:
        path: The picture to write.
        rows: What `metrics.jsonl` holds, one mapping a line: `step`, and any of: keys with `loss` in their name,
            `dice` and `measures` (name -> value, or one value), `score` and `lr`. Missing and undefined entries are
            left out.
    """
    from matplotlib.figure import Figure

    curves = {panel: lines for panel, lines in curves_of(rows).items() if lines}
    figure = Figure(figsize=(8.0, 2.6 * max(len(curves), 1)), layout="constrained")
    if not curves:
        figure.text(0.5, 0.5, "nothing recorded yet", ha="center")
    else:
        column = figure.subplots(len(curves), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (panel, lines) in zip(column, curves.items(), strict=True):
            _draw_curves(axes, panel, lines)
        column[-1].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def reliability_figure(path: Path, tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Draw a reliability diagram of each region, with the number of voxels of each bin below.

    Args:
        path: The picture to write, atomically.
        tables: Region -> "whole" or "box" -> calibration table, see `reliability_tables`; at least one region.

    Raises:
        DataError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(tables), 4.8), layout="constrained")
    panels = figure.subplots(2, len(tables), squeeze=False, sharex=True, height_ratios=(3, 1))
    for column, (region, parts) in enumerate(tables.items()):
        _draw_reliability(panels[0, column], panels[1, column], parts)
        panels[0, column].set_title(region, parse_math=False)
        panels[1, column].set_xlabel("probability")
    panels[0, 0].set_ylabel("share in the region")
    panels[1, 0].set_ylabel("voxels")
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)


def label_colours(scheme: LabelScheme | None) -> dict[int, tuple[str, str]]:
    """Label value -> tissue and colour, the same in every picture; a region has the colour of the tissue it paints.

    Without a scheme labels are told apart by value.
    """
    if scheme is None:
        return {value: _unnamed(value) for value in range(1, 256)}
    painted = [output.label for output in outputs_of(scheme) if output.label]
    names = {value: tissue for tissue, value in scheme.values.items()}
    values = list(dict.fromkeys([*painted, *names]))
    return {value: (names[value], COLOURS[position % len(COLOURS)]) for position, value in enumerate(values)}


def _unnamed(value: int) -> tuple[str, str]:
    return f"label {value}", COLOURS[(value - 1) % len(COLOURS)]


def views_of(image: AnyArray, masks: Sequence[LabelMap], grid: Grid, maps: Sequence[AnyArray] = ()) -> list[View]:
    """The planes in which a case is shown: axial, coronal and sagittal of a volume, or the whole of a picture.

    Each plane is the one that shows most of all structures of the masks, cropped to what the image shows, in
    radiological orientation.

    Args:
        image: (D, H, W) or (H, W) intensities on `grid`.
        masks: Label maps on the same grid.
        grid: Where the voxels lie.
        maps: Other arrays on the same grid, which have no say in which plane is shown.
    """
    if grid.dims == 2:
        rows_mm, columns_mm = grid.spacing_mm
        return [View("", image, tuple(masks), rows_mm / columns_mm, ("", "", "", ""), tuple(maps))]
    return _planes(image, masks, grid, maps)


def _planes(image: AnyArray, masks: Sequence[LabelMap], grid: Grid, maps: Sequence[AnyArray]) -> list[View]:
    way = reorientation_to(grid, "RAS")
    spacing = reoriented_grid(grid, way).spacing_mm
    upright = [way.apply(array) for array in (image, *masks, *maps)]
    box = content_box(upright[0])
    upright = [array[box] for array in upright]
    views = []
    for title, axis, letters in (
        ("axial", 2, ("R", "L", "A", "P")),
        ("coronal", 1, ("R", "L", "S", "I")),
        ("sagittal", 0, ("A", "P", "S", "I")),
    ):
        index = _richest_slice(upright[1 : 1 + len(masks)], axis) if masks else upright[0].shape[axis] // 2
        # The remaining two axes grow to the right or front, then to the front or top: the second becomes the rows,
        # top first, and the first becomes the columns, right or front first.
        shown = [array.take(index, axis).T[::-1, ::-1] for array in upright]
        columns_mm, rows_mm = (spacing[other] for other in range(3) if other != axis)
        own, others = tuple(shown[1 : 1 + len(masks)]), tuple(shown[1 + len(masks) :])
        views.append(View(title, shown[0], own, rows_mm / columns_mm, letters, others))
    return views


def content_box(image: AnyArray) -> tuple[slice, ...]:
    """The box of what differs from the corner voxel, or the whole volume where nothing does."""
    return extent(image != image.flat[0])


def extent(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The box of what is True, or the whole array where nothing is."""
    box = []
    for axis, length in enumerate(mask.shape):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        (hits,) = np.nonzero(mask.any(axis=others))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(0, length))
    return tuple(box)


def _richest_slice(masks: Sequence[LabelMap], axis: int) -> int:
    """The slice along `axis` that shows most of all structures, each measured against its own largest slice."""
    others = tuple(other for other in range(masks[0].ndim) if other != axis)
    richness = np.zeros(masks[0].shape[axis])
    for mask in masks:
        for value in _present(mask):
            areas = np.count_nonzero(mask == value, axis=others)
            richness += areas / areas.max()
    return int(richness.argmax()) if richness.any() else masks[0].shape[axis] // 2


def _present(mask: LabelMap) -> list[int]:
    return [int(value) for value in np.unique(mask) if value]


def intensity_window(image: AnyArray) -> tuple[float, float]:
    """Black and white level: the 1st and 99.5th percentile of what is not background."""
    content = image[image != image.flat[0]]
    if not content.size:
        return 0.0, 1.0
    low, high = np.percentile(content, (1.0, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _tint(mask: LabelMap, colours: Mapping[int, tuple[str, str]]) -> NDArray[np.float64]:
    """(rows, columns, 4) red, green, blue and opacity in [0, 1]; background is transparent."""
    from matplotlib.colors import to_rgba

    table = np.zeros((256, 4))
    for value, (_, colour) in colours.items():
        table[value] = to_rgba(colour, _OPACITY)
    return table[mask]


def _show(axes: Axes, view: View, window: tuple[float, float]) -> None:
    from matplotlib.patheffects import withStroke

    low, high = window
    axes.imshow(view.image, cmap="gray", vmin=low, vmax=high, aspect=view.aspect, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    halo = [withStroke(linewidth=2, foreground="black")]
    for letter, (x, y, horizontal, vertical) in zip(view.letters, _LETTER_PLACES, strict=True):
        place: dict[str, Any] = {"ha": horizontal, "va": vertical, "transform": axes.transAxes}
        axes.text(x, y, letter, color="white", fontsize=8, path_effects=halo, **place)


def _outline(axes: Axes, mask: NDArray[np.bool_]) -> None:
    if mask.any():  # contour warns where there is no level to draw
        axes.contour(mask.astype(np.float32), levels=[0.5], colors="white", linewidths=0.7)


def _legend(figure: Figure, labels: Iterable[tuple[str, str]], *, has_reference: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in labels]
    if has_reference:
        handles.append(Line2D([], [], color="white", linewidth=1.2, label="outline of the reference"))
    if handles:
        _with_names_as_they_are(
            figure.legend(
                handles=handles,
                loc="outside lower center",
                ncols=min(len(handles), 5),
                frameon=False,
                labelcolor="white",
            )
        )


def _draw_curves(axes: Axes, panel: str, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    for position, (name, points) in enumerate(lines.items()):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < _FEW_POINTS else None
        colour = _LINE_COLOURS[position % len(_LINE_COLOURS)]
        axes.plot(steps, values, label=name, color=colour, marker=marker, markersize=3)
    axes.set_ylabel(panel)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        _with_names_as_they_are(axes.legend(loc="best", fontsize=8))


def _draw_reliability(diagram: Axes, counts: Axes, parts: Mapping[str, Mapping[str, Any]]) -> None:
    diagram.plot((0, 1), (0, 1), color="black", linewidth=0.8, linestyle="--")
    for where, (name, colour, size) in _RELIABILITY.items():
        if where in parts:
            table = parts[where]
            label = f"{name}: ECE {table['ece']:.3f}, ACE {table['ace']:.3f}"
            line: dict[str, Any] = {"color": colour, "marker": "o", "markersize": size, "linewidth": size / 2}
            diagram.plot(*zip(*calibration_points(table), strict=True), label=label, **line)
            counts.stairs(table["count"], table["edges"], color=colour)
    diagram.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    diagram.grid(alpha=0.3)
    diagram.legend(loc="upper left", fontsize=7)
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.5)
    counts.grid(alpha=0.3)


def calibration_points(table: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(mean probability, observed share) of the bins that hold any voxels."""
    return [(x, y) for x, y in zip(table["confidence"], table["frequency"], strict=True) if x is not None]


def _with_names_as_they_are(legend: Legend) -> None:
    """Names may hold dollar signs, between which matplotlib expects TeX, and letters that no font has."""
    for text in legend.get_texts():
        text.set(text=on_one_line(text.get_text()), parse_math=False)


def curves_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panel -> curve name -> points (step, value)."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {_LOSS: {}, _VALIDATION: {}, _RATE: {}}
    for position, row in enumerate(rows):
        for key, entry in row.items():
            panel = _PANEL_OF.get(key, _LOSS if "loss" in key else None)
            if panel is None:
                continue
            for name, value in (entry if isinstance(entry, Mapping) else {key: entry}).items():
                if value is not None and np.isfinite(value):
                    panels[panel].setdefault(name, []).append((row.get("step", position), value))
    return panels


def draw_worst_cases(evaluation: Evaluation, pairing: Pairing, folder: Path, count: int) -> list[Path]:
    """Draw the `count` cases with the lowest mean Dice over regions that have an image: `folder/<case>.png`.

    Raises:
        RequestError: the references are masks without images.
    """
    pairs = {pair.reference.id: pair for pair in pairing.pairs if pair.reference.images and pair.prediction}
    if not pairs:
        raise RequestError(
            "figures need images, and the references are masks only", remedy="Give the dataset folder as reference"
        )
    drawable = {case.case: case.regions for case in evaluation.cases if case.case in pairs and not case.is_missing}
    paths = []
    for case_id in worst_first(drawable)[:count]:
        path = folder / f"{case_id}.png"
        try:
            _draw_case(path, pairs[case_id], pairing.scheme, drawable[case_id])
        except DataError as error:  # the scores stand without the picture
            _log.warning("no picture of %s: %s", case_id, error)
        else:
            paths.append(path)
    return paths


def _draw_case(path: Path, pair: Pair, scheme: LabelScheme, regions: Mapping[str, Scores]) -> None:
    reference, grid = read_reference(pair, scheme)
    images = pair.reference.images
    name = next((modality for modality in BACKGROUNDS if modality in images), next(iter(images)))
    image = read_volume(images[name].path, images[name].channel)
    difference = same_grid(image.grid, grid)
    if difference is not None:
        raise DataError(difference, where=images[name].path)
    dice = ", ".join(f"{region} {metrics['dice']:.3f}" for region, metrics in regions.items())
    overlay_figure(
        path,
        image.array,
        translate(read_prediction(pair, grid), pair.scheme, scheme),
        grid,
        reference=reference,
        scheme=scheme,
        title=f"{pair.reference.id} ({name})  Dice: {dice}",
    )
