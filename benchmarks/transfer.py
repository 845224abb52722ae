"""What pre-training is worth with few labels: fine-tuned and frozen encoders against random weights, in paired runs.

    python benchmarks/transfer.py --data DATA --out RUNS --minutes 60    # trains what the file lacks and what fits
    python benchmarks/transfer.py --data DATA --out RUNS --only "BraTS 3D"
    python benchmarks/transfer.py --list                                 # the units in their order, and what is done
    python benchmarks/transfer.py                                        # prints the tables

DATA holds `Task04_Hippocampus` and `brats2018` (folders of cases). A unit is a pre-training, or a fine-tuning that is
scored; each finished one is a line of `benchmarks/transfer.jsonl`, so a run that was stopped is continued by the same
command. The order is such that all arms of a seed come together and the comparisons with most seeds come first.

Sources are all cases of the data set that are not kept out (`hippocampus_held_out.txt`, `brats2018_test.txt`), without
their labels, and no other data, in which a kept-out patient could be hidden under another name. Fine-tunings have an
equal number of steps. With the hippocampus, the seed chooses the labelled cases and everything random in the training,
so arms are paired in both; one in five labelled cases validates. On BraTS all seeds have the same six labelled cases,
because the lesion bank is made of them. Encoders learn at a tenth of the learning rate, random ones at the whole of it,
frozen ones not at all. Plateaus: the same training with three times the steps. Intervals are those of Student's t over
the differences of paired seeds, at 95 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tables import HERE, KEPT_OUT, circumstances, dice_of, read_lines, shown, steps_of

import segkit
from segkit.api.arguments import read_case_ids

RANDOM, MATCHING, MASKED, CONTRASTIVE, BANK = "random", "graph matching", "masked", "contrastive", "lesion bank"
TUNED, FROZEN, LONGER = "fine-tuned", "frozen", "three times as long"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A data set with a network: settings by dotted name, and how long a pre-training and a fine-tuning take."""

    data: str
    network: Settings
    pairs: Settings
    """Of methods with two views."""
    masked: Settings
    tuning: Settings
    steps: int
    """Of a fine-tuning."""
    minutes: float
    """Of a pre-training."""
    tuning_minutes: float
    """Expected, with scoring, until the results have some."""
    has_one_choice: bool = False
    """Whether all seeds have the same labelled cases."""


_TINY = {"network.family": "revmbunet", "network.size": "tiny"}
_SMALL = {"network.family": "revmbunet", "network.size": "small"}
_RESNET = {"network.family": "smp", "network.size": "unet", "network.arguments.encoder": "resnet18"}
_NO_GROUPS = {"images.neighbours": 1}
TASKS = {
    "hippocampus 3D": Task(
        "Task04_Hippocampus",
        _TINY,
        {"views.size": 20, "images.neighbours": 4, "batch_size": 32},
        {"views.size": 32, "batch_size": 16, "masked.block": [8, 8, 8], **_NO_GROUPS},
        {"planning.patch_size": [32, 32, 32]},
        steps=350,
        minutes=15,
        tuning_minutes=1.5,
    ),
    "hippocampus 2D": Task(
        "Task04_Hippocampus",
        _RESNET,
        {"views.size": 32, "images.slice_axis": 0, "batch_size": 64},
        {"views.size": 32, "images.slice_axis": 0, "batch_size": 64, **_NO_GROUPS},
        {"planning.patch_size": [32, 32, 32], "network.arguments.slice_axis": 0},
        steps=300,
        minutes=15,
        tuning_minutes=1.5,
    ),
    "BraTS 3D": Task(
        "brats2018",
        _SMALL,
        {"views.size": 32, "images.channels": "all", "batch_size": 16},
        {"views.size": 64, "images.channels": "all", "graph_matching.nodes": 4, "batch_size": 4, **_NO_GROUPS},
        {},
        steps=500,
        minutes=15,
        tuning_minutes=11,
        has_one_choice=True,
    ),
}


