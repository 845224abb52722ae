"""Fine-tuning against training from scratch: STU-Net-S on the two halves of the hippocampus data.

Run with `python benchmarks/fine_tuning.py DATA/Task04_Hippocampus OUT`; about a quarter of an hour on two cores. One
half of the cases pre-trains a network with one image channel and one class (the whole hippocampus). The other half
trains a network with two channels (the image and the size of its gradient) and two classes (anterior, posterior), once
from random weights and once from the first network, all else alike. Writes both data sets, the runs, and the curve of
validation Dice over steps; prints the steps that each needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from scipy import ndimage

ROOT = Path(__file__).parent.parent
PRETRAINING_STEPS = 400
STEPS = 240
STEPS_PER_EPOCH = 20
GIVEN_DICE = (0.70, 0.75, 0.80, 0.82, 0.85)
RECIPE = ("--preset", "cpu", "--config", str(ROOT / "configs/stunet.yaml"), "-d", "cpu")
# A short run: the moving average of the weights has to keep up, and a dozen cases suffice to follow it.
SETTINGS = ("training.ema_decay=0.9", "training.validation_cases=12")


def main() -> None:
    """Make the data sets, train three networks, print and draw the curves."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    held_out = (ROOT / "benchmarks/hippocampus_held_out.txt").read_text(encoding="utf-8").split("\n")
    images = [path for path in sorted((source / "imagesTr").glob("hippo*.nii.gz")) if _case(path) not in held_out]
    first = write_data(source, images[::2], out / "Dataset001_Whole", is_whole=True)
    second = write_data(source, images[1::2], out / "Dataset002_Parts", is_whole=False)
    train(first, out / "pretrained", PRETRAINING_STEPS, 100)
    train(second, out / "scratch", STEPS, STEPS_PER_EPOCH)
    train(second, out / "fine_tuned", STEPS, STEPS_PER_EPOCH, "--weights", str(out / "pretrained"))
    curves = {name: read_curve(out / name) for name in ("scratch", "fine_tuned")}
    print(json.loads((out / "fine_tuned/weights.json").read_text())["report"]["notes"])
    print("steps   " + "  ".join(f"{name:>10}" for name in curves))
    for step in curves["scratch"]:
        print(f"{step:5}   " + "  ".join(f"{curve[step]:10.3f}" for curve in curves.values()))
    for dice in GIVEN_DICE:
        needed = {name: next((step for step, d in curve.items() if d >= dice), None) for name, curve in curves.items()}
        print(f"Dice {dice:.2f} reached after: {needed}")
    draw(curves, out / "fine_tuning.png")


def write_data(source: Path, images: list[Path], folder: Path, *, is_whole: bool) -> Path:
    """An nnU-Net raw data set: one channel and one class if `is_whole`, else two and two."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in images:
        image, label = nib.load(path), nib.load(source / "labelsTr" / path.name)
        array, labels = image.get_fdata(dtype=np.float32), np.asarray(label.dataobj).astype(np.uint8)
        channels = [array] if is_whole else [array, ndimage.gaussian_gradient_magnitude(array, 1.0)]
        for number, channel in enumerate(channels):
            nib.save(nib.Nifti1Image(channel, image.affine), folder / "imagesTr" / f"{_case(path)}_{number:04}.nii.gz")
        labels = (labels > 0).astype(np.uint8) if is_whole else labels
        nib.save(nib.Nifti1Image(labels, image.affine), folder / "labelsTr" / path.name)
    names = {"hippocampus": 1} if is_whole else {"Anterior": 1, "Posterior": 2}
    document = {
        "channel_names": {"0": "MRI"} if is_whole else {"0": "MRI", "1": "gradient"},
        "labels": {"background": 0, **names},
        "numTraining": len(images),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def train(data: Path, run: Path, steps: int, steps_per_epoch: int, *options: str) -> None:
    """One run of `segkit train`."""
    settings = (*SETTINGS, f"training.steps={steps}", f"training.steps_per_epoch={steps_per_epoch}")
    command = [sys.executable, "-m", "segkit", "train", str(data), "-o", str(run), *RECIPE, *options, "--overwrite"]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True)


def read_curve(run: Path) -> dict[int, float]:
    """Validation Dice by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["score"] for record in records if "score" in record}


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Dice over steps, one line for each run."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    titles = {"scratch": "from random weights", "fine_tuned": "from weights of the other half"}
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=titles[name])
    axes.set(xlabel="optimisation steps", ylabel="validation Dice", title="STU-Net-S, hippocampus")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def _case(path: Path) -> str:
    return path.name.removesuffix(".nii.gz")


if __name__ == "__main__":
    main()
