"""`segkit inpaint`: scans with holes, or with lesions, in; the same scans without them out."""

from pathlib import Path
from typing import Annotated, Any

import typer

import segkit.api.inpaint as api
from segkit.cli.infer import ENGINE, FolderScreen, taken_from
from segkit.cli.options import DryRunOption, JsonOption, verb

_INPAINTING = {
    "model": Annotated[
        Path, typer.Option("-m", "--model", help="Run folder of `segkit pretrain --method inpainting`, or its export.")
    ],
    "mask": Annotated[
        Path | None,
        typer.Option(help="What is missing: a mask, or a folder with one for each case.", show_default=False),
    ],
    "lesions": Annotated[
        Path | None,
        typer.Option(
            help="Lesions to fill: a mask, a folder of masks or of labelled data, or a segmentation model to find them",
            show_default=False,
        ),
    ],
    "margin": Annotated[
        float, typer.Option(min=0.0, help="Millimetres of tissue around lesions that are filled as well.")
    ],
    "anomaly": Annotated[
        bool, typer.Option("--anomaly", help="Also write OUT/<case>_anomaly: how far the scan is from the filled one.")
    ],
    "bank": Annotated[
        Path | None, typer.Option(help="Also write lesion-free copies here, for `segkit train`.", show_default=False)
    ],
}


@verb(api.inpaint, **ENGINE, **_INPAINTING)
def inpaint(dry_run: DryRunOption = False, json: JsonOption = False, quiet: bool = False, **options: Any) -> None:
    """Fill holes or lesions of scans; all other voxels stay the same, bit for bit.

    Holes are given by --mask, by --lesions, or by the input itself if it is a folder of the BraTS inpainting task. One
    image per modality and a manifest are written to OUT; a case without a hole is copied, with a note. Cases that fail
    do not stop the others, and the same command continues where it was interrupted.
    """
    screen = FolderScreen(
        doing="filling",
        announce=lambda task: f"{task.predictor.backend.name} fills holes from {task.holes.origin}",
        describe=lambda plan: {"files": [str(path) for path in plan.all_paths()]},
        files="files",
        file_names=lambda plan: ", ".join(path.name for path in plan.all_paths()),
    )
    with api.open_inpainting(taken_from(options), **options) as folder:
        screen.run(folder, dry_run=dry_run, as_json=json, quiet=quiet)
