"""Which network fills holes best, and do they beat simple fills? Leave one subject out, three seeds.

    python benchmarks/inpainting.py train DATA OUT [--part K/N] [--steps 400] [--seeds 3] [--variants basic ...]
    python benchmarks/inpainting.py score DATA OUT [--part K/N] [--holes 12]
    python benchmarks/inpainting.py table OUT
    python benchmarks/inpainting.py draw DATA OUT SUBJECT PICTURE

DATA has one folder for each subject, with a T1 scan and a mask of what is not healthy, as any layout of segkit has
them. `train` calls `segkit pretrain --method inpainting` with all folders but one; `score` fills holes in the one left
out with each network and each simple fill, by the metrics of the BraTS challenge and SSIM in 3D; runs and scores that
are there already are not made again, so that parts can go side by side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from simple_fills import FILLS, mirror_fill

from segkit.inpainting.inputs import find_midline, mirror_of
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.metrics.synthesis import ssim_3d, synthesis_scores
from segkit.preparing.holes import HoleMaker, HolesConfig, brain_mask, grow, tumour_components
from segkit.preparing.preprocessing import load_case
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.reading.layouts.table import PLAIN_CLASSES, find_cases
from segkit.reading.volume import Grid

MODALITY = "t1n"
VARIANTS = {
    "instance": {"encoder_norm": "instance", "decoder_norm": "instance"},
    "rn-b": {"encoder_norm": "region", "decoder_norm": "instance"},
    "rn-b rn-l": {"encoder_norm": "region", "decoder_norm": "learnable"},
}
"""Norms of encoder and decoder; everything else is the same."""
SHOWN = ("ssim", "ssim_3d", "psnr", "mse")
DIAMETERS = (11.5, 30.0)
"""Voxels: 800 to 14,000 voxels of 1 mm."""


def main() -> None:
    """Read the command line and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "score", "table", "draw"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--holes", type=int, default=12)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(*arguments.paths, arguments)
    elif arguments.what == "score":
        score(*arguments.paths, arguments)
    elif arguments.what == "table":
        table(*arguments.paths)
    else:
        draw(*arguments.paths)


def subjects(data: Path) -> list[Path]:
    """The folders of the subjects."""
    return sorted(path for path in data.iterdir() if path.is_dir())


def runs(data: Path, out: Path, arguments: argparse.Namespace) -> Iterator[tuple[Path, str, int, Path]]:
    """Subject left out, variant, seed and run folder of this part of the work."""
    part, parts = map(int, arguments.part.split("/"))
    wanted = [
        (subject, variant, seed)
        for seed in range(arguments.seeds)
        for subject in subjects(data)
        for variant in arguments.variants
    ]
    for subject, variant, seed in wanted[part::parts]:
        yield subject, variant, seed, out / f"{subject.name}_{variant.replace(' ', '_')}_{seed}"


def train(data: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Train every network of this part."""
    for subject, variant, seed, run in runs(data, out, arguments):
        if "after" in _summary(run):
            continue
        others = [str(folder) for folder in subjects(data) if folder != subject]
        network = {"context": "mirror", "widths": [16, 32, 64, 128], **VARIANTS[variant]}
        settings = [
            f"modalities=[{MODALITY}]",
            f"network.arguments={json.dumps(network)}",
            "patches.size=48",
            f"holes.diameter_range={list(DIAMETERS)}",
            "holes.largest_share=0.15",
            "holes.count_range=[1, 3]",
            f"training.steps={arguments.steps}",
            "training.steps_per_epoch=200",
            "training.ema_decay=0.98",
            "training.precision=bf16",
            "training.workers=0",
            f"training.seed={seed}",
            "validation_holes=8",
            f"data.cache={out / 'cache'}",
            *arguments.settings,
        ]
        command = [sys.executable, "-m", "segkit", "pretrain", *others, "-o", str(run), "--method", "inpainting"]
        command += ["--preset", "cpu", "--overwrite", "--quiet", *(f"--set={setting}" for setting in settings)]
        subprocess.run(command, check=True)


def _summary(run: Path) -> dict[str, object]:
    """How a run ended; nothing of it where it is not done."""
    path = run / "validation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def scan(subject: Path) -> tuple[np.ndarray, np.ndarray, Grid]:
    """The T1 scan of a subject (1, D, H, W) in RAS, what is not healthy in it, and the grid."""
    cohort = find_cases(subject, label_scheme=PLAIN_CLASSES)
    loaded = load_case(cohort.cases[0], (MODALITY,), cohort.scheme)
    turn = reorientation_to(loaded.grid)
    lesion = np.zeros(loaded.grid.shape, bool) if loaded.labels is None else loaded.labels > 0
    return turn.apply(loaded.image), turn.apply(lesion), reoriented_grid(loaded.grid, turn)


def holes_of(data: Path, subject: Path, count: int) -> list[np.ndarray]:
    """Holes in healthy tissue of a subject: blobs, and the tumours of the other subjects."""
    shapes = []
    for other in subjects(data):
        if other != subject:
            image, lesion, _ = scan(other)
            shapes += [shape.mask for shape in tumour_components(lesion, brain_mask(image[0]) | lesion)]
    image, lesion, _ = scan(subject)
    config = HolesConfig(boxes=0, strokes=0, blobs=0.7, tumours=0.3, diameter_range=DIAMETERS, largest_share=0.002)
    maker = HoleMaker(config, shapes)
    brain, healthy = brain_mask(image[0]) | lesion, ~grow(lesion, config.margin_voxels)
    return [maker.draw(brain, healthy, np.random.default_rng((7, number))) for number in range(count)]


def score(data: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Fill the holes of the subjects left out by every method of this part, and write the scores."""
    models = defaultdict(dict)
    for subject, variant, seed, run in runs(data, out, arguments):
        if "after" in _summary(run):
            models[subject][f"{variant} #{seed}"] = run
    simple = (*FILLS, "mirror") if arguments.part.startswith("0/") else ()
    for subject in subjects(data):
        image, lesion, grid = scan(subject)
        holes = holes_of(data, subject, arguments.holes)
        for name in (*simple, *models[subject]):
            path = out / "scores" / f"{subject.name}_{name.replace(' ', '_')}.json"
            if path.exists():
                continue
            predictor = InpaintingPredictor.load(models[subject][name], "cpu", "torch") if name not in simple else None
            rows = [scores(image, hole, fill(name, image, hole, lesion, grid, predictor)) for hole in holes]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"subject": subject.name, "method": name, "rows": rows}))
            means = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in (*SHOWN, "voxels")}
            print(subject.name, name, means, flush=True)


