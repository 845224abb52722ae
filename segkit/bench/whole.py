"""Whole commands from files to mask: `segkit infer` on one case against the same network run by hand.

Commands run in turn (A B, A B, ...); ratios are medians over the rounds. The row "cold" is `segkit infer` once before
the rounds, with an empty cache: it includes writing the network for the runtime.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segkit.checkpoint.run_folder import load_card
from segkit.errors import RequestError
from segkit.metrics.overlap import dice_by_region
from segkit.reading.files import read_labels
from segkit.runtime import variables_with
from segkit.shapes import LabelMap


class Finished(NamedTuple):
    """Output of a process, its exit code, wall seconds and peak resident memory in MB."""

    output: str
    errors: str
    code: int
    seconds: float
    peak_rss_mb: float


def run_python(arguments: Sequence[str], **variables: str) -> Finished:
    """Run Python with these arguments and environment variables."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=errors, env=variables_with(**variables)
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        scale = 1024**2 if sys.platform == "darwin" else 1024
        return Finished(output.read(), errors.read(), process.returncode, seconds, usage.ru_maxrss / scale)


Row = dict[str, Any]


class Outcome(NamedTuple):
    """One run of a command: wall seconds, peak resident memory in MB, seconds by stage, its mask."""

    wall: float
    peak_rss_mb: float
    stages: Mapping[str, float]
    mask: LabelMap


def measure_whole(
    run: Path, case: Path, rounds: int, *, backends: Sequence[str] = ("auto",), reference: Path | None = None
) -> Iterator[Row]:
    """Rows "by hand", "cold" and one for each backend, with the Dice of each output to the mask made by hand.

    `reference` is a script that replaces `segkit.bench.by_hand`, with the same arguments.

    Raises:
        RequestError: a command fails; its error output is in the message.
    """
    by_hand = [str(reference)] if reference else ["-m", "segkit.bench.by_hand"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cold = _infer(run, case, folder, backends[0])
        runs: dict[str, list[Outcome]] = {"by hand": [], **{backend: [] for backend in backends}}
        for _ in range(rounds):
            runs["by hand"].append(_by_hand(by_hand, run, case, folder))
            for backend in backends:
                runs[backend].append(_infer(run, case, folder, backend))
    outputs = {output.name: output.members for output in load_card(run).outputs if output.label}
    yield _row("by hand", runs["by hand"], runs["by hand"], outputs)
    yield _row(f"{backends[0]}, cold", [cold], runs["by hand"][:1], outputs)
    for backend in backends:
        yield _row(backend, runs[backend], runs["by hand"], outputs)


def _row(
    name: str, runs: Sequence[Outcome], reference: Sequence[Outcome], outputs: Mapping[str, tuple[int, ...]]
) -> Row:
    dice = dice_by_region(runs[0].mask, reference[0].mask, outputs)
    pairs = list(zip(runs, reference, strict=True))
    return {
        "command": name,
        "seconds": round(statistics.median(run.wall for run in runs), 2),
        "of_by_hand": round(statistics.median(run.wall / other.wall for run, other in pairs), 3),
        "peak_rss_mb": round(statistics.median(run.peak_rss_mb for run in runs)),
        "memory_of_by_hand": round(statistics.median(run.peak_rss_mb / other.peak_rss_mb for run, other in pairs), 3),
        **{stage: round(statistics.median(run.stages[stage] for run in runs), 2) for stage in runs[0].stages},
        "dice": {region: round(float(value), 5) for region, value in dice.items()},
    }


def _infer(run: Path, case: Path, folder: Path, backend: str) -> Outcome:
    out = folder / "masks"
    command = ["-m", "segkit", "infer", "-m", str(run), "-i", str(case), "-o", str(out)]
    options = ["-d", "cpu", "--backend", backend, "--no-postprocessing", "--overwrite", "-q", "--json"]
    done = _run([*command, *options], folder)
    record = json.loads(done.output)["cases"][0]
    if record["status"] != "done":
        raise RequestError(f"the case failed: {record['error']}", where=case)
    mask = read_labels(out / f"{record['case']}.nii.gz")[0]
    return Outcome(done.seconds, done.peak_rss_mb, record["seconds"], mask)


def _by_hand(script: Sequence[str], run: Path, case: Path, folder: Path) -> Outcome:
    mask = folder / "by_hand.nii.gz"
    done = _run([*script, str(run), str(case), str(mask)], folder)
    stages = json.loads(done.output.splitlines()[-1])["seconds"]
    return Outcome(done.seconds, done.peak_rss_mb, stages, np.asarray(read_labels(mask)[0]))


def _run(arguments: Sequence[str], folder: Path) -> Finished:
    done = run_python(arguments, SEGKIT_CACHE=str(folder / "cache"))
    if done.code:
        raise RequestError(f"{' '.join(arguments)} ended with {done.code}: {done.errors[-500:]}")
    return done
