"""Networks and simple fills on holes of six scans kept out of training; each finished unit is a line of a file.

    python benchmarks/inpainting.py norms --data DATA --out RUNS --minutes 50    # computes what is missing, prints
    python benchmarks/inpainting.py norms                                        # prints the tables
    python benchmarks/inpainting.py norms --data DATA --out RUNS --only "instance, constant" --seeds 3
    python benchmarks/inpainting.py pictures --data DATA --out RUNS              # into docs/images

DATA holds `brats2018`, and `open_ms` for the anomaly maps: folders of cases. The tables are

    norms       instance norm, RN-B, and RN-B with RN-L, under a constant hole and under a biharmonic fill
    inputs      what a network sees in the hole, with and without the mirrored image
    generator   the paper's own 2D generator, without and with a discriminator
    split       the share of the hole and of the rest that each RN-L layer takes for the hole
    anomaly     the area under the ROC curve of anomaly maps of whole brains as finders of lesions, by voxel

A unit is a training, one case of a method, or one case of an anomaly map. With `--minutes` a training that does not end
in time is stopped with its state written, and continued by the same command; another unit that would not fit, by the
longest one of its kind so far, is not started. Scores are those of the BraTS challenge, and SSIM in 3D, of holes in
healthy tissue, in three bins of their diameter, that of the ball of as many voxels.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inpainting_tables import print_table, save_grid
from tables import processor, read_lines

from segkit.inference.backends import TorchBackend
from segkit.inpainting.inpaint import anomaly_map
from segkit.inpainting.inputs import DETAIL_SHARE, add_detail, rough_fill, smooth_fill
from segkit.inpainting.midplane import find_midplane, mirror_of
from segkit.inpainting.predictor import InpaintingPredictor
from segkit.metrics.calibration import area_under_roc
from segkit.metrics.synthesis import ssim_3d, synthesis_scores
from segkit.models.region_layers import detected_shares
from segkit.preparing.hole_shapes import diameter_of
from segkit.preparing.holes import HoleMaker, HolesConfig, brain_mask, grow
from segkit.preparing.preprocessing import load_case
from segkit.reading.geometry import reorientation_to, reoriented_grid
from segkit.reading.layouts.table import PLAIN_CLASSES, find_cases
from segkit.reading.volume import Grid

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
KEPT_OUT = (HERE / "brats2018_test.txt").read_text(encoding="utf-8").split()
BINS = {"up to 12": (8.0, 12.0), "12 to 25": (12.0, 25.0), "above 25": (25.0, 45.0)}
"""Diameters in voxels of the holes that are drawn for each bin."""
HOLES_PER_BIN = 3
SCORES = ("ssim", "mse", "ssim_3d", "psnr")
CUBE = 24
"""Side in voxels of the cubes of an anomaly map: an eighth of them, none beside another, is filled at a time."""
FIRST_GUESS_S = {"holes": 300.0, "anomaly": 900.0}
"""Seconds of a unit before one of its kind has been measured."""
TO_STOP_S = 60.0
"""Seconds within which a training has written its state."""


@dataclass(frozen=True)
class Arm:
    """One network: settings by dotted name over `--preset cpu` and those that all arms share."""

    settings: Mapping[str, Any]
    modality: str = "t1n"
    steps: int = 5000


def _unet(fill: str, *norms: str, context: str = "hole", **arguments: str) -> dict[str, Any]:
    norm = {"encoder_norm": norms[0], "decoder_norm": norms[1], "context": context, **arguments}
    return {"fill": fill, "network.arguments": norm}


_INSTANCE, _BASIC, _BOTH = ("instance", "instance"), ("region", "instance"), ("region", "learnable")
_GENERATOR = {
    **{"network.family": "generator", "network.size": "paper", "fill": "constant"},
    **{"patches.size": 128, "batch_size": 2},
}
ARMS = {
    "instance, constant": Arm(_unet("constant", *_INSTANCE)),
    "RN-B, constant": Arm(_unet("constant", *_BASIC)),
    "RN-B + RN-L, constant": Arm(_unet("constant", *_BOTH, learning="supervised")),
    "instance, biharmonic": Arm(_unet("biharmonic", *_INSTANCE)),
    "RN-B, biharmonic": Arm(_unet("biharmonic", *_BASIC)),
    "RN-B + RN-L, biharmonic": Arm(_unet("biharmonic", *_BOTH, learning="supervised")),
    "RN-B + RN-L as released, constant": Arm(_unet("constant", *_BOTH, learning="affine")),
    "instance, mirrored detail": Arm(_unet("mirrored-detail", *_INSTANCE)),
    "instance, biharmonic, mirror": Arm(_unet("biharmonic", *_INSTANCE, context="mirror")),
    "instance, mirrored detail, mirror": Arm(_unet("mirrored-detail", *_INSTANCE, context="mirror")),
    "generator": Arm(_GENERATOR),
    "generator, discriminator": Arm({**_GENERATOR, "adversarial.weight": 0.1}),
    "instance, biharmonic, FLAIR": Arm(_unet("biharmonic", *_INSTANCE), "t2f"),
}
SIMPLE = ("harmonic", "biharmonic", "mirrored detail", "mirror")
"""Fills without a network, for tables of holes."""
TABLES: dict[str, Sequence[str]] = {
    "norms": tuple(ARMS)[:6],
    "inputs": (
        *("instance, constant", "instance, biharmonic", "instance, mirrored detail"),
        *("instance, biharmonic, mirror", "instance, mirrored detail, mirror"),
    ),
    "generator": ("generator", "generator, discriminator"),
    "split": ("RN-B + RN-L, constant", "RN-B + RN-L, biharmonic", "RN-B + RN-L as released, constant", "generator"),
    "anomaly": ("instance, biharmonic", "instance, biharmonic, FLAIR"),
}
ANOMALY_BASELINES = ("intensity", "biharmonic")


@dataclass
class Work:
    """Where data, runs and results are, and the time that is left."""

    data: Path
    out: Path
    results: Path
    device: str
    steps: int | None
    deadline_s: float
    lines: list[dict[str, Any]] = field(default_factory=list)

    def steps_of(self, arm: str) -> int:
        """Steps of an arm's training; 0 without one."""
        return (self.steps or ARMS[arm].steps) if arm in ARMS else 0

    def has(self, **key: Any) -> bool:
        """Whether a line has these values."""
        return any(key.items() <= line.items() for line in self.lines)

    def fits(self, unit: str, arm: str) -> bool:
        """Whether there is time for another unit: half as much again as the longest of its kind and arm."""
        before = [line["seconds"] for line in self.lines if line["unit"] == unit and line["arm"] == arm]
        return time.monotonic() + 1.5 * max(before, default=FIRST_GUESS_S[unit]) < self.deadline_s

    def add(self, line: dict[str, Any]) -> None:
        """Append a finished unit to the results."""
        commit = subprocess.check_output(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], text=True).strip()
        line |= {"commit": commit, "date": time.strftime("%Y-%m-%d"), "processor": processor()}
        self.lines.append(line)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print({key: line[key] for key in ("unit", "arm", "seed", "case", "seconds") if key in line}, flush=True)

    def scored(self, table: str, arm: str) -> list[dict[str, Any]]:
        """The lines of an arm that a table shows."""
        key = {"unit": unit_of(table), "arm": arm, "steps": self.steps_of(arm)}
        return [line for line in self.lines if key.items() <= line.items()]

    def run(self, arm: str, seed: int) -> Path:
        """The run folder of a training."""
        name = f"{arm}-{self.steps_of(arm)}-{seed}"
        return self.out.resolve() / "".join(letter if letter.isalnum() else "_" for letter in name)


