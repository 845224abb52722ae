"""Pictures in output folders, drawn with matplotlib: masks over images, curves of a training, reliability.

matplotlib is imported inside the functions and used through `Figure` objects only: no window system, no shared state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError, on_one_line
from segkit.evaluation.score_files import worst_first
from segkit.labels import LabelScheme, without_ignored
from segkit.reading.files import written_atomically
from segkit.reading.volume import Grid
from segkit.report import images
from segkit.report.charts import FEW_POINTS, Points, calibration_points, thinned, training_curves
from segkit.runtime import error_sentence
from segkit.shapes import AnyArray, LabelMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

    from segkit.evaluation.scores import Evaluation

_log = logging.getLogger(__name__)

_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette in an order that is legible on white."""

_RELIABILITY = {"whole": ("all voxels", "#56B4E9", 6.0), "box": ("around the reference", "#D55E00", 3.0)}
"""Name, colour (Okabe & Ito's sky blue and vermilion) and marker size of a curve: where two agree, both are visible."""

_LEFT_AND_RIGHT = ((0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center"))
_TOP_AND_BOTTOM = ((0.5, 0.99, "center", "top"), (0.5, 0.01, "center", "bottom"))
"""Place and alignment of the letters in a panel."""

_RADIOLOGICAL = "radiological view: the patient's right is on the left of axial and coronal planes"


@contextmanager
def drawing(path: Path) -> Iterator[None]:
    """Log a figure that cannot be drawn as a warning: results are complete without it."""
    try:
        yield
    except Exception as error:
        _log.warning("%s cannot be drawn: %s", path, error_sentence(error), exc_info=_log.isEnabledFor(logging.DEBUG))


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
        reference: In the same label scheme: a row of its own, and a white outline over the prediction.
        scheme: Names and colours of the labels (`label_colours`); None names them by value.
        title: Printed above, such as the case id.
    """
    from matplotlib.figure import Figure

    masks = (labels,) if reference is None else (labels, without_ignored(reference, scheme))
    views = images.views_of(image, masks, grid)
    window = images.intensity_window(image)
    known = images.label_colours(scheme)
    present = sorted({value for mask in masks for value in images.present_labels(mask)})
    colours = {value: known.get(value, images.unnamed_label(value)) for value in present}
    rows = ("image", "prediction", "reference")[: 1 + len(masks)]
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
            # contour warns without a level to draw, and needs two rows and columns
            if name == "prediction" and len(masks) > 1 and view.masks[1].any() and min(view.image.shape) > 1:
                axes.contour((view.masks[1] > 0).astype(np.float32), levels=[0.5], colors="white", linewidths=0.7)
    for axes, view in zip(panels[0], views, strict=True):
        axes.set_title(view.title, color="white", fontsize=10)
    _legend(figure, colours.values(), has_reference=len(masks) > 1)
    notes = [note for note in (on_one_line(title), _RADIOLOGICAL if grid.dims == 3 else "") if note]
    figure.suptitle("\n".join(notes), color="white", fontsize=11, parse_math=False)
    _save(figure, path)


def draw_worst_cases(evaluation: Evaluation, folder: Path, count: int) -> list[Path]:
    """Draw the `count` cases with the lowest mean Dice over regions that have an image: `folder/<case>.png`.

    Raises:
        RequestError: the references are masks without images.
    """
    scheme = evaluation.pairing.scheme
    pairs = {pair.reference.id: pair for pair in evaluation.pairing.pairs if pair.reference.images and pair.prediction}
    if not pairs:
        raise RequestError(
            "figures need images, and the references are masks only", remedy="Give the dataset folder as reference"
        )
    drawable = {case.case: case.regions for case in evaluation.cases if case.case in pairs and not case.is_missing}
    paths = []
    for case_id in worst_first(drawable)[:count]:
        pair, found = pairs[case_id], pairs[case_id].reference.images
        name = images.background_of(found)
        files = images.CaseFiles(name, found[name], pair.reference.label, pair.prediction, predicted_in=pair.scheme)
        dice = ", ".join(f"{region} {metrics['dice']:.3f}" for region, metrics in drawable[case_id].items())
        path = folder / f"{case_id}.png"
        title = f"{case_id} ({name})  Dice: {dice}"
        with drawing(path):
            arrays = images.load_arrays(files, scheme)
            shown = (arrays.image, arrays.masks["prediction"], arrays.grid)
            overlay_figure(path, *shown, reference=arrays.reference, scheme=scheme, title=title)
            paths.append(path)
    return paths


def curves_figure(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Draw losses, validation scores and learning rate of a run against its steps; see `training_curves` for `rows`."""
    from matplotlib.figure import Figure

    panels = training_curves(rows)
    figure = Figure(figsize=(8.0, 2.6 * max(len(panels), 1)), layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "nothing recorded yet", ha="center")
    else:
        column = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (panel, curves) in zip(column, panels.items(), strict=True):
            _draw_curves(axes, panel, curves)
        column[-1].set_xlabel("step")
    _save(figure, path)


def reliability_figure(path: Path, tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Draw a reliability diagram of each region, with the number of voxels of each bin below; written atomically.

    `tables`: region -> "whole" or "box" -> calibration table, see `reliability_tables`; at least one region.

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
        _save(figure, temporary)


def _tint(mask: LabelMap, colours: Mapping[int, tuple[str, str]]) -> NDArray[np.float64]:
    """(rows, columns, 4) red, green, blue and opacity in [0, 1]; background is transparent."""
    from matplotlib.colors import to_rgba

    table = np.zeros((256, 4))
    for value, (_, colour) in colours.items():
        table[value] = to_rgba(colour, images.MASK_OPACITY)
    return table[mask]


def _show(axes: Axes, view: images.View, window: tuple[float, float]) -> None:
    from matplotlib.patheffects import withStroke

    low, high = window
    axes.imshow(view.image, cmap="gray", vmin=low, vmax=high, aspect=view.aspect, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    halo = [withStroke(linewidth=2, foreground="black")]
    for letter, (x, y, horizontal, vertical) in zip(view.letters, (*_LEFT_AND_RIGHT, *_TOP_AND_BOTTOM), strict=True):
        place: dict[str, Any] = {"ha": horizontal, "va": vertical, "transform": axes.transAxes}
        axes.text(x, y, letter, color="white", fontsize=8, path_effects=halo, **place)


def _legend(figure: Figure, labels: Iterable[tuple[str, str]], *, has_reference: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in labels]
    if has_reference:
        handles.append(Line2D([], [], color="white", linewidth=1.2, label="outline of the reference"))
    if handles:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(handles), 5)}
        _show_names_literally(figure.legend(handles=handles, frameon=False, labelcolor="white", **place))


def _draw_curves(axes: Axes, panel: str, curves: Mapping[str, Points]) -> None:
    for position, (name, points) in enumerate(curves.items()):
        steps, values = zip(*thinned(points), strict=True)
        marker = "o" if len(points) < FEW_POINTS else None
        colour = _LINE_COLOURS[position % len(_LINE_COLOURS)]
        axes.plot(steps, values, label=name, color=colour, marker=marker, markersize=3)
    axes.set_ylabel(panel)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        _show_names_literally(axes.legend(loc="best", fontsize=8))


def _draw_reliability(diagram: Axes, counts: Axes, parts: Mapping[str, Mapping[str, Any]]) -> None:
    diagram.plot((0, 1), (0, 1), color="black", linewidth=0.8, linestyle="--")
    for where, (name, colour, size) in _RELIABILITY.items():
        if where in parts:
            table = parts[where]
            label = f"{name}: ECE {table['ece']:.3f}, ACE {table['ace']:.3f}"
            line: dict[str, Any] = {"color": colour, "marker": "o", "markersize": size, "linewidth": size / 2}
            diagram.plot(*np.reshape(calibration_points(table), (-1, 2)).T, label=label, **line)
            counts.stairs(table["count"], table["edges"], color=colour)
    diagram.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    diagram.grid(alpha=0.3)
    diagram.legend(loc="upper left", fontsize=7)
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.5)
    counts.grid(alpha=0.3)


def _show_names_literally(legend: Legend) -> None:
    """Names may hold dollar signs, between which matplotlib expects TeX, and letters that no font has."""
    for text in legend.get_texts():
        text.set(text=on_one_line(text.get_text()), parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
