"""Resumed trainings equal uninterrupted ones: runs that are killed or damaged, against whole runs. Linux only.

Run with `python benchmarks/resume.py OUT [segmentation pretraining inpainting]`; some minutes on one core. For each
task one command trains on phantoms from beginning to end. Another run is killed by `kill -9`, loses a data-loading
process, has its last checkpoint truncated and gets SIGTERM, has a byte amid its last checkpoint turned over and gets
SIGUSR1, and is resumed with `--resume` each time. In the end every tensor of model, moving average,
optimiser and random numbers, the best weights, and every row of metrics.jsonl but for its seconds must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from segkit.checkpoint.tensors import load_state

NETWORK = ("network.family=revmbunet", "network.size=tiny", "network.arguments.widths=[8, 16]")
LOOP = ("training.steps=140", "training.steps_per_epoch=20", "training.ema_decay=0.9", "data.folds=2")
COMMANDS = {
    "segmentation": ("train", "--set", "planning.patch_size=[24, 24, 24]", "--set", "planning.batch_size=1"),
    "pretraining": (
        *(
            "pretrain",
            "--method",
            "graph-matching",
            "--encoder",
            "revmbunet",
            "--set",
            "views.size=16",
            "--set",
            "batch_size=8",
        ),
        *("--set", "graph_matching.nodes=8", "--set", "validation_groups=2"),
    ),
    "inpainting": (
        *(
            "pretrain",
            "--method",
            "inpainting",
            "--encoder",
            "revmbunet",
            "--set",
            "patches.size=24",
            "--set",
            "validation_holes=2",
        ),
        *("--set", "holes.diameter_range=[4, 10]", "--set", "adversarial.weight=0.1"),
    ),
}
_POLL_S = 0.01


@dataclass(frozen=True)
class Blow:
    """What befalls a session once the journal has `at` rows: a signal, to the training or to its data loading."""

    name: str
    at: int
    number: int
    damage: Callable[[Path], None] | None = None
    to_worker: bool = False


def truncate(path: Path) -> None:
    """Cut the last kilobyte off."""
    path.write_bytes(path.read_bytes()[:-1024])


def turn_over(path: Path) -> None:
    """Turn over all bits of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


BLOWS = (
    Blow("kill -9", 40, signal.SIGKILL),
    Blow("kill -9 of a data-loading process", 60, signal.SIGKILL, to_worker=True),
    Blow("last.ckpt truncated; SIGTERM", 80, signal.SIGTERM, truncate),
    Blow("byte of last.ckpt turned over; SIGUSR1", 100, signal.SIGUSR1, turn_over),
)


def main() -> None:
    """Read the command line, make phantoms, and report on each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("tasks", nargs="*", choices=[*COMMANDS, []], default=[])
    arguments = parser.parse_args()
    data = arguments.out / "phantoms"
    if not data.exists():
        segkit("phantom", data, "--cases", 4, "--size", 32).wait()
    is_all_well = True
    for task in arguments.tasks or COMMANDS:
        is_all_well &= try_task(task, data, arguments.out)
    sys.exit(0 if is_all_well else 1)


def segkit(*command: object) -> subprocess.Popen[bytes]:
    """A started command of segkit on one core; its log is in the file that follows `-o`."""
    words = [str(part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "segkit", *words], env=environment, stderr=subprocess.PIPE)


def try_task(task: str, data: Path, out: Path) -> bool:
    """One task, whole and battered; whether both ended the same."""
    whole, battered = out / task / "whole", out / task / "battered"
    shutil.rmtree(out / task, ignore_errors=True)
    verb, *options = COMMANDS[task]
    settings = [part for setting in (*NETWORK, *LOOP) for part in ("--set", setting)]
    begin = (*options, *settings, "--preset", "tiny", "-d", "cpu", "-q")
    finish(segkit(verb, data, "-o", whole, *begin))
    print(f"\n| {task} | exit code | seconds to the end | last words |\n|---|---|---|---|", flush=True)
    for position, blow in enumerate(BLOWS):
        if blow.damage is not None:
            blow.damage(battered / "last.ckpt")
        workers = ("--set", f"training.workers={int(blow.to_worker)}")
        how = begin if position == 0 else ("--resume", "-d", "cpu", "-q")
        tell(blow, *strike(segkit(verb, data, "-o", battered, *how, *workers), battered, blow))
    told = finish(segkit(verb, data, "-o", battered, "--resume", "-d", "cpu", "-q"), may_fail=True)
    tensors, differing = compare(whole, battered)
    rows, same_rows = journal(whole), journal(whole) == journal(battered)
    print(f"\n{told or 'Resumed to the end.'} {tensors - len(differing)} of {tensors} tensors and values are equal"
          f"{': not ' + ', '.join(differing[:5]) if differing else ''}; {len(rows)} rows, "
          f"{'all equal' if same_rows else 'not equal'}.", flush=True)  # fmt: skip
    return not differing and same_rows


def strike(process: subprocess.Popen[bytes], run: Path, blow: Blow) -> tuple[int, float, str]:
    """Let a session come to its blow; its exit code, how long it took to end, and its last words."""
    wait_for(process, run, blow.at)
    target = children(process.pid)[-1] if blow.to_worker else process.pid
    os.kill(target, blow.number)
    began = time.monotonic()
    if blow.number == signal.SIGUSR1:  # it continues; end it some steps later
        wait_for(process, run, blow.at + 20)
        process.kill()
    _, errors = process.communicate()
    words = [line for line in errors.decode(errors="replace").splitlines() if line.strip()][-1:]
    if (run / "damaged.ckpt").exists():
        (run / "damaged.ckpt").unlink()
        words.insert(0, "(previous.ckpt was used)")
    return process.returncode, time.monotonic() - began, " ".join(words)


def wait_for(process: subprocess.Popen[bytes], run: Path, rows: int) -> None:
    """Wait until the journal on the disk has so many rows, and a state to resume from."""
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if (run / "last.ckpt").exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(_POLL_S)
    sys.exit(f"the training ended before row {rows}: {process.communicate()[1].decode(errors='replace')}")


def children(process: int) -> list[int]:
    """Ids of the processes that a process has started."""
    return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def tell(blow: Blow, code: int, seconds: float, words: str) -> None:
    """A row of the table."""
    print(f"| {blow.name} at row {blow.at} | {code} | {seconds:.1f} | {words} |", flush=True)


def finish(process: subprocess.Popen[bytes], *, may_fail: bool = False) -> str:
    """Wait for a command; its error output."""
    _, errors = process.communicate()
    if process.returncode and not may_fail:
        sys.exit(errors.decode(errors="replace"))
    return errors.decode(errors="replace").strip() if process.returncode else ""


def compare(whole: Path, battered: Path) -> tuple[int, list[str]]:
    """How many tensors and values two runs have, and the names of those that differ; times are left out."""
    one, other = ({**dict(flat(load_state(run))), **load_file(run / "model.safetensors")} for run in (whole, battered))
    names = [name for name in {**one, **other} if not name.endswith(("elapsed_s", "validation_s"))]
    return len(names), [name for name in names if not is_same(one.get(name), other.get(name))]


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, bit for bit."""
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def flat(value: Any, name: str = "state") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of a state by its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}.{place}")
    else:
        yield name, value


def journal(run: Path) -> list[dict[str, Any]]:
    """The rows without their times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


if __name__ == "__main__":
    main()
