"""Sparse annotation with the ignore label: full masks, every third slice, and background in place of the rest.

Run with `python benchmarks/ignore_label.py DATA/Task04_Hippocampus OUT [--budget 5m] [--seeds 3]`. Three arms train on
the same cases, which are those not named in `benchmarks/hippocampus_held_out.txt`:

* full: the masks as they are;
* ignored: all voxels outside every third slice (of axis 2) of the training cases are the ignore label;
* background: these voxels are background.

Each arm takes `--budget` per seed. Scored on the held-out cases with full masks. Prints a Markdown table of the mean
Dice over cases and both parts of the hippocampus. Expected: "ignored" within 0.03 of "full"; "background" well below it
with the default loss, and hardly anything found with cross-entropy alone (`--set loss.dice_weight=0`). Writes the data
sets, with links to the images, and the runs below OUT; finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

import segkit
from segkit.metrics.overlap import dice_by_region
from segkit.reading.files import read_labels

HELD_OUT = Path(__file__).with_name("hippocampus_held_out.txt")
ARMS = ("full", "ignored", "background")
EVERY, IGNORE = 3, 9
REGIONS = {"Anterior": (1,), "Posterior": (2,)}


def main() -> None:
    """Train and score every arm with every seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the Decathlon's Task04_Hippocampus")
    parser.add_argument("out", type=Path, help="folder of data sets and runs")
    parser.add_argument("--budget", default="5m", help="time of each training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each arm, with seeds 0, 1 ...")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="such as loss.dice_weight=0")
    parser.add_argument("-d", "--device", default="auto")
    arguments = parser.parse_args()
    listed = HELD_OUT.read_text(encoding="utf-8").splitlines()
    held_out = [line for line in listed if line and not line.startswith("#")]
    settings = dict(setting.split("=", 1) for setting in arguments.settings)
    table: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        folder = write_data(arguments.data, arguments.out / arm / "data", arm, held_out)
        for seed in range(arguments.seeds):
            run = arguments.out / arm / f"run_{seed}"
            if not (run / "validation.json").exists():
                segkit.train(
                    folder, run, preset=arguments.preset, budget=arguments.budget, device=arguments.device,
                    overwrite=True, **{"training.seed": seed}, **settings,
                )  # fmt: skip
            table[arm].append(score(run, arguments.data, held_out, arguments.device))
    print(f"Mean Dice of {len(held_out)} held-out cases, {arguments.budget} for each training\n")
    print(f"| training masks | {' | '.join(f'seed {seed}' for seed in range(arguments.seeds))} | mean | minus full |")
    print(f"|---|{'---:|' * (arguments.seeds + 2)}")
    for arm, values in table.items():
        mean = float(np.mean(values))
        shown = [*values, mean, mean - float(np.mean(table["full"]))]
        print(f"| {arm} | {' | '.join(f'{value:.3f}' for value in shown)} |")


def write_data(source: Path, folder: Path, arm: str, held_out: list[str]) -> Path:
    """The training cases with the masks of an arm, and their `dataset.json`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "imagesTr").mkdir()
    paths = [path for path in sorted((source / "labelsTr").glob("hippo*.nii.gz")) if stem(path) not in held_out]
    for path in paths:
        mask = nib.load(path)
        labels = masked(np.asarray(mask.dataobj).astype(np.uint8), arm)
        nib.save(nib.Nifti1Image(labels, mask.affine, dtype=np.uint8), folder / "labelsTr" / path.name)
        (folder / "imagesTr" / path.name).symlink_to((source / "imagesTr" / path.name).absolute())
    document = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    names = document["labels"] | ({str(IGNORE): "ignore"} if arm == "ignored" else {})
    files = [{"image": f"./imagesTr/{path.name}", "label": f"./labelsTr/{path.name}"} for path in paths]
    document |= {"labels": names, "training": files, "test": [], "numTraining": len(files)}
    (folder / "dataset.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return folder


def masked(labels: NDArray[np.uint8], arm: str) -> NDArray[np.uint8]:
    """The mask (D, H, W) of an arm: every third plane of axis 2 is kept."""
    if arm != "full":
        labels[..., np.arange(labels.shape[2]) % EVERY != EVERY // 2] = IGNORE if arm == "ignored" else 0
    return labels


def score(run: Path, data: Path, case_ids: list[str], device: str) -> float:
    """Mean Dice over cases and regions, on full masks; a region that is in neither mask is left out."""
    predictor = segkit.Predictor.load(run, device=device)
    values: list[float] = []
    for case_id in case_ids:
        labels, _ = read_labels(data / "labelsTr" / f"{case_id}.nii.gz")
        found = predictor(data / "imagesTr" / f"{case_id}.nii.gz").labels
        values += dice_by_region(found, labels, REGIONS).values()
    return float(np.nanmean(values))


def stem(path: Path) -> str:
    """The id of a case."""
    return path.name.removesuffix(".nii.gz")


if __name__ == "__main__":
    main()
