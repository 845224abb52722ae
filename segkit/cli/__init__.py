"""The command line: one file per verb, and the table of verbs.

Verbs import heavy modules only inside their functions, so that `--help` is fast.
"""

import importlib
import io
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from segkit.cli.options import print_stderr, print_stdout
from segkit.errors import SegkitError, on_one_line, printable

VERBS: dict[str, str] = {
    "demo": "segkit.cli.demo:demo",
    "phantom": "segkit.cli.phantom:phantom",
    "check": "segkit.cli.check:check",
    "models": "segkit.cli.models:models",
    "train": "segkit.cli.train:train",
    "pretrain": "segkit.cli.pretrain:pretrain",
    "infer": "segkit.cli.infer:infer",
    "inpaint": "segkit.cli.inpaint:inpaint",
    "evaluate": "segkit.cli.evaluate:evaluate",
    "compare": "segkit.cli.evaluate:compare",
    "report": "segkit.cli.report:report",
    "export": "segkit.cli.export:export",
    "convert": "segkit.cli.convert:app",
    "bench": "segkit.cli.bench:app",
    "config": "segkit.cli.config:app",
}
"""Verb -> the function (or the Typer application of sub-verbs) that does it, in the order of `segkit --help`."""

_TRACE_OPTIONS = frozenset({"-v", "--verbose"})
_INTERRUPTED = 130
"""Exit code of a verb that was stopped by Ctrl-C or a signal."""


def build_app() -> typer.Typer:
    """The Typer application with every verb of the table."""
    app = typer.Typer(
        name="segkit",
        help="Medical image segmentation: from a folder of scans to a trained model, masks and scores.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        cls=_Verbs,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for verb, target in VERBS.items():
        loaded = _load(target)
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=verb)
        else:
            app.command(name=verb)(loaded)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a case failed, 2 wrong request, 130 interrupted."""
    from segkit.runtime import is_debug

    arguments = sys.argv[1:] if arguments is None else arguments
    wants_trace = is_debug() or not _TRACE_OPTIONS.isdisjoint(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    try:
        build_app()(arguments)
    except SegkitError as error:
        if wants_trace:
            print_stderr(traceback.format_exc().rstrip())
        prefix = "" if error.exit_code == _INTERRUPTED else "Error: "
        if not error.is_reported:
            print_stderr(f"{prefix}{error}")
        raise SystemExit(error.exit_code) from None
    except SystemExit as leave:
        if leave.code == _INTERRUPTED:
            print_stderr("Interrupted; what was finished is kept.")
        raise
    except Exception:  # a bug of segkit or of a library; its message may contain file names too
        print_stderr(traceback.format_exc().rstrip())
        raise SystemExit(1) from None


class PlainFormatter(logging.Formatter):
    """Escapes control characters and line breaks in log lines, which may contain file names."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is that of `logging`
        """The line, without the trace that may follow."""
        line = super().formatMessage(record)
        if record.name == "py.warnings":
            line, _, _ = line.partition("\n")  # Python appends the source line
        return on_one_line(line)

    def format(self, record: logging.LogRecord) -> str:
        """The line with its trace."""
        return printable(super().format(record))


class _Verbs(TyperGroup):
    """The verbs; usage errors are escaped, since shells replace `*` by file names."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options before the verb."""
        with _escaped_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Find the verb, parse its arguments and call it."""
        with _escaped_errors():
            return super().invoke(ctx)


@contextmanager
def _escaped_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):  # an attribute of the errors of typer
            error.message = on_one_line(message)  # type: ignore[attr-defined]
        raise


def _load(target: str) -> Callable[..., Any] | typer.Typer:
    module, _, name = target.partition(":")
    loaded: Callable[..., Any] | typer.Typer = getattr(importlib.import_module(module), name)
    return loaded


def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    if version:
        from importlib import metadata

        print_stdout(metadata.version("segkit"))
        raise typer.Exit
