"""Trainings that are compared, a table for each comparison; every finished training is a line of a results file.

    python benchmarks/tables.py recipe --data DATA --out RUNS     # trains what the file lacks, then prints the table
    python benchmarks/tables.py recipe                            # prints the table
    python benchmarks/tables.py recipe --data DATA --out RUNS --only "lr 1e-3,batch 4"

DATA holds `brats2018` (folders of cases), `Task04_Hippocampus` and `chase_db1`. The arms of a table train one after the
other at equal minutes and cores, so give a table one machine with nothing else on it. A line of the file has the arm,
its command, commit, processor, cores, minutes, steps and the Dice of every case. Tables that choose settings score the
validation cases and share the prepared cases; those that compare programs score the cases that are kept out of all
training, and each prepares its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import segkit
from segkit.api.arguments import read_case_ids

HERE = Path(__file__).resolve().parent
KEPT_OUT = {
    "brats2018": "brats2018_test.txt",
    "Task04_Hippocampus": "hippocampus_held_out.txt",
    "chase_db1": "chase_db1_test.txt",
}


@dataclass(frozen=True)
class Arm:
    """One training: settings by dotted name over `--preset cpu`, and files of `configs/`.

    `is_test` scores the cases that are kept out. `loop`: train this network by `benchmarks/monai_loop.py` instead.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    data: str = "brats2018"
    minutes: float = 8
    seed: int = 0
    is_test: bool = False
    loop: str = ""


def _compared(minutes: float, seed: int, network: str = "") -> tuple[Arm, ...]:
    """segkit and the loop on one machine, one after the other, on the cases kept out; and the loop with `network`."""
    loops = {"loop": "segresnet"} | ({f"loop, {network}": network} if network else {})
    common: Any = {"minutes": minutes, "seed": seed, "is_test": True}
    return Arm(f"segkit, {minutes} min", **common), *(
        Arm(f"{name}, {minutes} min", loop=loop, **common) for name, loop in loops.items()
    )


_REVMBUNET = {"network.family": "revmbunet", "network.size": "small"}
_FP32 = {"training.precision": "fp32"}
_BEFORE_SCREENING = {"planning.patch_limit": 64, "planning.batch_limit": 2, "training.foreground_fraction": 0.5}
_SMALL_PATCHES = {"planning.patch_limit": 48, "planning.batch_limit": 4}
_STRONGER = {
    **{"augmentation.brightness_probability": 0.3, "augmentation.brightness_range": [0.6, 1.6]},
    **{"augmentation.contrast_probability": 0.3, "augmentation.contrast_range": [0.6, 1.6]},
    **{"augmentation.gamma_probability": 0.5, "augmentation.gamma_range": [0.5, 2.0]},
}
_SCREENED: dict[str, dict[str, Any]] = {
    "as it was": {},
    "no modality left out": {"augmentation.modality_dropout": 0},
    "4 patches of 48": _SMALL_PATCHES,
    "ema 0.99": {"training.ema_decay": 0.99},
    "lr 6e-3": {"optimiser.lr": 6e-3},
    "lr 1.5e-3": {"optimiser.lr": 1.5e-3},
    "foreground 0.8": {"training.foreground_fraction": 0.8},
    "stronger intensities": _STRONGER,
    "bias field": {"training.transforms": [{"name": "RandBiasFieldd", "prob": 0.2}]},
    "Dice by sample": {"loss.batch_dice": False},
    "widths x 1.5": {"network.arguments": {"widths": [24, 48, 96, 192]}},
    "4 patches of 48 with foreground 0.8": _SMALL_PATCHES | {"training.foreground_fraction": 0.8},
}
"""Changes of the preset as it was; the last one, of both that helped, is what it is now."""
TABLES: dict[str, Sequence[Arm]] = {
    "families": (
        Arm("revmbunet small", _REVMBUNET),
        *(Arm(family, config=family) for family in ("stunet", "plainunet", "resencunet")),
        Arm("revmbunet small fp32", _REVMBUNET | _FP32),
        *(Arm(f"{family} fp32", _FP32, family) for family in ("stunet", "plainunet")),
    ),
    "families, longer": (
        Arm("revmbunet small", _REVMBUNET, minutes=26),
        Arm("stunet", config="stunet", minutes=26),
    ),
    "families, hippocampus": (
        Arm("revmbunet small", _REVMBUNET, data="Task04_Hippocampus"),
        Arm("stunet", config="stunet", data="Task04_Hippocampus"),
    ),
    "recipe": tuple(Arm(name, _BEFORE_SCREENING | changes) for name, changes in _SCREENED.items()),
    "brats": _compared(30, 0, "stunet/S"),
    "brats again": (*_compared(30, 1), *_compared(60, 0)),
    "hippocampus": (Arm("segkit", data="Task04_Hippocampus", minutes=30, is_test=True),),
}


