"""Exports as MONAI bundles: folders that `python -m monai.bundle run` computes without segkit.

The network is traced; the pipeline is written in MONAI's transforms (`segkit.exporting.bundle_config`) and compared
with segkit's on files before the bundle gets its name.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from segkit.checkpoint.card import ModelCard
from segkit.checkpoint.model import load_model
from segkit.checkpoint.run_folder import load_card, model_folders, require_segmentation
from segkit.errors import CheckpointError, RequestError, as_request
from segkit.exporting.bundle_config import (
    IMAGE,
    PREDICTION,
    bundle_metadata,
    inference_config,
    licence_text,
    readme_text,
)
from segkit.exporting.cases import MeasuringCases
from segkit.exporting.output import BUNDLE_CONFIG, BUNDLE_NETWORK, new_folder
from segkit.inference.backends import TorchBackend
from segkit.inference.graph import evaluating, quiet
from segkit.inference.predictor import Predictor
from segkit.reading.case import Case, ImageFile, match_modalities
from segkit.reading.files import read_labels, write_image
from segkit.reading.geometry import reorientation_to, same_grid
from segkit.reading.volume import Grid
from segkit.shapes import LabelMap

SMALLEST_DICE = 0.999
"""Smallest allowed Dice of each label between the masks of the bundle and of segkit."""
LARGEST_DIFFERENCE = 1e-3
"""Largest allowed root mean square difference of the logits, relative to their standard deviation."""

_RESAMPLED = 1.25
"""Spacing of the second phantom, relative to that of the network."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BundleParity:
    """Comparison of the masks of a bundle and of segkit for one case; `dice` is the lowest of all labels present."""

    case: str
    voxels: int
    different_voxels: int
    dice: float
    logit_difference: float