@dataclass(frozen=True)
class Unit:
    """A pre-training (no labels; for the lesion bank its bank), or a fine-tuning with `labels` labelled cases."""

    task: str
    arm: str
    labels: int = 0
    seed: int = 0
    source_seed: int = 0
    """Seed of the pre-training."""
    variant: str = TUNED

    @property
    def source(self) -> Unit | None:
        """The unit that must be done before this one."""
        is_alone = self.labels == 0 or self.arm == RANDOM
        return None if is_alone else Unit(self.task, self.arm, source_seed=self.source_seed)

    def folder(self, out: Path) -> Path:
        """Where its run is written."""
        name = (
            "-".join(str(value) for value in asdict(self).values()) if self.labels else f"{self.arm}-{self.source_seed}"
        )
        return out.resolve() / self.task.replace(" ", "_") / name.replace(" ", "_")

    def expected_minutes(self, lines: Iterable[Settings]) -> float:
        """The median of such units that are done, else as its task expects; three times that of longer ones."""
        task = TASKS[self.task]
        if not self.labels:
            return task.minutes + (10 if self.arm == BANK else 1)
        alike = (line for line in lines if line["task"] == self.task and line["labels"] and line["variant"] != LONGER)
        known = [line["minutes"] for line in alike] or [task.tuning_minutes]
        return float(np.median(known)) * (3 if self.variant == LONGER else 1)


def units() -> list[Unit]:
    """All units in their order, without repetition; each after the pre-training that it needs."""
    both = (RANDOM, MATCHING, MASKED)
    hippocampus = ("hippocampus 3D", "hippocampus 2D")

    def tuned(
        tasks: Iterable[str], labels: int, seeds: Iterable[int], arms: Sequence[str], **more: Any
    ) -> Iterator[Unit]:
        for seed in seeds:
            yield from (Unit(task, arm, labels, seed, **more) for task in tasks for arm in arms)

    wanted = [
        *tuned(hippocampus, 5, range(4), both),
        *tuned(hippocampus, 5, [0], both, variant=LONGER),
        *tuned(hippocampus, 5, range(4, 12), both),
        *tuned(["BraTS 3D"], 6, range(4), (*both, BANK)),
        *tuned(hippocampus, 5, range(4), both, variant=FROZEN),
        *tuned(hippocampus, 20, range(4), both),
        *tuned(["hippocampus 3D"], 5, range(12), (MATCHING, MASKED), source_seed=1),
        *tuned(["BraTS 3D"], 6, range(4), both, variant=FROZEN),
        *tuned(["BraTS 3D"], 6, [0], (*both, BANK), variant=LONGER),
        *tuned(hippocampus, 5, range(12), [CONTRASTIVE]),
        *tuned(hippocampus, 3, range(4), both),
        *tuned(hippocampus, 10, range(4), both),
    ]
    with_sources = (unit for each in wanted for unit in (each.source, each) if unit is not None)
    return list(dict.fromkeys(with_sources))


