"""`segkit inpaint`: scans with holes, or with lesions, in; the same scans without them out."""

from pathlib import Path
from typing import Annotated

import typer

from segkit.cli.folder import FolderOptions, FolderVerb, run_verb, with_folder_options

RunOption = Annotated[
    Path, typer.Option("-m", "--model", help="Run folder of `segkit pretrain --method inpainting`, or its export.")
]
MaskOption = Annotated[
    Path | None,
    typer.Option("--mask", help="What is missing: a mask, or a folder with one for each case.", show_default=False),
]
LesionsOption = Annotated[
    Path | None,
    typer.Option(
        "--lesions",
        help="Lesions to fill: a mask, a folder of masks or of labelled data, or a segmentation model to find them.",
        show_default=False,
    ),
]
MarginOption = Annotated[
    float, typer.Option("--margin", min=0.0, help="Millimetres of tissue around lesions that are filled as well.")
]
AnomalyOption = Annotated[
    bool, typer.Option("--anomaly", help="Also write OUT/<case>_anomaly: how far the scan is from the filled one.")
]
BankOption = Annotated[
    Path | None,
    typer.Option("--bank", help="Also write lesion-free copies here, for `segkit train`.", show_default=False),
]


@with_folder_options
def inpaint(
    options: FolderOptions,
    model: RunOption,
    mask: MaskOption = None,
    lesions: LesionsOption = None,
    margin: MarginOption = 5.0,
    anomaly: AnomalyOption = False,
    bank: BankOption = None,
) -> None:
    """Fill holes or lesions of scans; all other voxels stay the same, bit for bit.

    Holes are given by --mask, by --lesions, or by the input itself if it is a folder of the BraTS inpainting task. One
    image per modality and a manifest are written to OUT; a case without a hole is copied, with a note. Cases that fail
    do not stop the others, and the same command continues where it was interrupted.
    """
    from segkit.api.inpaint import open_inpainting

    verb = FolderVerb(
        doing="filling",
        announce=lambda task: f"{task.predictor.backend.name} fills holes from {task.holes.origin}",
        describe=lambda plan: {"files": [str(path) for path in plan.all_paths()]},
        files="files",
        file_names=lambda plan: ", ".join(path.name for path in plan.all_paths()),
    )
    with open_inpainting(
        options.for_api(), model, mask=mask, lesions=lesions, margin=margin, anomaly=anomaly, bank=bank
    ) as folder:
        run_verb(options, folder, verb)
