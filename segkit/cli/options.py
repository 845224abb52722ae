"""Options that several verbs share, and how verbs print."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from segkit.errors import RequestError, on_one_line, printable, some

if TYPE_CHECKING:
    from rich.console import Console

OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")]
DeviceOption = Annotated[
    str, typer.Option("-d", "--device", help="cpu, cuda, cuda:N, mps, or auto: the best of these.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done with each case; write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only one JSON document on standard output.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Recompute finished cases.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over preset and file, e.g. optimiser.lr=1e-3; repeatable.")
]
_ARGUMENTS = {
    "data": Annotated[Path, typer.Argument(help="Folder with the data, in any layout; see `segkit check`.")],
    "scans": Annotated[Path, typer.Option("-i", "--input", help="Volume, case folder or data folder.")],
    "out": OutputOption,
    "model": Annotated[
        list[Path],
        typer.Option(
            "-m", "--model", help="Run folder, or nnU-Net's results with a STU-Net; several make an ensemble."
        ),
    ],
    "device": DeviceOption,
    "backend": Annotated[
        Literal["auto", "torch", "onnxruntime", "openvino"],
        typer.Option("--backend", help="Library that runs the network; auto: the fastest that is installed."),
    ],
    "overwrite": OverwriteOption,
    "cases": Annotated[
        Path | None,
        typer.Option("--cases", help="Text file with the case ids to use, one per line.", show_default=False),
    ],
    "layout": Annotated[str | None, typer.Option("--layout", help="Data layout, if it is not recognised.")],
    "label_scheme": Annotated[
        str | None,
        typer.Option(
            "--label-scheme", help="Label scheme, if it cannot be inferred; NAME,ignore=VALUE ignores voxels."
        ),
    ],
    "modalities": Annotated[
        list[str] | None,
        typer.Option("--modality", help="name=suffix of a modality's files, e.g. t1c=_T1_post; repeat for each."),
    ],
    "patients": Annotated[
        Path | None, typer.Option("--patients", help="Table of case,patient, where names do not hold the patient.")
    ],
    "preset": Annotated[
        str | None,
        typer.Option("--preset", help="tiny, cpu, default or large; without it cpu on a CPU, default on a GPU."),
    ],
    "settings": SetOption,
    "memory": Annotated[
        str | None, typer.Option("--memory", help="Memory to plan for, e.g. 8G; default: the free memory.")
    ],
}
"""Arguments of several functions of `segkit.api` -> what they are on the command line."""
_LOUDNESS = {
    "quiet": Annotated[bool, typer.Option("-q", "--quiet", help="Only errors.")],
    "verbose": Annotated[bool, typer.Option("-v", "--verbose", help="Also details and tracebacks.")],
}


def verb(of: Callable[..., Any] | None = None, /, **kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: adds --quiet, --verbose, and the arguments of `of`, a function of `segkit.api`.

    Their types on the command line are those of `kinds`, else of `_ARGUMENTS`; an argument in neither is not offered.
    The command gets them by name, and `quiet` and `verbose` if it has arguments of these names.
    """
    kinds = _ARGUMENTS | kinds
    arguments = {} if of is None else dict(inspect.signature(of).parameters)
    if "settings" in arguments:  # those by name
        arguments["settings"] = inspect.Parameter("settings", inspect.Parameter.KEYWORD_ONLY, default=None)

    def typed(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        hints = get_type_hints(command, include_extras=True)
        offered = {name: (kinds[name], one.default) for name, one in arguments.items() if name in kinds}
        offered |= {
            name: (hints[name], one.default)
            for name, one in own.items()
            if name not in arguments and one.kind is not inspect.Parameter.VAR_KEYWORD
        }
        offered |= {name: (kind, False) for name, kind in _LOUDNESS.items()}

        @functools.wraps(command)
        def run(**options: Any) -> None:
            set_verbosity(is_quiet=options["quiet"], is_verbose=options["verbose"])
            options |= {name: read(options[name]) for name, read in _READERS.items() if name in arguments}
            command(**{name: value for name, value in options.items() if name in own or name not in _LOUDNESS})

        by_name = inspect.Parameter.KEYWORD_ONLY
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, by_name, default=one, annotation=kind) for name, (kind, one) in offered.items()]
        )
        run.__annotations__ = {name: kind for name, (kind, _) in offered.items()}
        return run

    return typed


def console() -> Console:
    """A console on standard error that interprets no markup; standard output is for results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def set_verbosity(*, is_quiet: bool = False, is_verbose: bool = False) -> None:
    """Set the level of the log, on standard error."""
    level = logging.ERROR if is_quiet else logging.DEBUG if is_verbose else logging.INFO
    logging.getLogger("segkit").setLevel(level)


def print_json(document: object) -> None:
    """Print one strict JSON document on standard output."""
    sys.stdout.write(printable(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on standard output, 160 characters wide if that is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(on_one_line(title)), title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(Text(on_one_line(column)), justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(Text(on_one_line(cell)) for cell in row))
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=160)
    out.print(table)


def print_stdout(text: str) -> None:
    """Print lines on standard output; control characters in them are escaped."""
    typer.echo(printable(text))


def print_stderr(text: str, style: str = "", *, above: Console | None = None) -> None:
    """Print lines on standard error, above the progress bar if `above` is its console; see `print_stdout`."""
    (above or console()).print(printable(text), style=style, soft_wrap=True)


def print_left_out(names: Sequence[str]) -> None:
    """Print the files that belong to no case on standard error, if there are any."""
    if names:
        files = "file belongs" if len(names) == 1 else "files belong"
        print_stderr(f"left out: {len(names)} {files} to no usable case: {some(names)}", style="red")


def read_modalities(pairs: list[str] | None) -> dict[str, str] | None:
    """`["t1c=_T1_post"]` to `{"t1c": "_T1_post"}`; None stays None.

    Raises:
        RequestError: an entry is not name=suffix.
    """
    if not pairs:
        return None
    mapping: dict[str, str] = {}
    for pair in pairs:
        name, _, suffix = pair.partition("=")
        if not name or not suffix:
            raise RequestError(f"--modality {pair!r} cannot be read", expected="name=suffix, such as t1c=_T1_post")
        mapping[name] = suffix
    return mapping


def read_settings(settings: list[str] | None) -> dict[str, Any]:
    """`["training.steps=5"]` to `{"training": {"steps": 5}}`; raises RequestError if an entry cannot be read."""
    from segkit.config import parse_overrides

    return parse_overrides(settings or [])


_READERS: dict[str, Callable[[Any], Any]] = {"modalities": read_modalities, "settings": read_settings}
"""Arguments of `segkit.api` that are read before a command gets them."""
