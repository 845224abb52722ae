"""`segkit phantom`: seeded BraTS-like volumes in published data layouts."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from segkit.cli.options import print_stdout, verb

_CONVENTIONS = "brats2018, brats2020, brats2021, brats2023, brats2024, msd, nnunet or bids"


@verb()
def phantom(
    output: Annotated[Path, typer.Argument(help="Folder to write to; new or empty.")],
    cases: Annotated[int, typer.Option("--cases", min=1, help="How many cases.")] = 10,
    size: Annotated[int, typer.Option("--size", min=24, help="Voxels of 1 mm per axis; the height is 0.8 of it.")] = 64,
    convention: Annotated[
        str | None, typer.Option("--convention", help=f"{_CONVENTIONS}. [default: brats2021]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed gives other patients.")] = 0,
    with_problems: Annotated[
        bool,
        typer.Option(
            "--with-problems", help="Four flawed cases: missing modality, flipped affine, truncated file, stray label."
        ),
    ] = False,
    inpainting: Annotated[
        bool,
        typer.Option(
            "--inpainting",
            help="Folders of BraTS local synthesis instead: T1 complete and voided, masks of healthy hole and tumour.",
        ),
    ] = False,
    quiet: bool = False,
) -> None:
    """Write seeded BraTS-like phantoms with references."""
    from segkit.errors import RequestError
    from segkit.phantoms.layouts import write_inpainting_phantoms, write_phantoms, write_phantoms_with_problems

    numbers = range(1, cases + 1)
    if inpainting:
        other = "--with-problems" if with_problems else "--convention" if convention is not None else None
        if other is not None:
            raise RequestError(f"--inpainting and {other} do not go together", remedy="Leave one of them out")
        convention = "brats-inpainting"
        write_inpainting_phantoms(output, numbers, size=size, seed=seed)
    else:
        convention = convention or "brats2021"
        if with_problems:
            _, problems = write_phantoms_with_problems(output, numbers, convention=convention, size=size, seed=seed)
            for problem in () if quiet else problems:
                print_stdout(f"Planted in {problem}")
        else:
            write_phantoms(output, numbers, convention=convention, size=size, seed=seed)
    if not quiet:
        folder = shlex.quote(str(output))
        print_stdout(f"Wrote {cases} phantoms in the convention {convention}. Next: segkit check {folder}")
