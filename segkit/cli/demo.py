"""`segkit demo`: from scans to scores on phantoms, with the commands that a user would type."""

import json
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from segkit.cli.options import DeviceOption, print_stderr, print_stdout, print_table, verb

_CASES, _HELD_OUT, _SIZE = 30, 6, 48
_SEED = 1
"""A seed whose held-out cases all have an enhancing tumour: the Dice of an absent region is either 0 or 1."""


@verb()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder to write to; new or empty.")],
    budget: Annotated[str, typer.Option("--budget", help="Wall time of the training, e.g. 5m.")] = "5m",
    device: DeviceOption = "auto",
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Make phantoms, train on most, segment the others, score them, and compare with the best threshold.

    Takes minutes on two cores and needs no internet. Every step is an ordinary command, printed before it runs.
    """
    from segkit.inference.backend_loading import can_write_graphs
    from segkit.phantoms.layouts import require_empty

    require_empty(output)
    names = ("data", "run", "masks", "scores", "export", "report.html", "held-out.txt")
    data, run, masks, scores, exported, page, held_out = (output / name for name in names)
    on_device = [] if device == "auto" else ["--device", device]
    steps = {
        "phantom": [data, "--cases", _CASES, "--size", _SIZE, "--convention", "brats2021", "--seed", _SEED],
        "train": [data, "-o", run, "--preset", "tiny", "--budget", budget, "--exclude", held_out, *on_device],
        "infer": ["-m", run, "-i", data, "-o", masks, "--cases", held_out, *on_device],
        "evaluate": ["-p", masks, "-r", data, "-o", scores, "--cases", held_out, "--figures", _HELD_OUT],
        "export": ["-m", run, "-o", exported],
        "report": [run, masks, scores, "-o", page],
    }
    if not can_write_graphs():
        del steps["export"]
        print_stderr("no export, because ONNX is not installed: pip install 'segkit[onnx]'")
    loudness = [option for option, is_given in (("-q", quiet), ("-v", verbose)) if is_given]
    seconds: dict[str, float] = {}
    for name, arguments in steps.items():
        seconds[name] = _run([name, *(str(argument) for argument in arguments), *loudness], is_quiet=quiet)
        if name == "phantom":
            _write_held_out(data, held_out, is_quiet=quiet)
    _report_result(output, seconds)


def _run(command: list[str], *, is_quiet: bool) -> float:
    """Print a command, run it, and return the seconds it took.

    Raises:
        typer.Exit: with the exit code of a command that failed.
    """
    from segkit.cli import build_app

    if not is_quiet:
        print_stderr(f"\n$ segkit {shlex.join(command)}", style="bold")
    started_s = time.perf_counter()
    code = build_app()(command, standalone_mode=False)
    if code:
        print_stderr(f"{command[0]} failed (exit code {code}); the demo stops here")
        raise typer.Exit(code)
    took_s = time.perf_counter() - started_s
    if not is_quiet:
        print_stderr(f"{command[0]}: {took_s:.0f} s")
    return took_s


def _write_held_out(data: Path, path: Path, *, is_quiet: bool) -> None:
    """Write the list of the last cases, which are excluded from training."""
    from segkit.reading.layouts.table import find_cases

    case_ids = sorted(case.id for case in find_cases(data).cases)[-_HELD_OUT:]
    path.write_text("\n".join(["# cases excluded from training", *case_ids, ""]), encoding="utf-8")
    if not is_quiet:
        print_stderr(f"held out: {', '.join(case_ids)}")


def _report_result(output: Path, seconds: dict[str, float]) -> None:
    """Compare with the best single intensity threshold on the held-out cases, and list the files."""
    from segkit.api.arguments import read_case_ids
    from segkit.labels import outputs_of
    from segkit.phantoms.phantom import best_single_thresholds
    from segkit.preparing.preprocessing import load_case
    from segkit.reading.layouts.table import find_cases

    cohort = find_cases(output / "data", require_labels=True)
    wanted = set(read_case_ids(output / "held-out.txt") or ())
    loaded = [load_case(case, cohort.modalities, cohort.scheme) for case in cohort.cases if case.id in wanted]
    best_thresholds = best_single_thresholds(
        [case.image for case in loaded],
        [case.labels for case in loaded if case.labels is not None],
        modalities=cohort.modalities,
        regions={} if cohort.scheme is None else {part.name: part.members for part in outputs_of(cohort.scheme)},
    )
    summary = json.loads((output / "scores" / "scores.json").read_text(encoding="utf-8"))["summary"]
    rows = []
    for region, best in best_thresholds.items():
        dice = float(summary[region]["dice"]["mean"])
        rule = f"{best.modality} {best.direction} {best.threshold:.1f} sd"
        rows.append((region, f"{dice:.3f}", f"{best.dice:.3f}", rule, f"{dice - best.dice:+.3f}"))
    print_stdout("")
    print_table(
        f"Mean Dice on {_HELD_OUT} held-out phantoms",
        ("region", "trained network", "best single threshold", "(which, chosen on these cases)", "difference"),
        rows,
    )
    took = ", ".join(f"{verb} {value:.0f} s" for verb, value in seconds.items())
    print_stdout(f"{took}; in all {sum(seconds.values()):.0f} s")
    files = {
        "data": f"{_CASES} phantoms in the layout of BraTS 2021; those of held-out.txt were excluded from training",
        "run": "the trained model, its settings, and figures of the training",
        "masks": "the segmentations, and manifest.json with their times",
        "scores": "scores.json, scores.csv, summary.md, and figures of every held-out case",
        "report.html": "all of this on one page, for a browser",
        "export": "the model as model.onnx with model.json, for `segkit infer -m` without torch",
    }
    for name, meaning in files.items():
        if (output / name).exists():
            print_stdout(f"  {output / name}: {meaning}")
