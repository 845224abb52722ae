"""The tables and pictures of `benchmarks/inpainting.py`, from the lines of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = {"ssim": "SSIM", "mse": "MSE", "ssim_3d": "SSIM 3D", "psnr": "PSNR"}
"""Scores of a hole, and their names in a table."""

Line = Mapping[str, Any]


def print_table(table: str, found: Mapping[str, Sequence[Line]], bins: Sequence[str]) -> None:
    """Print a Markdown table of the lines of each arm; arms without a line are left out."""
    found = {arm: lines for arm, lines in found.items() if lines}
    if table == "anomaly":
        print_anomaly(found)
    elif table == "split":
        print_split(found)
    else:
        print_scores(found, bins)
        for arm, lines in found.items():
            if arm != "biharmonic" and "biharmonic" in found:
                print_difference(arm, lines, found["biharmonic"], bins[0])


def print_anomaly(found: Mapping[str, Sequence[Line]]) -> None:
    """The area under the ROC curve of each case; of several seeds the mean."""
    cases = list(dict.fromkeys(line["case"] for lines in found.values() for line in lines))
    print(f"| map | steps | {' | '.join(cases)} |\n|---|---:|{'---:|' * len(cases)}")
    for arm, lines in found.items():
        of_case = ([line["auroc"] for line in lines if line["case"] == case] for case in cases)
        shown = " | ".join(f"{np.mean(values):.3f}" if values else "" for values in of_case)
        print(f"| {arm} | {lines[0]['steps']} | {shown} |")


def print_split(found: Mapping[str, Sequence[Line]]) -> None:
    """For each RN-L layer the share of the hole, and of the rest, that it takes for the hole; means over cases."""
    print("| arm | layer | of the hole | of the rest |\n|---|---|---:|---:|")
    for arm, lines in found.items():
        for layer in lines[0]["shares"]:
            hole, rest = np.nanmean([line["shares"][layer] for line in lines], 0)
            print(f"| {arm} | {layer} | {hole:.3f} | {rest:.3f} |")


def print_scores(found: Mapping[str, Sequence[Line]], bins: Sequence[str]) -> None:
    """Mean scores over the holes of each bin, of all seeds."""
    shown = ", ".join(SHOWN.values())
    print(f"| filled by | steps | seeds | {' | '.join(f'{name}: {shown}' for name in bins)} |")
    print(f"|---|---:|---:|{'---|' * len(bins)}")
    for arm, lines in found.items():
        cells = []
        for name in bins:
            holes = [[hole[key] for key in SHOWN] for line in lines for hole in line["holes"] if hole["bin"] == name]
            cells.append("{:.3f}, {:.4f}, {:.3f}, {:.2f}".format(*np.mean(holes, 0)) if holes else "")
        print(f"| {arm} | {lines[0]['steps']} | {len({line['seed'] for line in lines})} | {' | '.join(cells)} |")


def print_difference(arm: str, lines: Sequence[Line], fills: Sequence[Line], smallest: str) -> None:
    """An arm against the biharmonic fill outside the smallest bin, with 95 % intervals over cases."""
    cases = sorted({line["case"] for line in lines} & {line["case"] for line in fills})
    (ssim, mse), (ssim_of_fill, mse_of_fill) = (
        np.array([_means(of, case, smallest) for case in cases]).T for of in (lines, fills)
    )
    drawn = np.random.default_rng(0).integers(len(cases), size=(10_000, len(cases)))
    gains = (ssim - ssim_of_fill)[drawn].mean(1)
    ratios = 100 * (mse[drawn].mean(1) / mse_of_fill[drawn].mean(1) - 1)
    gain, ratio = float((ssim - ssim_of_fill).mean()), 100 * (mse.mean() / mse_of_fill.mean() - 1)
    by_seed = [
        np.mean([_means([line for line in lines if line["seed"] == seed], case, smallest)[0] for case in cases])
        for seed in sorted({line["seed"] for line in lines})
        if {line["case"] for line in lines if line["seed"] == seed} >= set(cases)
    ]
    spread = f", deviation over seeds {np.std(by_seed, ddof=1):.4f}" if len(by_seed) > 1 else ""
    print(
        "{} against biharmonic, holes larger than {}: SSIM {:+.4f} ({:+.4f} to {:+.4f}){}, "
        "MSE {:+.1f} % ({:+.1f} to {:+.1f}), {} cases".format(
            *(arm, smallest.removeprefix("up to "), gain, *np.percentile(gains, [2.5, 97.5]), spread),
            *(ratio, *np.percentile(ratios, [2.5, 97.5]), len(cases)),
        )
    )


def _means(lines: Sequence[Line], case: str, smallest: str) -> tuple[float, float]:
    """Mean SSIM and MSE over the holes of a case outside the smallest bin."""
    holes = [hole for line in lines if line["case"] == case for hole in line["holes"] if hole["bin"] != smallest]
    return float(np.mean([hole["ssim"] for hole in holes])), float(np.mean([hole["mse"] for hole in holes]))


def save_grid(rows: Sequence[Sequence[tuple[str, np.ndarray]]], path: Path, largest: float) -> None:
    """Pictures (W, H) with titles in rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(rows), len(rows[0]), figsize=(1.7 * len(rows[0]), 1.9 * len(rows)), squeeze=False
    )
    for axis, (title, picture) in zip(axes.ravel(), (cell for row in rows for cell in row), strict=True):
        axis.imshow(picture.T, origin="lower", cmap="gray", vmin=0, vmax=largest)
        axis.set_title(title, fontsize=5)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    print(path.name)