def main() -> None:
    """Compute what is missing of a table if there are data; print it, or draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=[*TABLES, "pictures"])
    parser.add_argument("--data", type=Path, help="folder of data sets; without it nothing is computed")
    parser.add_argument("--out", type=Path, default=Path("inpainting_runs"), help="folder of runs")
    parser.add_argument("--only", default="", help="names of arms as in this script, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps of each training instead of those of the arm")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time after which nothing is started")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=HERE / "inpainting.jsonl")
    arguments = parser.parse_args()
    deadline_s = time.monotonic() + 60 * arguments.minutes
    work = Work(
        *(arguments.data, arguments.out, arguments.results, arguments.device, arguments.steps, deadline_s),
        read_lines(arguments.results),
    )
    if arguments.table == "pictures":
        draw_holes(work)
        draw_anomalies(work)
        return
    wanted = [name for name in arguments.only.split(";") if name] or list(TABLES[arguments.table])
    if unknown := set(wanted) - set(ARMS) - set(SIMPLE):
        parser.error(f"--only names {', '.join(sorted(unknown))}; expected names among {'; '.join(ARMS)}")
    if work.data is not None and not complete(work, arguments.table, wanted, arguments.seeds):
        print("stopped in time; the same command continues", flush=True)
    of_table = [
        *(ANOMALY_BASELINES if arguments.table == "anomaly" else SIMPLE if arguments.table != "split" else ()),
        *TABLES[arguments.table],
    ]
    print_table(arguments.table, {arm: work.scored(arguments.table, arm) for arm in of_table}, list(BINS))


def unit_of(table: str) -> str:
    """The kind of unit whose lines a table shows."""
    return "anomaly" if table == "anomaly" else "holes"


def complete(work: Work, table: str, arms: Sequence[str], seeds: int) -> bool:
    """Compute what is missing of a table; False if the time does not suffice."""
    without = ANOMALY_BASELINES if table == "anomaly" else SIMPLE
    wanted = [(name, 0) for name in without if table != "split"]
    wanted += [(arm, seed) for seed in range(seeds) for arm in arms if arm not in without]
    unit = unit_of(table)
    cases = [("brats2018", case_id) for case_id in KEPT_OUT]
    cases += [("open_ms", "patient19")] if unit == "anomaly" else []
    for arm, seed in wanted:
        for data, case_id in cases:
            key = {"unit": unit, "arm": arm, "seed": seed, "steps": work.steps_of(arm), "case": case_id}
            if work.has(**key):
                continue
            if (arm in ARMS and not train(work, arm, seed)) or not work.fits(unit, arm):
                return False
            began = time.monotonic()
            score = {"holes": score_holes, "anomaly": score_anomaly}[unit]
            found = score(work, arm, seed, work.data / data, case_id)
            work.add({**key, **found, "seconds": round(time.monotonic() - began, 1)})
    return True


def train(work: Work, arm: str, seed: int) -> bool:
    """Train an arm, or continue; False if it was stopped in time."""
    key = {"unit": "training", "arm": arm, "seed": seed, "steps": work.steps_of(arm)}
    run, metrics = work.run(arm, seed), work.run(arm, seed) / "metrics.jsonl"
    if work.has(**key) and (run / "model.json").exists():
        return True
    if work.deadline_s - time.monotonic() < 2 * TO_STOP_S:
        return False
    settings = {
        "modalities": [ARMS[arm].modality],
        "holes.diameter_range": [8, 45],
        "training.steps": work.steps_of(arm),
        "training.seed": seed,
        "training.live_page": False,
        "data.cache": str(work.out.resolve() / "cache"),
        **ARMS[arm].settings,
    }
    command = [sys.executable, "-m", "segkit", "pretrain", str(work.data / "brats2018"), "-o", str(run)]
    command += ["--method", "inpainting", "--preset", "cpu", "-d", work.device, "--quiet"]
    command += ["--exclude", str(HERE / "brats2018_test.txt")]
    command += [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    command += ["--resume"] if (run / "last.ckpt").exists() else ["--overwrite"]
    process = subprocess.Popen(command)
    try:
        left_s = work.deadline_s - time.monotonic() - TO_STOP_S
        code = process.wait(None if np.isinf(left_s) else left_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return False
    if code:
        raise SystemExit(f"the training of {arm!r} ended with code {code}")
    scores = json.loads((run / "validation.json").read_text(encoding="utf-8"))
    rows = read_lines(metrics)
    work.add({**key, "seconds": rows[-1]["seconds"], "before": scores["before"], "after": scores["after"]})
    return True


def scan(folder: Path, case_id: str, modality: str) -> tuple[np.ndarray, np.ndarray, Grid]:
    """A scan (1, D, H, W) in RAS, its labelled voxels and the grid."""
    cohort = find_cases(folder, label_scheme=PLAIN_CLASSES)
    (case,) = (one for one in cohort.cases if one.id == case_id)
    loaded = load_case(case, (modality,), cohort.scheme)
    turn = reorientation_to(loaded.grid)
    return turn.apply(loaded.image), turn.apply(loaded.labels > 0), reoriented_grid(loaded.grid, turn)


def bin_of(hole: np.ndarray) -> str:
    """The bin of a hole by its diameter; the upper limit belongs to a bin."""
    diameter = diameter_of(int(hole.sum()), hole.ndim)
    return next((name for name, (_, high) in BINS.items() if diameter <= high), list(BINS)[-1])


def holes_of(image: np.ndarray, lesion: np.ndarray) -> Iterator[np.ndarray]:
    """The same holes of a scan each time: blobs in healthy tissue, `HOLES_PER_BIN` of each bin."""
    brain = brain_mask(image[0]) | lesion
    for (low, high), number in product(BINS.values(), range(HOLES_PER_BIN)):
        config = HolesConfig(boxes=0, strokes=0, blobs=1, tumours=0, diameter_range=(low, high), largest_share=0.02)
        generator = np.random.default_rng((int(low), number))
        yield HoleMaker(config).draw(brain, ~grow(lesion, config.margin_voxels), generator)


class Watched(TorchBackend):
    """A network that notes what its RN-L layers take for the hole in each window."""

    def __init__(self, backend: TorchBackend) -> None:
        super().__init__(backend.network, backend.device, precision=backend.precision)
        self.shares: list[dict[str, tuple[float, float]]] = []

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """The output of the network."""
        x = torch.from_numpy(windows).to(self.device)
        self.shares.append(detected_shares(self.network, x, x[:, 1:2]))
        return super().__call__(windows)


def opened(work: Work, arm: str, seed: int) -> InpaintingPredictor | None:
    """The trained network of an arm; None for a simple fill."""
    return InpaintingPredictor.load(work.run(arm, seed), work.device, "torch") if arm in ARMS else None


def filled_by(
    arm: str, predictor: InpaintingPredictor | None, image: np.ndarray, hole: np.ndarray, grid: Grid
) -> np.ndarray:
    """The scan with the hole filled by a method, which does not see what is in it."""
    voided = np.where(hole, np.float32(0), image)
    if predictor is not None:
        return predictor.fill(voided, hole, grid)
    if arm in ("harmonic", "biharmonic"):
        return smooth_fill(voided, hole, {"harmonic": 1, "biharmonic": 2}[arm])
    mirrored = mirror_of(voided, hole, find_midplane(voided, grid.spacing_mm), (0, 0, 0), hole.shape)
    return add_detail(rough_fill(voided, hole), hole, *mirrored, share={"mirror": 1.0}.get(arm, DETAIL_SHARE))


def score_holes(work: Work, arm: str, seed: int, folder: Path, case_id: str) -> dict[str, Any]:
    """The scores of every hole of a case, and by layer the shares of hole and rest that RN-L takes for the hole."""
    predictor, rows = opened(work, arm, seed), []
    watched = None if predictor is None else Watched(predictor.backend)
    predictor = predictor and replace(predictor, backend=watched)
    image, lesion, grid = scan(folder, case_id, "t1n")
    for hole in holes_of(image, lesion):
        filled = filled_by(arm, predictor, image, hole, grid)
        if not np.array_equal(filled[:, ~hole], image[:, ~hole]):
            raise AssertionError("a known voxel was changed")
        voided = np.where(hole, np.float32(0), image)
        found = synthesis_scores(filled[0], image[0], hole, voided[0])
        found["ssim_3d"] = ssim_3d(filled[0], image[0], hole, voided[0])
        rows.append({"bin": bin_of(hole), "voxels": int(hole.sum()), **{name: float(found[name]) for name in SCORES}})
    windows = watched.shares if watched else []
    names = windows[0] if windows else {}
    return {"holes": rows, "shares": {name: np.nanmean([one[name] for one in windows], 0).tolist() for name in names}}


def score_anomaly(work: Work, arm: str, seed: int, folder: Path, case_id: str) -> dict[str, Any]:
    """The area under the ROC curve of the anomaly map of a whole brain; a slice of it is kept for the pictures."""
    modality = ARMS[arm].modality if arm in ARMS else "t1n"
    predictor = opened(work, arm, seed)
    image, lesion, grid = scan(folder, case_id, modality)
    brain = brain_mask(image[0])
    if arm == "intensity":
        anomaly = np.abs(image[0] - np.median(image[0][image[0] != 0]))
    else:
        anomaly = np.zeros(brain.shape, np.float32)
        for hole in cubes_of(brain):
            voided = np.where(hole, np.float32(0), image)
            filled = predictor.fill(voided, hole, grid) if predictor else rough_fill(voided, hole)
            anomaly += anomaly_map(image, filled, hole, grid.spacing_mm)
    place = int(lesion.sum((0, 1)).argmax())
    path = work.out / "anomaly" / f"{work.run(arm, seed).name}-{case_id}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, scan=image[0, ..., place], lesion=lesion[..., place], anomaly=anomaly[..., place])
    return {"auroc": area_under_roc(anomaly[brain], lesion[brain])}


def cubes_of(brain: np.ndarray) -> Iterator[np.ndarray]:
    """Eight holes that cover a brain, each of cubes that lie a cube apart."""
    parity = np.ix_(*(np.arange(length) // CUBE % 2 for length in brain.shape))
    for kind in product((0, 1), repeat=brain.ndim):
        hole = brain.copy()
        for axis, wanted in zip(parity, kind, strict=True):
            hole &= axis == wanted
        if hole.any():
            yield hole


def draw_holes(work: Work) -> None:
    """One hole of each bin of a case beside every method that is trained, into `docs/images/inpainting.png`."""
    image, lesion, grid = scan(work.data / "brats2018", KEPT_OUT[1], "t1n")
    holes = list(holes_of(image, lesion))[HOLES_PER_BIN - 1 :: HOLES_PER_BIN]
    arms = [arm for arm in ARMS if ARMS[arm].modality == "t1n" and work.has(unit="training", arm=arm, seed=0)]
    methods = [*SIMPLE, *(arm for arm in arms if (work.run(arm, 0) / "model.json").exists())]
    rows: list[list[tuple[str, np.ndarray]]] = [[] for _ in holes]
    for method in ["scan", "hole", *methods]:
        predictor = opened(work, method, 0)
        for row, hole in zip(rows, holes, strict=True):
            middle = [int(place.mean()) for place in np.nonzero(hole)]
            near = (*(slice(max(0, place - 36), place + 36) for place in middle[:2]), middle[2])
            hidden = np.where(hole, np.float32(0), image)
            given = {"scan": image, "hole": hidden}
            shown = given[method] if method in given else filled_by(method, predictor, image, hole, grid)
            row.append((method, shown[0][near]))
    save_grid(rows, IMAGES / "inpainting.png", largest=float(np.percentile(image[image > 0], 99)))


def draw_anomalies(work: Work) -> None:
    """The best and the worst case of each trained map, into `docs/images/anomaly.png`."""
    rows = []
    for arm in TABLES["anomaly"]:
        lines = [line for line in work.lines if (line["unit"], line["arm"], line["seed"]) == ("anomaly", arm, 0)]
        lines = sorted(lines, key=lambda line: line["auroc"])
        for name, line in (("worst", lines[0]), ("best", lines[-1])) if lines else ():
            kept = np.load(work.out / "anomaly" / f"{work.run(arm, 0).name}-{line['case']}.npz")
            title = f"{name} of {arm}: {line['auroc']:.2f}"
            parts = zip((title, "lesion", "anomaly"), ("scan", "lesion", "anomaly"), strict=True)
            rows.append([(shown, kept[part] / max(np.percentile(kept[part], 99.8), 1e-6)) for shown, part in parts])
    if rows:
        save_grid(rows, IMAGES / "anomaly.png", largest=1.0)


if __name__ == "__main__":
    main()
