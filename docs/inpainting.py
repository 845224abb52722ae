"""Which network fills holes best, and do they beat simple fills? Leave one subject out, three seeds.

    python docs/inpainting.py train DATA OUT [--part K/N] [--steps 400] [--seeds 3] [--variants basic ...]
    python docs/inpainting.py score DATA OUT [--part K/N] [--holes 12]
    python docs/inpainting.py table OUT [--pictures docs/images]

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

from segkit.data.geometry import reorientation_to, reoriented_grid
from segkit.data.holes import HoleMaker, HolesConfig, brain_mask, grow
from segkit.data.holes_tumour import tumour_components
from segkit.data.layouts.table import PLAIN_CLASSES, find_cases
from segkit.data.preprocessing import load_case
from segkit.data.symmetry import find_midline
from segkit.data.volume import Grid
from segkit.inpainting.fill import FILLS, mirror_fill
from segkit.inpainting.inputs import mirror_of
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.metrics.synthesis import ssim_3d, synthesis_scores

MODALITY = "t1n"
VARIANTS = {
    "instance": {"encoder_norm": "instance", "decoder_norm": "instance"},
    "rn-b": {"encoder_norm": "region", "decoder_norm": "instance"},
    "rn-b rn-l": {"encoder_norm": "region", "decoder_norm": "learnable"},
}
"""Norms of encoder and decoder; everything else is the same."""
DIAMETERS = (11.5, 30.0)
"""Voxels: 800 to 14,000 voxels of 1 mm."""


def main() -> None:
    """Read the command line and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "score", "table"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--holes", type=int, default=12)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(*arguments.folders, arguments)
    elif arguments.what == "score":
        score(*arguments.folders, arguments)
    else:
        table(arguments.folders[0])
        if arguments.pictures:
            draw(arguments.folders[0], arguments.pictures)


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
        if (run / "validation.json").exists():
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
    """Fill the holes of the subjects left out by every method, and write the scores."""
    models = defaultdict(dict)
    for subject, variant, seed, run in runs(data, out, arguments):
        if (run / "validation.json").exists():
            models[subject][f"{variant} #{seed}"] = run
    part = int(arguments.part.split("/")[0])
    for subject in subjects(data):
        image, lesion, grid = scan(subject)
        holes = holes_of(data, subject, arguments.holes)
        methods = {name: (lambda i, h, fill=fill: fill(i, h)) for name, fill in FILLS.items()} if part == 0 else {}
        if part == 0:
            methods["mirror"] = lambda i, h: mirror_fill(i, h, *mirror_of(i, h | lesion, find_midline(i * ~h)))
        for name, run in models[subject].items():
            predictor = InpaintingPredictor.load(run, "cpu", "torch")
            methods[name] = lambda i, h, predictor=predictor: predictor.fill(i, h, grid)
        for name, fill in methods.items():
            path = out / "scores" / f"{subject.name}_{name.replace(' ', '_')}.json"
            if path.exists():
                continue
            rows = []
            for hole in holes:
                voided = np.where(hole, np.float32(0), image)
                filled = fill(voided, hole)
                assert np.array_equal(filled[:, ~hole], image[:, ~hole])
                row = synthesis_scores(filled[0], image[0], hole, voided[0])
                row["ssim_3d"] = ssim_3d(filled[0], image[0], hole, voided[0])
                rows.append({"voxels": int(hole.sum()), **{key: float(value) for key, value in row.items()}})
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"subject": subject.name, "method": name, "rows": rows}))
            means = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
            print(subject.name, name, means, flush=True)


def table(out: Path) -> None:
    """Means over holes, for each method and subject; of several seeds mean and standard deviation."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted((out / "scores").glob("*.json")):
        document = json.loads(path.read_text())
        method = document["method"].split(" #")[0]
        means = {key: np.mean([row[key] for row in document["rows"]]) for key in ("ssim", "ssim_3d", "psnr", "mse")}
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
            cells.append(
                ", ".join(_spread([seed[key] for seed in seeds], key) for key in ("ssim", "ssim_3d", "psnr", "mse"))
            )
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