def main() -> None:
    """Train the arms of a table that the results lack; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--data", type=Path, help="folder of data sets; without it nothing is trained")
    parser.add_argument("--out", type=Path, help="folder of runs")
    parser.add_argument("--only", default="", help="names of arms, separated by commas")
    parser.add_argument("--minutes", type=float, help="minutes of each training instead of those of the table")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name]
    for arm in TABLES[arguments.table]:
        is_known = any(_is_of(line, arguments.table, arm) for line in read_lines(arguments.results))
        if arguments.data is not None and not is_known and (not wanted or arm.name in wanted):
            minutes = arguments.minutes or arm.minutes
            line = run_arm(arguments.table, arm, minutes, arguments.data / arm.data, arguments.out)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    lines = read_lines(arguments.results)
    found = [line for arm in TABLES[arguments.table] for line in lines if _is_of(line, arguments.table, arm)]
    print_table(found)
    if any(arm.is_test for arm in TABLES[arguments.table]):
        print_differences(found)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished trainings."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _is_of(line: Mapping[str, Any], table: str, arm: Arm) -> bool:
    return (line["table"], line["arm"], line["seed"]) == (table, arm.name, arm.seed)


def run_arm(table: str, arm: Arm, minutes: float, data: Path, out: Path) -> dict[str, Any]:
    """Train and score one arm; returns its line of the results."""
    run = out.resolve() / f"{table}-{arm.name}-{arm.seed}".replace(" ", "_")
    command = _command(arm, minutes, data, run)
    started = time.monotonic()
    subprocess.run(command, check=True)
    taken = time.monotonic() - started
    return {
        "table": table,
        "arm": arm.name,
        "seed": arm.seed,
        "command": shown(command, {data: f"DATA/{data.name}", run: "RUN", run.parent: "RUNS"}),
        **circumstances(),
        "minutes": round(taken / 60, 2),
        "steps": steps_of(run),
        "dice": _scores(arm, data, run),
    }


def shown(command: Sequence[str], names: Mapping[Path, str]) -> str:
    """A command as it is typed in this repository, with names in place of paths."""
    text = " ".join(command[2:] if command[1] == "-m" else ["python", *command[1:]])
    for path, name in {**names, HERE.parent: "."}.items():
        text = text.replace(str(path), name)
    return text


def circumstances() -> dict[str, Any]:
    """Commit, date, processor and cores."""
    return {
        "commit": subprocess.check_output(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], text=True).strip(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _command(arm: Arm, minutes: float, data: Path, run: Path) -> list[str]:
    kept_out = HERE / KEPT_OUT[data.name]
    if arm.loop:
        script = [sys.executable, str(HERE / "monai_loop.py"), str(data), str(run), "--exclude", str(kept_out)]
        return [*script, "--minutes", str(minutes), "--network", arm.loop, "--seed", str(arm.seed)]
    command = [sys.executable, "-m", "segkit", "train", str(data), "-o", str(run), "--preset", "cpu"]
    if arm.config:
        command += ["--config", str(HERE.parent / "configs" / f"{arm.config}.yaml")]
    shared = {} if arm.is_test else {"data.cache": str(run.parent / f"cache-{data.name}")}
    for name, value in {"training.seed": arm.seed, **shared, **arm.settings}.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    return [*command, "--budget", f"{minutes}m", "--exclude", str(kept_out), "--overwrite"]


def processor() -> str:
    found = Path("/proc/cpuinfo")
    text = found.read_text(encoding="utf-8") if found.exists() else ""
    name = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip() or platform.processor()
    return name + (" with avx512_bf16" if "avx512_bf16" in text else "")


def steps_of(run: Path) -> int:
    """Steps of a finished training."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["step"])


def _scores(arm: Arm, data: Path, run: Path) -> dict[str, dict[str, float]]:
    """Dice of the validation cases, or of those kept out."""
    if arm.is_test:
        case_ids = read_case_ids(HERE / KEPT_OUT[data.name]) or []
    else:  # all of them: a short budget scores fewer
        case_ids = json.loads((run / "split.json").read_text(encoding="utf-8"))["validation"]
    return dice_of(run, data, case_ids, is_segmented=bool(arm.loop))


def dice_of(
    run: Path, data: Path, case_ids: Sequence[str], *, is_segmented: bool = False
) -> dict[str, dict[str, float]]:
    """Dice by case and region of these cases, as `segkit evaluate` gives it; segmented first, unless they are."""
    masks = run / "masks"
    if not is_segmented:
        segkit.infer(run, data, masks, cases=case_ids, overwrite=True)
    evaluation = segkit.evaluate(masks, data, cases=case_ids)
    if evaluation.errors or len(evaluation.cases) != len(case_ids):
        raise SystemExit(f"{len(evaluation.cases)} of {len(case_ids)} cases scored: {evaluation.errors}")
    return {case.case: {region: scores["dice"] for region, scores in case.regions.items()} for case in evaluation.cases}


def print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """A Markdown table of mean Dice by region and of all regions."""
    if not lines:
        return
    regions = list(next(iter(lines[0]["dice"].values())))
    print(f"| arm | seed | minutes | steps | {' | '.join(regions)} | mean |")
    print(f"|---|{'---:|' * (len(regions) + 4)}")
    for line in lines:
        means = [float(np.mean([case[region] for case in line["dice"].values()])) for region in regions]
        shown = " | ".join(f"{value:.3f}" for value in (*means, np.mean(means)))
        print(f"| {line['arm']} | {line['seed']} | {line['minutes']} | {line['steps']} | {shown} |")


def print_differences(lines: Sequence[Mapping[str, Any]], resamples: int = 10_000) -> None:
    """The first arm minus each other of the same seed: mean Dice of a case, with its paired 95 % bootstrap interval."""
    for seed in sorted({line["seed"] for line in lines}):
        first, *others = [line for line in lines if line["seed"] == seed]
        for other in others:
            cases = sorted(first["dice"])
            differences = np.array([_mean_of_case(first, case) - _mean_of_case(other, case) for case in cases])
            drawn = np.random.default_rng(0).integers(len(cases), size=(resamples, len(cases)))
            low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
            sentence = f"{first['arm']} minus {other['arm']}, seed {seed}: {differences.mean():+.3f}"
            print(f"{sentence} ({low:+.3f} to {high:+.3f}) over {len(cases)} cases")


def _mean_of_case(line: Mapping[str, Any], case: str) -> float:
    return float(np.mean(list(line["dice"][case].values())))


if __name__ == "__main__":
    main()