@dataclass(frozen=True)
class Bench:
    """Where data and runs lie, and the rates of the fine-tunings."""

    data: Path
    out: Path
    lr: float
    encoder_lr: float
    more: Sequence[str] = ()

    def run(self, unit: Unit) -> dict[str, Any]:
        """Do a unit; returns its line of the results."""
        task, folder = TASKS[unit.task], unit.folder(self.out)
        data = self.data / task.data
        commands = (self._tuning if unit.labels else self._bank if unit.arm == BANK else self._pretraining)(unit)
        started = time.monotonic()
        for command in commands:
            print("$", *command[2:], file=sys.stderr, flush=True)
            subprocess.run(command, check=True)
        names = {data: f"DATA/{task.data}", folder: "RUN", self.out.resolve(): "RUNS"}
        line = {**asdict(unit), "lr": self.lr, "encoder_lr": self.encoder_lr} if unit.labels else asdict(unit)
        line |= {"command": "; ".join(shown(command, names) for command in commands), **circumstances()}
        if unit.labels:
            dice = dice_of(folder, data, read_case_ids(HERE / KEPT_OUT[task.data]) or [])
            regions = next(iter(dice.values()))
            line["dice"] = {name: round(float(np.mean([case[name] for case in dice.values()])), 5) for name in regions}
            line["steps"] = steps_of(folder)
            shutil.rmtree(folder)  # its state is large, and no other unit needs it
        elif unit.arm != BANK:
            line |= self._measures(folder, data)
        return line | {"minutes": round((time.monotonic() - started) / 60, 2)}

    def _pretraining(self, unit: Unit) -> list[list[str]]:
        task = TASKS[unit.task]
        method = task.masked if unit.arm == MASKED else task.pairs
        settings = {**task.network, **method, "training.seed": unit.source_seed, "training.live_page": False}
        options = ["--method", unit.arm.replace(" ", "-"), "--budget", f"{task.minutes}m"]
        kept_out = HERE / KEPT_OUT[task.data]
        return [self._segkit("pretrain", unit, *options, "--exclude", str(kept_out), **settings)]

    def _bank(self, unit: Unit) -> list[list[str]]:
        """An inpainter that knows the references of the labelled cases alone, and their lesion-free copies."""
        task, folder = TASKS[unit.task], unit.folder(self.out)
        labelled, others = self._lists(unit.task, 6, 0)
        learn = self._segkit(
            "pretrain", unit, "--method", "inpainting", "--budget", f"{task.minutes}m", "--exclude", str(others)
        )
        data = str(self.data / task.data)
        fill = [sys.executable, "-m", "segkit", "inpaint", "-m", str(folder), "-i", data, "-o", str(folder / "filled")]
        fill += ["--lesions", data, "--bank", str(folder / "bank"), "--cases", str(labelled)]
        return [learn, fill]

    def _tuning(self, unit: Unit) -> list[list[str]]:
        task, source = TASKS[unit.task], unit.source
        _, others = self._lists(unit.task, unit.labels, unit.seed)
        steps = task.steps * (3 if unit.variant == LONGER else 1)
        has_encoder = source is not None and unit.arm != BANK
        settings: dict[str, Any] = {
            **({} if has_encoder else task.network),
            **task.tuning,
            "optimiser.lr": self.lr,
            "optimiser.encoder_lr": 0 if unit.variant == FROZEN else self.encoder_lr if has_encoder else 1,
            **{"training.steps": steps, "training.steps_per_epoch": steps // 5, "training.ema_decay": 0.99},
            **{"training.seed": unit.seed, "training.live_page": False},
        }
        options = ["--exclude", str(others)]
        if source is not None and unit.arm == BANK:
            settings["augmentation.lesion_bank"] = str(source.folder(self.out) / "bank")
        elif source is not None:
            options += ["--weights", str(source.folder(self.out))]
        command = self._segkit("train", unit, *options, **settings)
        return [[*command, *(part for setting in self.more for part in ("--set", setting))]]

    def _segkit(self, verb: str, unit: Unit, *options: str, **settings: Any) -> list[str]:
        data = self.data / TASKS[unit.task].data
        command = [sys.executable, "-m", "segkit", verb, str(data), "-o", str(unit.folder(self.out)), "--preset", "cpu"]
        given = (f"{name}={json.dumps(value)}" for name, value in settings.items())
        return [*command, *options, "--overwrite", *(part for setting in given for part in ("--set", setting))]

    def _lists(self, name: str, labels: int, seed: int) -> tuple[Path, Path]:
        """Files with the labelled cases, and with all others."""
        task = TASKS[name]
        every = sorted(case.id for case in segkit.find_cases(self.data / task.data).cases)
        kept_out = set(read_case_ids(HERE / KEPT_OUT[task.data]) or [])
        pool = [case_id for case_id in every if case_id not in kept_out]
        drawn = np.random.default_rng(0 if task.has_one_choice else seed).permutation(pool)[:labels].tolist()
        files = []
        for what, ids in (("labelled", drawn), ("others", [case_id for case_id in every if case_id not in drawn])):
            path = self.out.resolve() / "lists" / f"{task.data}-{labels}-{seed}-{what}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{case_id}\n" for case_id in ids), encoding="utf-8")
            files.append(path)
        return files[0], files[1]

    def _measures(self, folder: Path, data: Path) -> dict[str, Any]:
        """Steps and measures of a pre-training; no kept-out case may be among its images."""
        split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
        kept_out = set(read_case_ids(HERE / KEPT_OUT[data.name]) or [])
        if seen := kept_out & {*split["training"], *split["validation"]}:
            raise SystemExit(f"{folder} has learnt from cases that are kept out: {sorted(seen)}")
        found = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
        return {name: found[name] for name in ("steps", "before", "after")}


