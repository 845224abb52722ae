"""segkit: train, run and score medical image segmentation.

Functions, with the same results as the commands of the same names (docs/python.md):

    check(data)                         layout, labels and problems of a data folder, and the next command
    find_cases(data)                    the cases of a data folder, with their files
    train(data, run, **settings)        train a segmentation network and write a run folder
    pretrain(data, run, **settings)     train an encoder, or an inpainting network, without labels
    infer(model, scans, out)            masks of all scans of a folder
    inpaint(model, scans, out)          scans with holes, or lesions, filled
    evaluate(predictions, references)   scores per case and region
    export_model(run, out)              an ONNX file of a trained network

Models:

    Predictor, Prediction               a trained network that segments one case, in memory; its result
    build_model, list_models            a network by family and size; all of them, each a ModelInfo
    load_model, load_weights            the network of a run folder; weights from elsewhere, with a LoadReport

For MONAI users (docs/monai.md):

    monai                               data lists, reading and preprocessing as MONAI's dictionary transforms

Errors are `segkit.errors.SegkitError`: their text is the sentence that the command line prints. Names are loaded on
first use, so `import segkit` is fast; nothing inside the package imports them. Usage reports of libraries are switched
off before any of them is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

from segkit.runtime import let_threads_sleep, refuse_telemetry

if TYPE_CHECKING:
    from segkit.api.check import check as check
    from segkit.api.evaluate import evaluate as evaluate
    from segkit.api.export import export_model as export_model
    from segkit.api.folder import infer as infer
    from segkit.api.inpaint import inpaint as inpaint
    from segkit.api.pretraining import pretrain as pretrain
    from segkit.api.training import train as train
    from segkit.checkpoint.model import load_model as load_model
    from segkit.checkpoint.transfer import LoadReport as LoadReport
    from segkit.checkpoint.transfer import load_weights as load_weights
    from segkit.inference.predictor import Predictor as Predictor
    from segkit.inference.scans import Prediction as Prediction
    from segkit.models.table import ModelInfo as ModelInfo
    from segkit.models.table import build_model as build_model
    from segkit.models.table import list_models as list_models
    from segkit.reading.layouts.table import find_cases as find_cases

    __version__: str

_PUBLIC = {
    "check": "segkit.api.check",
    "find_cases": "segkit.reading.layouts.table",
    "train": "segkit.api.training",
    "pretrain": "segkit.api.pretraining",
    "infer": "segkit.api.folder",
    "inpaint": "segkit.api.inpaint",
    "evaluate": "segkit.api.evaluate",
    "export_model": "segkit.api.export",
    "build_model": "segkit.models.table",
    "list_models": "segkit.models.table",
    "ModelInfo": "segkit.models.table",
    "load_model": "segkit.checkpoint.model",
    "load_weights": "segkit.checkpoint.transfer",
    "LoadReport": "segkit.checkpoint.transfer",
    "Predictor": "segkit.inference.predictor",
    "Prediction": "segkit.inference.scans",
}
"""Public name -> the module that defines it; never the name of a module or package of segkit."""

__all__ = [
    "LoadReport",
    "ModelInfo",
    "Prediction",
    "Predictor",
    "__version__",
    "build_model",
    "check",
    "evaluate",
    "export_model",
    "find_cases",
    "infer",
    "inpaint",
    "list_models",
    "load_model",
    "load_weights",
    "pretrain",
    "train",
]


let_threads_sleep()
refuse_telemetry()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("segkit")
    if name == "monai":  # a package of functions, which needs torch
        return importlib.import_module("segkit.monai")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'segkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
