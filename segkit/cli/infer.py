"""`segkit infer`: scans in, masks on their own grids out."""

from typing import Annotated, Any

import typer

from segkit.cli.folder import FolderOptions, FolderVerb, run_verb, with_folder_options
from segkit.cli.options import ModelOption, SchemeOption

TtaOption = Annotated[bool, typer.Option("--tta", help="Average over mirrored inputs: better, up to 8 times slower.")]
MissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="Continue without modalities that a case lacks; recorded.")
]
ProbabilitiesOption = Annotated[
    bool, typer.Option("--save-probabilities", help="Also write OUT/probabilities/<case>_<output>.")
]
UncertaintyOption = Annotated[
    bool, typer.Option("--uncertainty", help="Also write OUT/uncertainty/<case>_entropy and <case>_disagreement.")
]
PatientOption = Annotated[
    bool, typer.Option("--keep-patient", help="Copy the patient's name, numbers and dates into DICOM SEG files.")
]
PostprocessingOption = Annotated[
    bool,
    typer.Option("--postprocessing/--no-postprocessing", help="Clean masks by the rules that training chose, if any."),
]
NumPartsOption = Annotated[int, typer.Option("--num-parts", min=1, help="Split the cases into N parts ...")]
PartIdOption = Annotated[int, typer.Option("--part-id", min=0, help="... and do the K-th of them, counted from 0.")]


@with_folder_options
def infer(
    options: FolderOptions,
    model: ModelOption,
    label_scheme: SchemeOption = None,
    tta: TtaOption = False,
    allow_missing: MissingOption = False,
    save_probabilities: ProbabilitiesOption = False,
    uncertainty: UncertaintyOption = False,
    postprocessing: PostprocessingOption = True,
    keep_patient: PatientOption = False,
    num_parts: NumPartsOption = 1,
    part_id: PartIdOption = 0,
) -> None:
    """Segment a volume, a case folder or a data folder; one mask a case and a manifest go to OUT.

    Cases that fail are named with the reason and do not stop the others; run the same command again to continue where
    it was interrupted.
    """
    from segkit.api.infer import open_segmentation

    verb = FolderVerb(
        doing="segmenting",
        announce=_announce,
        describe=lambda plan: {
            "mask": str(*plan.paths("results")),
            "label_scheme": plan.label_scheme,
            "predicted": dict(plan.predicted),
        },
        files="mask",
        file_names=lambda plan: str(*plan.paths("results")),
    )
    with open_segmentation(
        options.for_api(),
        model,
        label_scheme=label_scheme,
        tta=tta,
        allow_missing=allow_missing,
        save_probabilities=save_probabilities,
        uncertainty=uncertainty,
        postprocessing=postprocessing,
        keep_patient=keep_patient,
        num_parts=num_parts,
        part_id=part_id,
    ) as folder:
        run_verb(options, folder, verb)


def _announce(task: Any) -> str:
    size = " x ".join(map(str, task.window))
    return f"{task.predictor.backend.name} computes windows of {size} voxels"
