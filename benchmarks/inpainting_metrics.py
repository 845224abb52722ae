"""Do the challenge's scores of `segkit.metrics.synthesis` agree with those of the organisers' own package?

Run with `python benchmarks/inpainting_metrics.py CASE --official PYTHON`: a folder of the challenge that holds `-t1n`,
`-t1n-voided` and `-mask`, and an interpreter that has the package, which lives in an environment of its own because of
its licence: `python -m venv official && official/bin/pip install inpainting==0.0.12`. The prediction is a
harmonic fill with seeded noise, and `-mask` stands in for the healthy mask, which the challenge keeps. Five phantoms
follow, each with a ball of another place and size. One minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from segkit.inpainting.inputs import smooth_fill
from segkit.metrics.synthesis import SYNTHESIS_SCORES, ssim_3d, synthesis_scores
from segkit.phantoms.phantom import make_phantom
from segkit.reading.files import read_volume

PHANTOMS = 5

OFFICIAL = """
import json, sys
from inpainting.challenge_metrics_2023 import compute_image_quality_metrics
print(json.dumps(compute_image_quality_metrics(**json.loads(sys.argv[1]))))
"""


class Trial(NamedTuple):
    """Four volumes (D, H, W): the prediction, the truth, the mask, and the voided image."""

    name: str
    prediction: np.ndarray
    reference: np.ndarray
    hole: np.ndarray
    voided: np.ndarray


def make_up(name: str, reference: np.ndarray, hole: np.ndarray, voided: np.ndarray, seed: int) -> Trial:
    """A trial whose prediction is a harmonic fill with noise of a tenth of the tissue's deviation."""
    image = voided.astype(np.float32)
    noise = np.random.default_rng(seed).normal(0, 0.1 * image[image > 0].std(), image.shape)
    prediction = smooth_fill(image[None], hole, power=1)[0]
    prediction[hole] += noise[hole].astype(np.float32)
    return Trial(name, prediction, reference.astype(np.float32), hole, image)


def trials(case: Path) -> Iterator[Trial]:
    """The real case, then the phantoms."""
    reference, voided, mask = (
        read_volume(case / f"{case.name}-{part}.nii.gz").array for part in ("t1n", "t1n-voided", "mask")
    )
    yield make_up(case.name, reference, mask > 0, voided, seed=0)
    for number in range(PHANTOMS):
        reference = make_phantom(number, size=64, seed=2023).images["t1n"]
        generator = np.random.default_rng(number)
        tissue = np.argwhere(reference > 0)
        centre, radius = generator.choice(tissue), generator.integers(5, 14)
        distance = np.linalg.norm(np.indices(reference.shape).T - centre, axis=-1).T
        hole = distance <= radius
        yield make_up(f"phantom {number}", reference, hole, np.where(hole, 0, reference), seed=number)


def official_scores(python: Path, trial: Trial) -> dict[str, float]:
    """What the organisers' package says of a trial, asked through files."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"prediction": trial.prediction, "healthy_mask": trial.hole.astype(np.uint8)}
        arguments |= {"reference_t1": trial.reference, "voided_t1": trial.voided}
        paths = {name: str(Path(folder, f"{name}.nii")) for name in arguments}
        for name, array in arguments.items():
            nib.save(nib.Nifti1Image(array, np.eye(4)), paths[name])
        command = [str(python), "-c", OFFICIAL, json.dumps(paths)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path, help="folder of one case of the challenge")
    parser.add_argument("--official", type=Path, required=True, help="interpreter that has the package `inpainting`")
    options = parser.parse_args()
    print("| case | hole voxels | score | segkit | official | difference |")
    print("|---|---|---|---|---|---|")
    largest = 0.0
    for trial in trials(options.case):
        ours, theirs = synthesis_scores(*trial[1:]), official_scores(options.official, trial)
        for name in SYNTHESIS_SCORES:
            difference = ours[name] - theirs[name]
            largest = max(largest, abs(difference))
            row = f"{name} | {ours[name]:.7f} | {theirs[name]:.7f} | {difference:+.1e}"
            print(f"| {trial.name} | {trial.hole.sum()} | {row} |")
        print(f"| {trial.name} | {trial.hole.sum()} | ssim_3d | {ssim_3d(*trial[1:]):.7f} | | |", flush=True)
    print(f"\nlargest difference {largest:.1e}")


if __name__ == "__main__":
    main()
