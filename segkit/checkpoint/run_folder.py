"""Folders with a trained model: run folders of segkit, results of nnU-Net, MONAI bundles.

Run folders are read without torch.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from segkit.checkpoint.bundle_config import is_bundle
from segkit.checkpoint.card import PARTS, ModelCard, SegmentationCard
from segkit.errors import CheckpointError, RequestError

CARD_NAME = "model.json"
WEIGHTS_NAME = "model.safetensors"
LAST_NAME = "last.ckpt"
PREVIOUS_NAME = "previous.ckpt"
DAMAGED_NAME = "damaged.ckpt"

RUN_FOLDER = "a run folder of `segkit train`"


def load_card(run_dir: Path) -> ModelCard:
    """The model card of a run folder; of a result folder of nnU-Net or a MONAI bundle, made from its plans.

    Raises:
        CheckpointError: there is no card, or this version cannot read it.
    """
    path = run_dir / CARD_NAME
    if path.is_file():
        return _read_card(path)
    if is_bundle(run_dir):
        from segkit.checkpoint import monai_bundle

        return monai_bundle.make_card(run_dir)
    from segkit.checkpoint import nnunet

    if nnunet.fold_folders(run_dir):
        from segkit.checkpoint.nnunet_card import make_card

        return make_card(nnunet.open_results(only_folder(run_dir)))
    has_state = (run_dir / LAST_NAME).exists()
    remedy = "Resume the training with --resume, up to its first validation" if has_state else "Check the path"
    raise CheckpointError(f"holds no {CARD_NAME}", where=run_dir, expected=RUN_FOLDER, remedy=remedy)


def require_segmentation(card: ModelCard, where: Path | None = None) -> SegmentationCard:
    """The segmentation part of a card.

    Raises:
        RequestError: the model is of another task, or its card lacks that part.
    """
    if card.task != "segmentation":
        raise RequestError(
            f"this is a {card.task} model, which makes no masks",
            where=where,
            expected="a segmentation model of `segkit train`",
            remedy="Give its encoder to `segkit train --weights`",
        )
    if card.segmentation is None:
        raise RequestError(f"{CARD_NAME} lacks `activation` or `label_scheme`", where=where, remedy="Train again")
    return card.segmentation


_SHARED_BY_MEMBERS = (
    *("task", "dims", "modalities", "spacing_mm", "orientation", "normalisation", "crop"),
    *("ct_window", "ct_mean", "ct_std", "activation", "outputs", "label_scheme", "nnunet"),
)


def check_agreement(cards: Sequence[ModelCard], names: Sequence[object]) -> None:
    """Refuse an ensemble of models that see or paint different things.

    Raises:
        RequestError: two cards differ in what an ensemble must share, all differences named.
    """
    for card, name in zip(cards[1:], names[1:], strict=True):
        found, expected = card.to_json(), cards[0].to_json()
        different = [key for key in _SHARED_BY_MEMBERS if found.get(key) != expected.get(key)]
        if different:
            raise RequestError(
                f"differs from {names[0]} in {', '.join(different)}",
                where=str(name),
                expected="models of one ensemble that prepare and paint alike, such as the folds of one training",
                remedy="Run the models one by one, each with its own output folder",
            )


def model_folders(path: Path) -> list[Path]:
    """The folders with one model each: `path` itself, or its `fold_*` sub-folders after cross-validation.

    A checkpoint of nnU-Net stands for its fold.

    Raises:
        CheckpointError: neither holds a model.
    """
    if path.suffix == ".pth" and path.is_file():  # of nnU-Net
        return [path]
    if not path.is_dir():
        raise CheckpointError("is not a folder", where=path, expected=RUN_FOLDER)
    if (path / CARD_NAME).is_file() or is_bundle(path):
        return [path]
    folds = sorted(fold for fold in path.glob("fold_*") if (fold / CARD_NAME).is_file())
    if not folds:
        from segkit.checkpoint import nnunet

        folds = nnunet.fold_folders(path)
    if not folds:
        load_card(path)  # raises the error
    return folds


def only_folder(path: Path) -> Path:
    """The one folder of `model_folders`.

    Raises:
        CheckpointError: there is none, or several.
    """
    folders = model_folders(path)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise CheckpointError(f"holds {len(folders)} models ({names})", where=path, remedy="Name one of its folders")
    return folders[0]


def _read_card(path: Path) -> ModelCard:
    try:
        card = ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        details = []
        for problem in error.errors():
            keys = problem["loc"]
            if keys and keys[0] in PARTS:  # a key of the top level in the file
                keys = keys[1:]
            details.append(f"{'.'.join(map(str, keys)) or 'document'}: {problem['msg']}")
        found = f"is not a model card this version can read ({'; '.join(details)})"
        remedy = "Use the version of segkit that wrote it, or train again"
        raise CheckpointError(found, where=path, remedy=remedy) from error
    if not card.patch_size or not card.divisor:
        raise CheckpointError("lacks the size of patches", where=path, expected="patch_size and divisor")
    return card