def fill(
    name: str,
    image: np.ndarray,
    hole: np.ndarray,
    lesion: np.ndarray,
    grid: Grid,
    predictor: InpaintingPredictor | None = None,
) -> np.ndarray:
    """The scan with the hole filled by a method, given nothing of what is in it."""
    voided = np.where(hole, np.float32(0), image)
    if predictor is not None:
        return predictor.fill(voided, hole, grid)
    if name == "mirror":
        return mirror_fill(voided, hole, *mirror_of(voided, hole | lesion, find_midline(voided)))
    return FILLS[name](voided, hole)


def scores(image: np.ndarray, hole: np.ndarray, filled: np.ndarray) -> dict[str, float]:
    """The scores of one filled hole, and its voxels."""
    if not np.array_equal(filled[:, ~hole], image[:, ~hole]):
        raise AssertionError("a known voxel was changed")
    voided = np.where(hole, np.float32(0), image)
    row = synthesis_scores(filled[0], image[0], hole, voided[0])
    row["ssim_3d"] = ssim_3d(filled[0], image[0], hole, voided[0])
    return {"voxels": int(hole.sum()), **{key: float(value) for key, value in row.items()}}


def draw(data: Path, out: Path, subject: Path, picture: Path) -> None:
    """Slices of three holes of a subject (a name in DATA): truth, hole, simple fills, networks of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    subject = data / subject.name
    image, lesion, grid = scan(subject)
    holes = sorted(holes_of(data, subject, 12), key=lambda hole: int(hole.sum()))[-3:]
    names = ["truth", "hole", "mirror", "biharmonic", *VARIANTS]
    figure, axes = pyplot.subplots(len(holes), len(names), figsize=(1.7 * len(names), 1.75 * len(holes)))
    for row, hole in zip(axes, holes, strict=True):
        middle = [int(place.mean()) for place in np.nonzero(hole)]
        near = tuple(slice(max(0, place - 32), place + 32) for place in middle[:2])
        for axis, name in zip(row, names, strict=True):
            if name == "truth":
                shown = image
            elif name == "hole":
                shown = np.where(hole, np.float32(0), image)
            else:
                run = out / f"{subject.name}_{name.replace(' ', '_')}_0"
                predictor = InpaintingPredictor.load(run, "cpu", "torch") if name in VARIANTS else None
                shown = fill(name, image, hole, lesion, grid, predictor)
            axis.imshow(shown[0][(*near, middle[2])].T, origin="lower", cmap="gray", vmin=0, vmax=image.max() * 0.8)
            axis.axis("off")
            if hole is holes[0]:
                axis.set_title(name, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(picture, dpi=110)


def table(out: Path) -> None:
    """Means over holes, for each method and subject; of several seeds mean and standard deviation."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted((out / "scores").glob("*.json")):
        document = json.loads(path.read_text())
        method = document["method"].split(" #")[0]
        means = {key: np.mean([row[key] for row in document["rows"]]) for key in SHOWN}
        found[method][document["subject"]].append(means)
    names = sorted({subject for by_subject in found.values() for subject in by_subject})
    print(
        "| method | " + " | ".join(f"{name}: SSIM, SSIM 3D, PSNR, MSE" for name in names) + " | mean SSIM | mean MSE |"
    )
    print("|---" * (len(names) + 3) + "|")
    for method, by_subject in found.items():
        cells, overall = [], defaultdict(list)
        for name in names:
            seeds = by_subject[name]
            cells.append(", ".join(_spread([seed[key] for seed in seeds], key) for key in SHOWN))
        for seed in range(min(len(by_subject[name]) for name in names)):
            for key in ("ssim", "mse"):
                overall[key].append(np.mean([by_subject[name][seed][key] for name in names]))
        print(
            f"| {method} | " + " | ".join(cells) + " | " + " | ".join(_spread(v, k) for k, v in overall.items()) + " |"
        )


def _spread(values: list[float], key: str) -> str:
    digits = {"psnr": 2, "mse": 4}.get(key, 3)
    shown = f"{np.mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {np.std(values, ddof=1):.{digits}f}"


if __name__ == "__main__":
    main()
