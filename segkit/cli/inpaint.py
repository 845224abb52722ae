"""`segkit inpaint`: scans with holes, or with lesions, in; the same scans without them out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segkit.cli.folder import FolderOptions, FolderVerb, Loading, run_verb, with_folder_options
from segkit.cli.options import read_case_ids
from segkit.errors import DataError, RequestError

if TYPE_CHECKING:
    from segkit.inpainting.inpaint import Inpaint
    from segkit.reading.case import Cohort

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

_THREE_WAYS = (
    "--mask FILE_OR_FOLDER for what is missing, --lesions MASKS_OR_MODEL for lesions to fill, or a folder of the BraTS "
    "inpainting task (-t1n-voided and -mask)"
)


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
    """Fill what is missing of scans, or their lesions; all other voxels come back as they were, bit for bit.

    What is missing is told by --mask, by --lesions, or by the folder itself where it is one of the BraTS inpainting
    task. One image a modality and a manifest go to OUT; a case of which nothing is missing is written as it is, with a
    note. Cases that fail do not stop the others, and the same command goes on where it was interrupted.
    """
    if mask is not None and lesions is not None:
        raise RequestError("--mask and --lesions both say what is filled", remedy="Give one of them")
    _refuse_bank_in_input(bank, options.input)
    if bank is not None and options.engine == "ray":
        bank = bank.absolute()  # nodes have working directories of their own
    if options.engine == "local" and options.memory is not None and options.workers is None:
        options = replace(options, workers=0)  # a case that waits takes memory as well

    def find(source: Path) -> tuple[Cohort, str | None]:
        is_voided = mask is None and lesions is None
        return _find_voided(source, options) if is_voided else options.find_input(source), None

    def load(cohort: Cohort, loading: Loading) -> Inpaint:
        from segkit.inpainting.inpaint import Inpaint
        from segkit.inpainting.masks import find_lesions, find_masks, masks_of_cohort
        from segkit.inpainting.predictor import InpaintingPredictor

        predictor = InpaintingPredictor.load(model, *loading)
        if mask is not None:
            holes = find_masks(cohort, mask)
        elif lesions is not None:
            holes = find_lesions(cohort, lesions, margin, *loading)
        else:
            holes = masks_of_cohort(cohort, options.input)
        return Inpaint(predictor, holes, save_holes=lesions is not None, anomaly=anomaly, bank=bank)

    verb = FolderVerb(
        model=str(model),
        doing="filling",
        find=find,
        load=load,
        announce=lambda task: f"{task.predictor.backend.name} fills holes from {task.holes.origin}",
        describe=lambda plan: {"files": [str(path) for path in plan.all_paths()]},
        files="files",
        file_names=lambda plan: ", ".join(path.name for path in plan.all_paths()),
        bank=bank,
    )
    run_verb(options, verb)


def _refuse_bank_in_input(bank: Path | None, input: Path) -> None:
    if bank is not None and input.is_dir() and bank.resolve().is_relative_to(input.resolve()):
        raise RequestError(
            "lies in the input folder, where its copies would be taken for scans",
            where=bank,
            remedy="Choose another folder for --bank",
        )


def _find_voided(source: Path, options: FolderOptions) -> Cohort:
    """The cases of a folder of the BraTS inpainting task."""
    from segkit.batch.cases import choose_cases
    from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT, find_voided

    if options.layout not in (None, SYNTHESIS_LAYOUT) or options.modality:
        raise RequestError("nothing says what is missing of scans in another layout", expected=_THREE_WAYS)
    try:
        cohort = find_voided(source, exclude=options.output.resolve())
    except DataError as error:
        raise RequestError(
            f"nothing says what is missing: {error.found}", where=source, expected=_THREE_WAYS
        ) from error
    return choose_cases(cohort, read_case_ids(options.cases))
