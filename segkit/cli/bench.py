"""`segkit bench`: tables of memory and speed, measured on this machine."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from segkit.cli.options import DeviceOption, JsonOption, print_json, print_stderr, print_table, verb
from segkit.errors import RequestError

app = typer.Typer(no_args_is_help=True, help="Measure memory and speed on this machine.")

TableOption = Annotated[list[str] | None, typer.Option("--table", help="Table to measure; repeatable; default: all.")]
SideOption = Annotated[int, typer.Option("--side", min=16, help="Side of the cubic patch, in voxels.")]
DepthsOption = Annotated[
    str | None, typer.Option("--blocks", help="Blocks per level, e.g. 1,2,4; default: those of the table.")
]
SizeOption = Annotated[str, typer.Option("--size", help="Size of RevMBUNet.")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Times that every variant runs, in turn.")]

_DEPTHS = {"modes": (1, 2, 4, 8), "depth": (2, 4, 8, 16), "budget": (1, 2, 4)}
_SIDES = {"depth": 96}
_DEFAULT_SIDE = 64


@app.command()
@verb()
def memory(
    table: TableOption = None,
    side: Annotated[
        int | None, typer.Option("--side", min=32, help="Side of the cubic patch, in voxels; default: the table's.")
    ] = None,
    blocks: DepthsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Memory of a training step: `modes`, `depth`, `budget` and `volume` (a whole BraTS volume).

    Every figure is the peak of a process of its own; all tables together take most of an hour on two cores.
    """
    from segkit.bench.memory import TABLES
    from segkit.runtime import pick_device

    chosen = _chosen(table, TABLES)
    where = str(pick_device(device))

    def rows() -> Iterable[dict[str, Any]]:
        for name in chosen:
            if name == "volume":
                yield from TABLES[name](where)
            else:
                depths = _numbers(blocks) or _DEPTHS[name]
                yield from TABLES[name](side or _SIDES.get(name, _DEFAULT_SIDE), depths, where)

    _show("Memory of one training step", rows(), as_json=as_json, is_quiet=quiet)


@app.command()
@verb()
def speed(
    table: TableOption = None,
    side: SideOption = _DEFAULT_SIDE,
    size: SizeOption = "base",
    rounds: RoundsOption = 5,
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="Run folder: time whole commands instead, on --input.")
    ] = None,
    input: Annotated[Path | None, typer.Option("-i", "--input", help="Case folder for --model.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="Backend for --model; repeatable; default: auto.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Script to run by hand: SCRIPT RUN CASE_DIR OUT.nii.gz.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Seconds of a training step and of an inference window, and their ratio to PyTorch's own layers.

    With --model and --input: seconds and memory of `segkit infer` on a CPU, cold and warm, and their ratio to the same
    network run by hand with nibabel and MONAI's sliding windows.
    """
    from segkit.bench.speed import TABLES, measure
    from segkit.bench.whole import measure_whole
    from segkit.runtime import pick_device

    if (model is None) != (input is None):
        raise RequestError("one of --model and --input is missing", expected="both, or neither")
    if model is not None and input is not None:
        rows = measure_whole(model, input, rounds, backends=backend or ("auto",), reference=reference)
        _show("Whole commands", rows, as_json=as_json, is_quiet=quiet)
        return
    where = str(pick_device(device))
    rows = (row for name in _chosen(table, TABLES) for row in measure(name, size, side, rounds, where))
    _show("Speed", rows, as_json=as_json, is_quiet=quiet)


@app.command()
@verb()
def gpu(
    table: TableOption = None,
    side: SideOption = 128,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Whether a device agrees with a CPU (`parity`), planned and real `memory`, and `seconds` of a training step."""
    from segkit.bench.gpu import TABLES
    from segkit.runtime import pick_device

    where = pick_device(device)
    rows = (row for name in _chosen(table, TABLES) for row in TABLES[name](where, side))
    _show(f"Training steps on {where}", rows, as_json=as_json, is_quiet=quiet)


def _show(title: str, rows: Iterable[dict[str, Any]], *, as_json: bool, is_quiet: bool) -> None:
    from segkit.runtime import environment

    found = []
    for row in rows:
        found.append(row)
        if not (as_json or is_quiet):
            print_stderr(", ".join(f"{key} {value}" for key, value in row.items()))
    if as_json:
        print_json({"rows": found, "environment": environment()})
        return
    columns = list(dict.fromkeys(key for row in found for key in row))
    print_table(title, columns, [[row.get(column, "") for column in columns] for row in found])


def _chosen(requested: list[str] | None, known: Iterable[str]) -> list[str]:
    names = list(known)
    if unknown := [name for name in requested or () if name not in names]:
        raise RequestError(f"table {unknown[0]!r} is not known", expected=f"one of {', '.join(names)}")
    return requested or names


def _numbers(text: str | None) -> tuple[int, ...] | None:
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"--blocks {text!r} cannot be read", expected="whole numbers such as 1,2,4")
    return tuple(int(part) for part in parts) or None
