"""Do the scores of protocol `brats2026` agree with those of the organisers' own package, and how long do both take?

Run with `python benchmarks/official_metrics.py --official PYTHON [--pair CHALLENGE PREDICTION REFERENCE]...`: an
interpreter that has the package, which lives in an environment of its own because of its licence (`python -m venv
official && official/bin/pip install brats-evaluation==0.0.10`), and pairs of masks in the label values of 2024 and
later. Seeded phantoms follow: first one for each way to have nothing in common, then random ones with lesions that the
prediction splits, merges, misses, shifts and invents, half of them on grids that are not of 1 mm.

Every number of the package's documents is compared, those of each lesion too: NaN and infinity must stand in the same
places and the others differ by at most 1e-6. One kind of disagreement is known, and rare: where two matchings have the
same sum of Dice, HD95 and NSD are of whichever was taken.

Times are of the installed commands on the same folders, in turn, the best of `--rounds`, in seconds of processor time,
which other work on the machine disturbs least; what each command takes for a pair of 8^3 voxels is its start, and is
given apart.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from segkit.evaluation.score_folder import scored_regions
from segkit.labels import SCHEMES
from segkit.metrics.brats2026 import PENALTY_MM
from segkit.metrics.lesions import Lesion, RegionScores
from segkit.metrics.protocols import score_case
from segkit.reading.files import read_labels

TOLERANCE = 1e-6

# challenge -> name of the package's configuration, label scheme, how its cases are called
CHALLENGES = {
    "gli": ("gli", "brats2024", "BraTS-GLI-{:05d}-100"),
    "met": ("mets", "brats2024", "BraTS-MET-{:05d}-000"),
    "ped": ("ped", "brats-ped", "BraTS-PED-{:05d}-000"),
    "men": ("MenPre", "brats2023", "BraTS-MEN-{:05d}-000"),
    "goat": ("GoAT", "brats2023", "BraTS-GoAT-{:05d}-000"),
    "men-rt": ("MenRT", "brats-men-rt", "BraTS-MEN-RT-{:04d}-1"),
}

DETECTION = {"tp": "tp", "fp": "fp", "fn": "fn", "prec": "precision", "rec": "recall", "f1": "f1"}
MEASURES = {"dsc": "dice", "hd95": "hd95_mm", "nsd": "nsd"}
WHOLE = {"dsc": "dice", "hd95": "hd95_voxels", "nsd": "nsd_half_voxel"}

DOCUMENT = {
    **{name: f"lesion_{ours}" for name, ours in DETECTION.items() if name != "f1"},
    "rq": "lesion_f1",
    "pq_dsc": "pq_dice",
    **{f"sq_{name}": f"sq_{ours}" for name, ours in MEASURES.items()},
    **{f"sq_{name}_std": f"sq_{ours}_std" for name, ours in MEASURES.items()},
    **{f"global_bin_{name}": ours for name, ours in WHOLE.items()},
}
"""What `brats-evaluate` writes for a region -> what segkit calls it."""

ALL_TABLES = {
    **{f"all_instance_{name}": f"lesion_{ours}" for name, ours in DETECTION.items()},
    **{f"global_{name}": ours for name, ours in WHOLE.items()},
}


def lesionwise(prefix: str) -> dict[str, str]:
    """The lesion-wise columns of a table, which the package fills by other rules for metastases."""
    means = {f"lesionwise_{name}_mean": f"{prefix}_{ours}" for name, ours in MEASURES.items()}
    return means | {f"lesionwise_{name}_std": f"{prefix}_{ours}_std" for name, ours in MEASURES.items()}


TABLES = {
    "seg": ALL_TABLES | lesionwise("sq"),
    "mets": ALL_TABLES
    | lesionwise("lesionwise")
    | {
        f"{size}_instance_{name}": f"{size}_lesion_{ours}"
        for size in ("large", "small")
        for name, ours in DETECTION.items()
    },
}
"""Command of `brats-parse-metrics` -> its columns, without the region at their end -> what segkit calls them."""


class Trial(NamedTuple):
    """A pair of label maps (D, H, W) of a challenge on one grid."""

    name: str
    challenge: str
    prediction: np.ndarray
    reference: np.ndarray
    affine: np.ndarray


class Comparison:
    """How many numbers were compared, how far the worst is off, and which do not agree."""

    def __init__(self) -> None:
        self.numbers = 0
        self.largest = 0.0
        self.disagreements: list[str] = []

    def add(self, what: str, ours: float, theirs: float) -> None:
        self.numbers += 1
        if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
            return
        difference = abs(ours - theirs)
        if not difference <= TOLERANCE:
            self.disagreements.append(f"{what}: {ours} against {theirs}")
        else:
            self.largest = max(self.largest, difference)


def phantoms(count: int, seed: int) -> Iterator[Trial]:
    """One phantom for each kind of nothing, then `count` random ones, through the challenges in turn."""
    challenges = list(CHALLENGES)
    nothing = np.zeros((20, 24, 28), np.uint8)
    lesion, speck = nothing.copy(), nothing.copy()
    lesion[4:9, 4:9, 4:9] = 1
    speck[15, 15, 15:18] = 1
    for challenge in challenges:
        for what, prediction, reference in (
            ("empty, empty", nothing, nothing),
            ("invented", lesion, nothing),
            ("missed", nothing, lesion),
            ("apart", speck, lesion),
            ("speck missed", nothing, speck),
            ("speck found", speck, speck),
            ("speck and invented", speck | lesion, speck),
        ):
            yield Trial(f"{challenge}: {what}", challenge, prediction, reference, np.eye(4))
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        challenge = challenges[number % len(challenges)]
        spacing = (1.0, 1.0, 1.0) if generator.random() < 1 / 2 else generator.choice([0.5, 0.7, 1.0, 1.5, 3.0, 5.0], 3)
        prediction, reference = random_pair(generator, max(SCHEMES[CHALLENGES[challenge][1]].values.values()))
        name = f"random {number} ({challenge}, {' x '.join(f'{value:g}' for value in spacing)} mm)"
        yield Trial(name, challenge, prediction, reference, np.diag([*spacing, 1.0]))


def random_pair(generator: np.random.Generator, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference: ellipsoids of labels 1 to `labels` in shells, each outlined in one of six ways."""
    shape = generator.integers(40, 90, 3)
    prediction, reference = np.zeros((2, *shape), np.uint8)
    for _ in range(generator.integers(2, 14)):
        centre, radii = generator.integers(0, shape), generator.uniform(0.6, 9, 3)
        tissue = generator.permutation(np.arange(1, labels + 1))
        kind = generator.choice(["shift", "split", "merge", "miss", "invented", "exact"])
        if kind != "invented":
            paint(reference, centre, radii, tissue)
        if kind == "merge":  # a second lesion close by, and one prediction over both
            offset = np.array([0, 0, round(2.4 * radii[2]) + 2])
            paint(reference, centre + offset, radii, tissue)
            paint(prediction, centre + offset // 2, radii * (1, 1, 2.6), tissue)
        elif kind in ("shift", "invented"):
            paint(prediction, centre + generator.integers(-2, 3, 3), radii * generator.uniform(0.7, 1.3, 3), tissue)
        elif kind != "miss":
            paint(prediction, centre, radii, tissue)
        if kind == "split":
            prediction[centre[0]] = 0
    return prediction, reference


def paint(labels: np.ndarray, centre: np.ndarray, radii: np.ndarray, tissue: np.ndarray) -> None:
    """An ellipsoid whose shells, from the outside in, are the tissues."""
    grid = np.indices(labels.shape).T - centre
    distance = np.linalg.norm(grid / radii, axis=-1).T
    for shell, label in enumerate(tissue):
        labels[distance <= 1 - shell / len(tissue)] = label


def save(trials: list[Trial], folder: Path) -> dict[str, Trial]:
    """Write trials of one challenge as `pred/<case>.nii.gz` and `ref/<case>-seg.nii.gz`: case -> trial."""
    named = {CHALLENGES[trial.challenge][2].format(number): trial for number, trial in enumerate(trials, start=1)}
    for part, ending in (("pred", ""), ("ref", "-seg")):
        (folder / part).mkdir(parents=True)
        for case, trial in named.items():
            labels = trial.prediction if part == "pred" else trial.reference
            nib.save(nib.Nifti1Image(labels, trial.affine), folder / part / f"{case}{ending}.nii.gz")
    return named


def official_command(python: Path, folder: Path, challenge: str) -> list[str]:
    configuration = CHALLENGES[challenge][0]
    arguments = {"ref_path": folder / "ref", "pred_path": folder / "pred", "summary_json": folder / "official.json"}
    paths = [part for name, path in arguments.items() for part in (f"--{name}", str(path))]
    return [str(python.parent / "brats-evaluate"), "--config", configuration, *paths]


def own_command(folder: Path, challenge: str) -> list[str]:
    options = ["--protocol", "brats2026", "--challenge", challenge, "--label-scheme", CHALLENGES[challenge][1]]
    folders = ["-p", str(folder / "pred"), "-r", str(folder / "ref"), "-o", str(folder / "own"), "--quiet"]
    return [sys.executable, "-m", "segkit", "evaluate", *folders, *options]


def seconds(command: list[str]) -> float:
    """Processor time of a command, that of its threads added up."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return sum(getattr(after, part) - getattr(before, part) for part in ("children_user", "children_system"))


def official_documents(python: Path, folder: Path, challenge: str) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Case -> what the package writes of it, and the row of its table."""
    subprocess.run(official_command(python, folder, challenge), check=True, capture_output=True)
    document = json.loads((folder / "official.json").read_text(encoding="utf-8"))
    table = folder / "official.csv"
    paths = ["--json_path", str(folder / "official.json"), "--output_csv_path", str(table)]
    kind = "mets" if challenge == "met" else "seg"
    subprocess.run([str(python.parent / "brats-parse-metrics"), kind, *paths], check=True, capture_output=True)
    with table.open(encoding="utf-8", newline="") as file:
        rows = {row["subject_id"]: row for row in csv.DictReader(file)}
    entries = {entry["subject_name"]: entry for entry in document["metrics"]}
    return {name.removesuffix("-seg.nii.gz"): (entry, rows[name]) for name, entry in entries.items()}


def own_scores(folder: Path, case: str, challenge: str) -> tuple[dict[str, RegionScores], float]:
    """Region -> what segkit says of it, and the volume of a voxel in mm^3 as the file has it, in single precision."""
    prediction, _ = read_labels(folder / "pred" / f"{case}.nii.gz")
    reference, grid = read_labels(folder / "ref" / f"{case}-seg.nii.gz")
    regions = scored_regions(SCHEMES[CHALLENGES[challenge][1]], "brats2026", challenge)
    scores = score_case(prediction, reference, grid.spacing_mm, regions, protocol="brats2026", challenge=challenge)
    return scores, math.prod(grid.spacing_mm)


def compare(
    ours: dict[str, RegionScores], entry: dict[str, Any], row: dict[str, str], challenge: str, voxel_mm3: float
) -> Comparison:
    """Every number of a case of the package's document and table against ours."""
    if "error" in entry:
        raise RuntimeError(f"the official package gave up: {entry['error']}")
    comparison = Comparison()
    theirs = {region.upper(): values for region, values in entry.items() if isinstance(values, dict)}
    if theirs.keys() != ours.keys():
        comparison.disagreements.append(f"regions {sorted(ours)} against {sorted(theirs)}")
    for region in theirs.keys() & ours.keys():
        compare_region(comparison, region, ours[region], theirs[region], voxel_mm3)
        for column, name in TABLES["mets" if challenge == "met" else "seg"].items():
            cell = row[f"{column}_{region.lower()}"]
            comparison.add(f"{region} {column}", ours[region].scores[name], float(cell) if cell else math.nan)
    return comparison


def compare_region(
    comparison: Comparison, region: str, ours: RegionScores, theirs: dict[str, Any], voxel_mm3: float
) -> None:
    scores, matched = ours.scores, [lesion for lesion in ours.lesions if lesion.is_matched]
    mean_voxels = float(np.mean([lesion.voxels for lesion in matched])) if matched else math.nan
    derived = {
        "n_ref_instances": scores["lesion_tp"] + scores["lesion_fn"],
        "n_pred_instances": scores["lesion_tp"] + scores["lesion_fp"],
        "instance_voxel_count_ref": mean_voxels,
        "instance_volume_ref": mean_voxels * voxel_mm3,
        "global_bin_volume_pred": scores["prediction_ml"] * 1000 / voxel_mm3,
        "global_bin_volume_ref": scores["reference_ml"] * 1000 / voxel_mm3,
    }
    found = derived | {name: scores[own] for name, own in DOCUMENT.items()}
    if unknown := theirs.keys() - found.keys() - {"reference_instances"}:
        comparison.disagreements.append(f"{region}: segkit has nothing like {sorted(unknown)}")
    for name, value in found.items():
        official = theirs.get(name, math.nan)  # a quotient of nothing is not written
        if name == "global_bin_hd95" and math.isinf(official):
            official = PENALTY_MM  # as the table has it
        comparison.add(f"{region} {name}", value, official)
    instances = sorted(as_instance(lesion) for lesion in ours.lesions)
    official_instances = sorted(
        tuple(instance.get(key, -1.0) for key in INSTANCE_KEYS) for instance in theirs["reference_instances"]
    )
    for own, other in zip(instances, official_instances, strict=True):
        for key, value, official in zip(INSTANCE_KEYS, own, other, strict=True):
            comparison.add(f"{region} lesion {key}", value, official)


INSTANCE_KEYS = ("voxel_count", "volume", "is_matched", "sq_dsc", "sq_hd95", "sq_nsd")


def as_instance(lesion: Lesion) -> tuple[float, ...]:
    measured = (lesion.dice, lesion.hd95_mm, lesion.nsd)
    sizes = (lesion.voxels, lesion.volume_mm3, float(lesion.is_matched))
    return (*sizes, *(-1.0 if value is None else value for value in measured))


def read_pair(challenge: str, prediction: Path, reference: Path) -> Trial:
    labels, grid = read_labels(reference)
    return Trial(reference.name, challenge, read_labels(prediction)[0], labels, grid.affine)


def print_times(python: Path, groups: dict[str, list[Trial]], rounds: int) -> None:
    """Processor time per case of both commands on the same folders, their start apart."""
    tiny = np.zeros((8, 8, 8), np.uint8)
    tiny[2:5, 2:5, 2:5] = 1
    print("\n| cases | official start | official per case | segkit start | segkit per case | ratio |")
    print("|---|---|---|---|---|---|")
    for name, trials in groups.items():
        challenge = trials[0].challenge
        with tempfile.TemporaryDirectory() as root:
            folder, small = Path(root, "cases"), Path(root, "tiny")
            save(trials, folder)
            save([Trial("tiny", challenge, tiny, tiny, np.eye(4))], small)
            commands = [
                official_command(python, small, challenge),
                official_command(python, folder, challenge),
                own_command(small, challenge),
                own_command(folder, challenge),
            ]
            taken = [[seconds(command) for command in commands] for _ in range(rounds)]
        their_start, theirs, own_start, own = (min(column) for column in zip(*taken, strict=True))
        each, own_each = (theirs - their_start) / len(trials), (own - own_start) / len(trials)
        times = f"{their_start:.2f} s | {each:.3f} s | {own_start:.2f} s | {own_each:.3f} s | {each / own_each:.1f}"
        print(f"| {name} | {times} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="interpreter that has `brats-evaluation`")
    parser.add_argument(
        "--pair", nargs=3, action="append", default=[], metavar=("CHALLENGE", "PREDICTION", "REFERENCE")
    )
    parser.add_argument("--phantoms", type=int, default=20, help="random phantoms (default 20)")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--rounds", type=int, default=3, help="how often times are taken; 0 leaves them out")
    options = parser.parse_args()
    pairs = [
        read_pair(challenge, Path(prediction), Path(reference)) for challenge, prediction, reference in options.pair
    ]
    made_up = list(phantoms(options.phantoms, options.seed))
    print("| case | numbers | largest difference | disagreements |")
    print("|---|---|---|---|")
    compared = []
    for challenge in CHALLENGES:
        trials = [trial for trial in (*pairs, *made_up) if trial.challenge == challenge]
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "cases")
            named = save(trials, folder)
            official = official_documents(options.official, folder, challenge)
            for case, trial in named.items():
                scores, voxel_mm3 = own_scores(folder, case, challenge)
                comparison = compare(scores, *official[case], challenge, voxel_mm3)
                compared.append(comparison)
                told = "; ".join(comparison.disagreements[:3]) or "none"
                print(f"| {trial.name} | {comparison.numbers} | {comparison.largest:.1e} | {told} |", flush=True)
    disagreements = sum(len(comparison.disagreements) for comparison in compared)
    numbers = sum(comparison.numbers for comparison in compared)
    print(f"\n{numbers} numbers of {len(compared)} cases compared, {disagreements} disagree", flush=True)
    if options.rounds:
        groups = {trial.name: [trial] for trial in pairs}
        groups["random phantoms (met)"] = [trial for trial in made_up if trial.challenge == "met"]
        print_times(options.official, groups, options.rounds)
    sys.exit(1 if disagreements else 0)


if __name__ == "__main__":
    main()
