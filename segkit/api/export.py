"""`segkit.export_model`: a trained network as ONNX files that need no torch."""

from pathlib import Path
from typing import Any, Literal

from segkit.api.arguments import AnyPath, CaseIds, read_case_ids
from segkit.errors import RequestError


def export_model(
    run: AnyPath,
    out: AnyPath,
    *,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    data: AnyPath | None = None,
    cases: CaseIds | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write model.onnx and model.json into `out`, checked against the trained network; `segkit.infer` takes `out`.

    Returns `{"output", "models": [{"folder", "export", "cases"}]}`, where "export" has the seconds per window and the
    largest difference of logits in each backend. `precision` is written besides fp32, with its measured change of Dice.
    `data` is a folder of cases to compare and to calibrate with, `cases` their ids or a text file of them; by default
    the validation cases of the run.

    Raises:
        RequestError: a package is not installed, the model cannot be exported, or `out` is in use.
        CheckpointError: a graph differs from its network; `out` is not changed.
        DataError: the folder cannot be written to.

    Example:
        >>> segkit.export_model("run", "deployed")["models"][0]["folder"]  # doctest: +SKIP
        'deployed'
    """
    from segkit.exporting.cases import named_cases
    from segkit.exporting.onnx import export_models

    if cases is not None and data is None:
        raise RequestError("--cases names cases of a data folder", remedy="Add the folder: -i DATA")
    measuring = None if data is None else named_cases(Path(data), read_case_ids(cases))
    return export_models(Path(run), Path(out), precision=precision, cases=measuring, overwrite=overwrite)