def main() -> None:
    """Do what is missing and fits, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of data sets; without it nothing is trained")
    parser.add_argument("--out", type=Path, help="folder of runs")
    parser.add_argument("--minutes", type=float, default=np.inf, help="stop before a unit that would end later")
    parser.add_argument("--only", choices=list(TASKS), help="units of this task alone")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the fine-tunings")
    parser.add_argument("--encoder-lr", type=float, default=0.1, help="share of it for encoders that are not random")
    parser.add_argument("--set", action="append", default=[], help="setting of all fine-tunings, for other --results")
    parser.add_argument("--list", action="store_true", help="print the units, and train nothing")
    parser.add_argument("--results", type=Path, default=HERE / "transfer.jsonl")
    arguments = parser.parse_args()
    wanted = [unit for unit in units() if arguments.only in (None, unit.task)]
    rates = arguments.lr, arguments.encoder_lr
    if arguments.list:
        print_units(wanted, of_rates(read_lines(arguments.results), rates))
    elif arguments.data is not None and arguments.out is not None:
        bench = Bench(arguments.data.resolve(), arguments.out, *rates, arguments.set)
        end = time.monotonic() + 60 * arguments.minutes
        train_missing(bench, wanted, arguments.results, end)
    print_tables(of_rates(read_lines(arguments.results), rates))


def train_missing(bench: Bench, wanted: Sequence[Unit], results: Path, end: float) -> None:
    """Do the units that the results lack, in order, until one does not fit before `end`."""
    for unit in wanted:
        lines = of_rates(read_lines(results), (bench.lr, bench.encoder_lr))
        is_there = unit.labels > 0 or (unit.folder(bench.out) / "model.safetensors").exists()
        if unit in map(unit_of, lines) and is_there:
            continue
        if time.monotonic() + 60 * unit.expected_minutes(lines) > end:
            print(f"{unit} would take about {unit.expected_minutes(lines):.1f} minutes; stopped", file=sys.stderr)
            return
        line = bench.run(unit)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def of_rates(lines: Iterable[dict[str, Any]], rates: tuple[float, float]) -> list[dict[str, Any]]:
    """The pre-trainings, and the fine-tunings at these learning rates."""
    return [line for line in lines if not line["labels"] or (line["lr"], line["encoder_lr"]) == rates]


def unit_of(line: Settings) -> Unit:
    """The unit of a line of the results."""
    return Unit(**{name: line[name] for name in Unit.__dataclass_fields__})


def print_units(wanted: Sequence[Unit], lines: Sequence[Settings]) -> None:
    """Each unit, whether it is done, and the minutes until then."""
    done, total = set(map(unit_of, lines)), 0.0
    for unit in wanted:
        total += 0.0 if unit in done else unit.expected_minutes(lines)
        name = f"{unit.task}, {unit.arm}, source seed {unit.source_seed}"
        what = f"{unit.labels} labels, seed {unit.seed}, {unit.variant}" if unit.labels else "pre-training"
        print(f"{'done' if unit in done else f'{total:6.0f} min'}  {name}: {what}")


def print_tables(lines: Sequence[Settings]) -> None:
    """What pre-trainings measured; Dice of each comparison with differences from random weights; plateaus."""
    found = {unit_of(line): line for line in lines}
    for task in TASKS:
        of_task = {unit: line for unit, line in found.items() if unit.task == task}
        for unit, line in of_task.items():
            if not unit.labels and "after" in line:
                changes = (f"{name} {line['before'][name]:.2f} -> {value:.2f}" for name, value in line["after"].items())
                print(f"{task}, {unit.arm}, seed {unit.source_seed}: {line['steps']} steps; {', '.join(changes)}")
        tuned = {unit: float(np.mean(list(line["dice"].values()))) for unit, line in of_task.items() if unit.labels}
        for labels, variant in dict.fromkeys((unit.labels, unit.variant) for unit in tuned):
            title = f"{task}, {labels} labelled cases, {variant}"
            compared = {unit: dice for unit, dice in tuned.items() if (unit.labels, unit.variant) == (labels, variant)}
            print_comparison(title, compared, tuned)


def print_comparison(title: str, dice: Mapping[Unit, float], every: Mapping[Unit, float]) -> None:
    """A Markdown table with a row for each arm; longer runs are compared with those of the usual length."""
    print(f"\n| {title} | seeds | Dice | minus random weights |\n|---|---:|---:|---:|")
    random = {unit.seed: value for unit, value in dice.items() if unit.arm == RANDOM}
    for arm, source_seed in dict.fromkeys((unit.arm, unit.source_seed) for unit in dice):
        of_arm = {one.seed: value for one, value in dice.items() if (one.arm, one.source_seed) == (arm, source_seed)}
        name = arm if source_seed == 0 else f"{arm}, pre-training seed {source_seed}"
        values = list(of_arm.values())
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        pairs = [value - random[seed] for seed, value in of_arm.items() if seed in random and arm != RANDOM]
        print(f"| {name} | {len(values)} | {np.mean(values):.3f}{spread} | {interval(pairs)} |")
        for unit in (unit for unit in dice if (unit.arm, unit.variant) == (arm, LONGER)):
            usual = every.get(Unit(**{**asdict(unit), "variant": TUNED}))
            if usual is not None:
                print(f"| {name}, seed {unit.seed}: usual length | | {usual:.3f} | |")


def interval(differences: Sequence[float]) -> str:
    """The mean with its 95 % interval."""
    if len(differences) < 2:
        return f"{differences[0]:+.3f}" if differences else ""
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{np.mean(differences):+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