def export_bundle(
    model: Path, output: Path, *, precision: str = "fp32", cases: MeasuringCases | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the MONAI bundle of a run folder, compared with segkit on phantoms and on `cases`.

    Returns the document of `--json`: `{"output", "models": [{"folder", "parity"}]}`, parity being the fields of
    `BundleParity` for each case.

    Raises:
        RequestError: the model, or a case, is not what a bundle can compute, or `output` is in use.
        CheckpointError: the network cannot be traced, or the bundle gives other masks; `output` is not changed.
        DataError: a case cannot be read, or the folder cannot be written to.
    """
    run = _only_network(model, precision)
    card, network = load_card(run), load_model(run)
    documents = {BUNDLE_CONFIG: inference_config(card), Path("configs", "metadata.json"): bundle_metadata(card)}
    texts = {name: json.dumps(document, indent=4) + "\n" for name, document in documents.items()}
    texts |= {Path("LICENSE"): licence_text(card), Path("docs", "README.md"): readme_text(card)}
    predictor = Predictor(TorchBackend(network), card)
    with new_folder(output, model, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        for path in (*texts, BUNDLE_NETWORK):
            (folder / path).parent.mkdir(exist_ok=True)
        for path, text in texts.items():
            (folder / path).write_text(text, encoding="utf-8")
        traced = trace(network, len(card.modalities), card.patch_size)
        _save(traced, folder / BUNDLE_NETWORK, Path(scratch, BUNDLE_NETWORK.name))
        compared = [*_phantoms(card, Path(scratch)), *([] if cases is None else cases.cohort.cases)]
        parity = [_compare(predictor, match_modalities(case, card.modalities), folder) for case in compared]
    return {"output": str(output), "models": [{"folder": str(output), "parity": [asdict(case) for case in parity]}]}


def _only_network(model: Path, precision: str) -> Path:
    """The folder of the one network of `model`.

    Raises:
        RequestError: it is not one network that segments volumes, or `precision` is not fp32.
    """
    try:
        folders = model_folders(model)
        card = load_card(folders[0])
    except CheckpointError as error:
        raise as_request(error) from error
    if len(folders) > 1:
        raise RequestError(
            f"holds {len(folders)} networks, whose probabilities segkit averages",
            where=model,
            expected="one network for a bundle",
            remedy=f"Export one of them: -m {folders[0]}",
        )
    if card.export is not None or card.bundle is not None:
        raise RequestError("is an export already", where=model, expected="a run folder of `segkit train`")
    require_segmentation(card, folders[0])
    if card.nnunet is not None:
        found, remedy = (
            "a bundle cannot prepare and blend as nnU-Net does",
            "Export it without --format, as an ONNX file",
        )
        raise RequestError(found, where=model, remedy=remedy)
    if card.dims == 2:
        remedy = "Export it without --format, as an ONNX file"
        raise RequestError("segments pictures", where=model, expected="volumes for a bundle", remedy=remedy)
    if precision != "fp32":
        raise RequestError(f"a bundle has no precision {precision}", expected="fp32", remedy="Leave out --precision")
    return folders[0]


def trace(network: nn.Module, channels: int, window: Sequence[int]) -> Any:
    """The network in evaluation mode as TorchScript, for (1, channels, *window); of a list of logits, the first.

    Raises:
        CheckpointError: the network cannot be traced.
    """
    # Not of zeros: a network may treat them differently.
    image = torch.randn(1, channels, *window, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), evaluating(network), quiet():
            return torch.jit.trace(network, (image,), check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the network cannot be traced ({reason})", expected="one of the networks of `segkit models`"
        ) from error


def _save(traced: Any, path: Path, scratch: Path) -> None:
    """Write TorchScript without the names of source files, which contain local paths; `scratch` is a free name."""
    with quiet():
        traced.save(str(scratch))
    with ZipFile(scratch) as whole, ZipFile(path, "w") as written:
        for part in whole.infolist():
            if not part.filename.endswith(".debug_pkl"):
                written.writestr(part, whole.read(part))
    scratch.unlink()


def _phantoms(card: ModelCard, folder: Path) -> Iterator[Case]:
    """Files of a scan that the network could have seen, at its spacing and, if it resamples, at another one."""
    yield _phantom(card, folder / "phantom", 1.0)
    if card.preprocessing.spacing_mm is not None:
        yield _phantom(card, folder / "resampled phantom", _RESAMPLED)


def _phantom(card: ModelCard, folder: Path, relative_spacing: float) -> Case:
    """An ellipsoid with smooth random tissue and 0 around it; larger than a window along the first axis, else smaller.

    The file is in LPS, as those of BraTS.
    """
    rng = np.random.default_rng(0)
    turn = reorientation_to(Grid((1, 1, 1), np.diag([-1.0, -1.0, 1.0, 1.0])), card.preprocessing.orientation)
    in_file = np.argsort(turn.axes)
    spacing = np.asarray(card.preprocessing.spacing_mm or (1.0, 1.0, 1.0))[in_file] * relative_spacing
    sides = np.asarray(card.patch_size) * (1.4, 1.0, 0.9) / relative_spacing
    shape = tuple(max(int(side), 4) for side in sides[in_file])
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    places = np.meshgrid(*(np.linspace(-1.1, 1.1, length) for length in shape), indexing="ij", sparse=True)
    inside = np.asarray(sum(place**2 for place in places) <= 1)
    images: dict[str, ImageFile] = {}
    for modality in card.modalities:
        waves = sum(np.sin(rng.uniform(1, 8) * place + rng.uniform(0, 6)) for _ in range(4) for place in places)
        tissue = 500 + 100 * np.asarray(waves) + 30 * rng.standard_normal(shape)
        path = folder / f"{len(images)}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, (inside * tissue).astype(np.float32), Grid(shape, affine))
        images[modality] = ImageFile(path)
    return Case(folder.name, folder.name, images)


def _compare(predictor: Predictor, case: Case, bundle: Path) -> BundleParity:
    """Compare logits and masks of the bundle and of segkit on the files of a case; raises CheckpointError."""
    files = [case.images[name] for name in predictor.card.modalities]
    if any(file.channel is not None or not file.path.name.endswith((".nii", ".nii.gz")) for file in files):
        expected = "one NIfTI file for each modality, as a bundle reads them"
        raise RequestError("cannot be compared", where=case.id, expected=expected)
    prepared = predictor.read_case(case)
    labels = predictor.predict_prepared(prepared).labels
    slabs = list(predictor.slabs(prepared))
    logits = np.concatenate([slab.logits for slab in slabs], slabs[0].axis + 1)
    with tempfile.TemporaryDirectory() as output:
        own_logits = _run(bundle, [file.path for file in files], Path(output))
        (mask,) = Path(output).iterdir()
        own_labels, grid = read_labels(mask, None)
    source = prepared.preparation.source_grid
    if (difference := same_grid(replace(grid, source=None), replace(source, source=None))) is not None:
        raise _refused(case.id, f"the mask lies on another grid: {difference}", "that of the scan")
    if own_logits.shape != logits.shape:
        raise _refused(case.id, f"the logits are of shape {own_logits.shape}", f"{logits.shape}, as segkit's")
    odd = float(np.sqrt(np.square(own_logits - logits, dtype=np.float64).mean()) / max(float(logits.std()), 1e-6))
    dice = _lowest_dice(own_labels, labels)
    if not (odd <= LARGEST_DIFFERENCE and dice >= SMALLEST_DICE):
        found = f"the logits differ by {odd:.1e} of their deviation, the masks agree to Dice {dice:.5f}"
        raise _refused(case.id, found, f"at most {LARGEST_DIFFERENCE} and at least {SMALLEST_DICE}")
    different = int(np.count_nonzero(own_labels != labels))
    _log.info("%s: %d of %d voxels differ from `segkit infer`", case.id, different, labels.size)
    return BundleParity(case.id, labels.size, different, dice, float(f"{odd:.2e}"))


def _run(bundle: Path, files: Sequence[Path], output: Path) -> NDArray[np.float32]:
    """The logits (K, *prepared) that MONAI computes from the bundle for one case, whose mask it writes to `output`.

    The same parts as in `python -m monai.bundle run`, without the engine, which needs ignite.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    with torch.no_grad(), quiet():
        parser.read_config(str(bundle / BUNDLE_CONFIG))
        parser.read_meta(str(bundle / "configs" / "metadata.json"))
        places = {"bundle_root": str(bundle), "output_dir": str(output), "device": "$torch.device('cpu')"}
        parser.update(places)
        parts = ("preprocessing", "inferer", "network_def", "postprocessing")
        prepare, infer, network, finish = (parser.get_parsed_content(name) for name in parts)
        item = prepare({IMAGE: [str(path) for path in files] if len(files) > 1 else str(files[0])})
        logits = infer(item[IMAGE][None], network)[0]
        finish({**item, PREDICTION: logits.clone()})
    computed: NDArray[np.float32] = np.asarray(logits)
    return computed


def _lowest_dice(one: LabelMap, other: LabelMap) -> float:
    """The lowest Dice of all labels but 0 that are in one of the maps; 1 if there are none."""
    scores = [
        2 * np.count_nonzero((one == label) & (other == label)) / (np.sum(one == label) + np.sum(other == label))
        for label in np.union1d(one, other)
        if label
    ]
    return float(min(scores, default=1.0))


def _refused(case: str, found: str, expected: str) -> CheckpointError:
    remedy = "Nothing was written. Use the run folder, and report the model card and the versions at hand"
    return CheckpointError(f"in MONAI {found}", where=case, expected=expected, remedy=remedy)
