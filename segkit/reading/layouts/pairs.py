"""Which files of a folder belong together by their names: references to images, masks and predictions to scans.

The *identity* of a name is what is left of it without words for images, references and their processing, and without
separators: `volume-0` and `segmentation-0` are (0), `img0001` and `label0001` are (1).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from segkit.errors import DataError
from segkit.reading.case import BRATS_MODALITIES, IGNORED, LABEL, split_name, words_of
from segkit.reading.files import read_labels
from segkit.reading.layouts.layout import bare_name
from segkit.reading.layouts.schemes import MOST_CLASSES, present_values

_IMAGE_WORDS = frozenset(
    {"image", "images", "imaging", "img", "imgs", "im", "volume", "volumes", "vol", "scan", "scans", "input", "data"}
    | {"ct", "mr", "mri", "pet", "us", "x", "photo", "picture", "original", "orig", "raw", "source", "src"}
    | {"brain", "stripped", "reg", "registered", "resampled", "n4", "bias", "preprocessed", "nifti"}
)
"""Words for images and their processing, which the name of a reference lacks."""
_LABEL_WORDS = frozenset(
    {"label", "labels", "lbl", "mask", "masks", "seg", "segs", "segmentation", "segmentations", "gt", "groundtruth"}
    | {"annotation", "annotations", "anno", "annos", "annot", "target", "targets", "reference", "references", "y"}
)
_SUBSET_WORDS = frozenset({"training", "train", "validation", "val", "test", "testing", "tr", "ts"})
_PREDICTION_WORDS = frozenset(
    {"pred", "preds", "predicted", "prediction", "predictions", "output", "result", "results", "segmented"}
    | {"probability", "probabilities", "prob", "probs", "softmax", "uncertainty", "entropy", "overlay"}
)


def identity(name: str) -> tuple[str, ...]:
    """The words that identify the case of a file by its name (without suffix); numbers have no leading zeros."""
    parts = split_name(name)
    if parts.kind in (LABEL, IGNORED):
        name = parts.rest
    while (parts := split_name(name)).kind in BRATS_MODALITIES:  # `a_T1_seg`
        name = parts.rest
    words = words_of(name)
    own = [word for word in words if word not in _IMAGE_WORDS | _LABEL_WORDS | _SUBSET_WORDS]
    if own[-1:] == ["0000"] and any(word.isdigit() for word in own[:-1]):
        del own[-1]  # nnU-Net's number of the first channel
    return tuple(word.lstrip("0") or "0" if word.isdigit() else word for word in own)


def holds_references(folder: str) -> bool:
    """Whether the name of a folder has a word for references, such as `train_masks` or `Training_GroundTruth`."""
    words = words_of(folder)
    return not _LABEL_WORDS.isdisjoint(words) or {"ground", "truth"} <= set(words)


def is_companion(path: Path, scan: Path) -> bool:
    """Whether a file named after a scan, with more words, is a mask or prediction of it, and not another scan."""
    more = set(words_of(bare_name(path))) - set(words_of(bare_name(scan)))
    return bool(more & (_PREDICTION_WORDS | _LABEL_WORDS)) or (is_label_map(path) and not is_label_map(scan))


def is_label_map(path: Path) -> bool:
    """Whether a file holds a few whole numbers only; False for folders of slices, and for what cannot be read."""
    try:
        return not path.is_dir() and len(present_values(read_labels(path)[0])) <= MOST_CLASSES
    except DataError:
        return False


def is_class_name(text: str) -> bool:
    """Whether the end of the name of a mask names what it shows, and not that it is a mask or a prediction."""
    words = words_of(text)
    return any(word.isalpha() for word in words) and not (_PREDICTION_WORDS | _LABEL_WORDS) & set(words)


def matched_by_wildcards(stem: str, name: str, pattern: str) -> str | None:
    """What the wildcards of a pattern match in a file name, without suffix or with it; None where it does not fit."""
    parts = re.split(r"(\*|\?|\[[^\]]+\])", pattern)
    signs = {"*": "(.*)", "?": "(.)"}
    fixed = [signs.get(part, f"({part})") if at % 2 else re.escape(part) for at, part in enumerate(parts)]
    for text in (stem, name):
        if match := re.fullmatch("".join(fixed), text, re.IGNORECASE):
            return "_".join(part.strip("-_. ") for part in match.groups() if part.strip("-_. "))
    return None


class Place(NamedTuple):
    """A file for pairing: its path, the folder of its case, and the part of its name that is shared in the case."""

    path: Path
    folder: Path
    rest: str


class Partner(NamedTuple):
    """The place of the image of a reference, and the class that the reference shows, "" where it shows all of them.

    `is_certain`: both are in the folder of one case.
    """

    image: Place
    shown: str
    is_certain: bool = False


def pair_by_identity(references: Sequence[Place], images: Sequence[Place]) -> dict[Path, Partner]:
    """Reference -> its image, by identity: beside it where a folder is one case, else anywhere below the root.

    The identity of a reference may begin or end with the name of its folder, and may end with a class that it shows.
    """
    by_folder: dict[Path, dict[str, Place]] = defaultdict(dict)
    by_identity: dict[tuple[str, ...], dict[tuple[Path, str], Place]] = defaultdict(dict)
    for image in images:
        by_folder[image.folder][image.rest] = image
        by_identity[identity(image.rest)][image.folder, image.rest] = image
    found: dict[Path, Partner] = {}
    for reference in references:
        own, beside = identity(reference.rest), list(by_folder.get(reference.folder, {}).values())
        if not beside and not own:  # `P1/pre/FLAIR`, `P1/wmh`
            beside = [image for image in images if image.folder.parent == reference.folder]
            beside = list({(image.folder, image.rest): image for image in beside}.values())
        if len(beside) == 1 and (of_case := identity(beside[0].rest)) in ((), own):
            found[reference.path] = Partner(beside[0], "" if own == of_case else reference.rest, is_certain=True)
            continue
        above = identity(reference.path.parent.name)
        for words in (own, (*above, *own), (*own, *above)):
            length = next((length for length in range(len(words), 0, -1) if words[:length] in by_identity), 0)
            nearest = _nearest(list(by_identity[words[:length]].values()) if length else [], reference.path)
            left = words[length:]
            if len(nearest) == 1 and not (left and left[0].isdigit()):
                found[reference.path] = Partner(nearest[0], _class_name(reference, nearest[0], left))
                break
    return _without_doubtful_classes(_named_by_folder(found))


def _nearest(images: Sequence[Place], reference: Path) -> list[Place]:
    """The images whose folders share the most words with that of the reference."""
    own = set(words_of("_".join(reference.parts[:-1])))
    shared = [len(own & set(words_of("_".join(image.path.parts[:-1])))) for image in images]
    return [image for image, count in zip(images, shared, strict=True) if count == max(shared)]


def _class_name(reference: Place, image: Place, left: Sequence[str]) -> str:
    """The words `left` of a reference as they are written in its name, where they are its end."""
    ending = re.sub(r"[-_. ]+", "", reference.rest.lower())
    if not left or not ending.endswith("".join(left)):
        return "_".join(left)
    after = reference.rest[len(image.rest) :] if reference.rest.startswith(image.rest) else ""
    return after.strip("-_. ") or "_".join(left)


def _named_by_folder(found: dict[Path, Partner]) -> dict[Path, Partner]:
    """Several references of one image, each in a folder of its own, show the classes that the folders name.

    Beside references of classes, one whose name is a word for references shows the class of this name (`GTV`).
    """
    of_classes = {partner.image for partner in found.values() if partner.shown and partner.is_certain}
    for path, partner in found.items():
        if partner.image in of_classes and not partner.shown:
            found[path] = partner._replace(shown=bare_name(path))
    rivals: dict[Place, list[Path]] = defaultdict(list)
    for path, partner in found.items():
        if not partner.shown:
            rivals[partner.image].append(path)
    for paths in rivals.values():
        if len(paths) > 1 and len({path.parent.name for path in paths}) == len(paths):
            found |= {path: found[path]._replace(shown=path.parent.name) for path in paths}
    return found


def _without_doubtful_classes(found: dict[Path, Partner]) -> dict[Path, Partner]:
    """Without references whose class occurs once, alone: `anna_followup_seg` does not show a class of `anna`."""
    images = Counter(partner.shown for partner in found.values())
    classes = Counter(partner.image for partner in found.values() if partner.shown)
    return {
        path: partner
        for path, partner in found.items()
        if not partner.shown or partner.is_certain or images[partner.shown] > 1 or classes[partner.image] > 1
    }
