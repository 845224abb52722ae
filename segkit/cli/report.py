"""`segkit report`: one HTML page about runs, masks and scores."""

from pathlib import Path
from typing import Annotated

import typer

from segkit.cli.options import JsonOption, print_json, print_stderr, print_stdout, verb


@verb()
def report(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders of `train`, `infer` and `evaluate -o`; several make one page.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write, such as page.html.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with the scans, where the documents do not name it.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading; default: the names of the folders.")] = None,
    viewer: Annotated[
        bool, typer.Option("--viewer/--no-viewer", help="The worst cases in three dimensions (extra `viewer`).")
    ] = True,
    json: JsonOption = False,
    quiet: bool = False,
) -> None:
    """Write one self-contained HTML page: scores, curves, pictures, times and settings.

    It loads nothing from a network, and contains the names of folders but no paths.
    """
    from segkit.errors import RequestError
    from segkit.report.page import write_page

    if output.is_dir():
        raise RequestError("is a folder", where=output, expected="the name of the page, such as page.html")
    facts = write_page(sources, output, data=data, title=title, with_viewer=viewer)
    if json:
        document = {"page": str(facts.path), "bytes": facts.size_bytes, "cases": facts.cases}
        print_json({**document, "stills": facts.stills, "volumes": facts.volumes, "notes": list(facts.notes)})
    elif not quiet:
        counted = f"{facts.cases} cases, {facts.stills} with pictures, {facts.volumes} in the viewer"
        print_stdout(f"{facts.path}: {facts.size_bytes / 1e6:.1f} MB, {counted}")
        for note in facts.notes:
            print_stderr(note, style="yellow")
