"""Which prediction belongs to which reference, and in which label scheme each is written."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from segkit.data.case import Case, Cohort, ImageFile
from segkit.data.files import stem_of, suffix_of
from segkit.data.layouts.conventions import CONVENTIONS
from segkit.data.layouts.listing import list_images, read_document
from segkit.data.layouts.modality import LABEL, split_name
from segkit.data.layouts.schemes import values_of
from segkit.data.layouts.table import PLAIN_CLASSES, find_cases
from segkit.data.pictures import PICTURE_SUFFIXES
from segkit.errors import DataError, RequestError
from segkit.labels import SCHEMES, LabelScheme, classes_scheme

CHALLENGES: dict[str, tuple[str, ...]] = {
    "gli": ("brats2015", "brats2017", "brats2023", "brats2024", "msd-brats"),
    "met": ("brats2023", "brats2024"),
    "ped": ("brats-ped", "brats2023"),
    "men": ("brats2023",),
    "men-rt": ("brats-men-rt",),
    "goat": ("brats2023",),
    "ssa": ("brats2023",),
}
"""Every BraTS challenge with the label schemes it has used."""

_GLIOMA_IDS = re.compile(r"(BraTS(17|18|19|20|2021)|FeTS|UPENN-GBM|BRATS_\d|brats_(2012|2013|tcia))", re.IGNORECASE)
_CHALLENGE_IDS = re.compile(r"BraTS-(MEN-RT|GLI|MET|PED|MEN|GoAT|SSA)-", re.IGNORECASE)
_DECATHLON_IDS = re.compile(r"BRATS_\d{3}")
_POST_TREATMENT_IDS = re.compile(r"BraTS-GLI-\d+-[1-9]\d\d", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A reference case and its prediction, None where there is none; `scheme` is that of the prediction."""

    reference: Case
    prediction: Path | None
    scheme: LabelScheme


@dataclass(frozen=True)
class Pairing:
    """The pairs of two folders in the order of their case ids, and what stayed alone.

    `scheme` is that of the references. `surplus` are predictions that belong to no reference. `ambiguous` maps a case
    id to a sentence where several files could be its prediction.
    """

    pairs: tuple[Pair, ...]
    scheme: LabelScheme
    challenge: str | None
    surplus: tuple[Path, ...] = ()
    ambiguous: Mapping[str, str] = field(default_factory=dict)


def pair_folders(
    predictions: Path,
    references: Path,
    *,
    challenge: str | None = None,
    case_ids: Collection[str] | None = None,
    label_scheme: str | None = None,
    prediction_scheme: str | None = None,
) -> Pairing:
    """Pair the masks of two folders (or two files) by case id.

    Args:
        predictions: Folder of `<case>.nii.gz` (`<case>-seg.nii.gz`, `anything_<case>.nii.gz`), or one file. A
            `manifest.json` of `segkit infer` beside them tells the label scheme of each case.
        references: A dataset in any layout, a folder of masks, or one file.
        challenge: A name of `CHALLENGES`; None takes it from the case ids where they tell.
        case_ids: Only these cases; None takes all references.
        label_scheme: Scheme of the references, where names do not tell: a name of `SCHEMES`, or "classes".
        prediction_scheme: Scheme of the predictions, where it differs and no manifest tells.

    Raises:
        RequestError: nothing could be paired, an id or name is unknown, or the label scheme cannot be told.
    """
    if challenge is not None and challenge not in CHALLENGES:
        raise RequestError(f"unknown challenge {challenge!r}", expected="one of " + ", ".join(CHALLENGES))
    cases, scheme = _references(references, label_scheme, challenge)
    cases = _chosen(cases, case_ids, references)
    _require_fitting(challenge, scheme)
    paths = _masks_like(cases[0], predictions)
    ambiguous: dict[str, str] = {}
    if predictions.is_file() and references.is_file():
        found = {cases[0].id: predictions}
    else:
        found, ambiguous = _match(cases, paths, predictions)
    if not found:
        raise _nothing_paired(cases, paths, predictions, references)
    declared = _declared_schemes(predictions)
    default = scheme if prediction_scheme is None else _named_scheme(prediction_scheme, cases)
    pairs = tuple(
        Pair(case, found.get(case.id), declared.get(case.id, default)) for case in sorted(cases, key=lambda c: c.id)
    )
    surplus = [path for path in paths if not any(case.id in path.name for case in cases)]
    return Pairing(
        pairs,
        scheme,
        challenge or challenge_of(case.id for case in cases),
        () if case_ids else tuple(surplus),
        ambiguous,
    )


def challenge_of(case_ids: Iterable[str]) -> str | None:
    """The BraTS challenge that all these ids belong to, or None."""
    challenges = set()
    for case_id in case_ids:
        match = _CHALLENGE_IDS.match(case_id)
        challenges.add(match.group(1).lower() if match else "gli" if _GLIOMA_IDS.match(case_id) else None)
    return challenges.pop() if len(challenges) == 1 else None


def _references(root: Path, label_scheme: str | None, challenge: str | None) -> tuple[list[Case], LabelScheme]:
    """The cases with a reference below `root`, and the scheme they share."""
    cohort = _labelled_cohort(root, label_scheme)
    if cohort is None and (root.parent / "dataset.json").is_file():  # `labelsTr`, say: the dataset knows its names
        cohort = _labelled_cohort(root.parent, label_scheme)
        if cohort is not None:
            cases = [case for case in cohort.cases if case.label and root in case.label.path.absolute().parents]
            cohort = replace(cohort, cases=tuple(cases)) if cases else None
    if cohort is None:
        cases = _bare_masks(root)
        return cases, _scheme_of_bare_masks(cases, root, label_scheme, challenge)
    scheme = cohort.scheme
    if scheme is None and challenge is not None and len(CHALLENGES[challenge]) == 1:
        scheme = SCHEMES[CHALLENGES[challenge][0]]
    if scheme is None:
        reasons = "; ".join(str(problem) for problem in cohort.problems if problem.is_fatal)
        raise RequestError(
            "the label scheme of the references cannot be told" + (f" ({reasons})" if reasons else ""),
            where=root,
            remedy=f"Name it with --label-scheme: {', '.join(SCHEMES)} or {PLAIN_CLASSES}",
        )
    return list(cohort.cases), scheme


def _labelled_cohort(root: Path, label_scheme: str | None) -> Cohort | None:
    """The cohort of a dataset with references, None where `root` is no such thing."""
    if root.is_file():
        return None
    try:
        return find_cases(root.absolute(), label_scheme=label_scheme, require_labels=True)
    except DataError:
        return None


def _bare_masks(root: Path) -> list[Case]:
    """The masks below `root` as cases without images: those named as a segmentation where any is, else all."""
    paths = list_images(root).images
    named = [path for path in paths if _mask_id(path) != stem_of(path)]
    by_id: dict[str, list[Path]] = defaultdict(list)
    for path in named or paths:
        by_id[_mask_id(path)].append(path)
    if not by_id:
        raise RequestError("holds no masks", where=root, expected="<case>.nii.gz, <case>-seg.nii.gz or a dataset")
    for case_id, found in by_id.items():
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(root)) for path in found)
            raise RequestError(f"several references for case {case_id}: {names}", where=root, remedy="Keep one of them")
    return [Case(case_id, case_id, {}, ImageFile(path)) for case_id, (path,) in by_id.items()]


def _scheme_of_bare_masks(
    cases: Sequence[Case], root: Path, label_scheme: str | None, challenge: str | None
) -> LabelScheme:
    if label_scheme is not None:
        return _named_scheme(label_scheme, cases)
    declared = {scheme.name: scheme for scheme in _declared_schemes(root).values()}
    if len(declared) == 1:
        return next(iter(declared.values()))
    if challenge is not None and len(CHALLENGES[challenge]) == 1:
        return SCHEMES[CHALLENGES[challenge][0]]
    return _scheme_of_ids(cases) or _classes_by_value(cases)


def _scheme_of_ids(cases: Sequence[Case]) -> LabelScheme | None:
    """The BraTS scheme that the names of the cases tell; the years that share names are told apart by value 4."""
    ids = [case.id for case in cases]
    if all(_DECATHLON_IDS.fullmatch(case_id) for case_id in ids):
        return SCHEMES["msd-brats"]
    if any(_POST_TREATMENT_IDS.fullmatch(case_id) for case_id in ids):
        return SCHEMES["brats2024"]
    names = {
        convention.scheme
        for convention in CONVENTIONS
        if all(re.fullmatch(convention.case_pattern, case_id, re.IGNORECASE) for case_id in ids)
    }
    if len(names) > 1:
        later = "brats-ped" if "brats-ped" in names else "brats2024"
        names = {later if 4 in values_of(cases, stop_at=4) else "brats2023"}
    return SCHEMES[names.pop()] if names else None


def _named_scheme(name: str, cases: Sequence[Case]) -> LabelScheme:
    if name == PLAIN_CLASSES:
        return _classes_by_value(cases)
    if name not in SCHEMES:
        raise RequestError(f"unknown label scheme {name!r}", expected=f"one of {', '.join(SCHEMES)}, {PLAIN_CLASSES}")
    return SCHEMES[name]


def _classes_by_value(cases: Sequence[Case]) -> LabelScheme:
    return classes_scheme(PLAIN_CLASSES, {f"label_{value}": value for value in sorted(values_of(cases) - {0})})


def _declared_schemes(folder: Path) -> dict[str, LabelScheme]:
    """Case id -> label scheme, as the `manifest.json` of `segkit infer` tells it; own classes are not known by name."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    document = read_document(path)
    entries = [entry for key in ("earlier", "cases") for entry in document.get(key, []) if isinstance(entry, dict)]
    return {
        str(entry["case"]): SCHEMES[entry["label_scheme"]]
        for entry in entries
        if "case" in entry and entry.get("label_scheme") in SCHEMES
    }


def _chosen(cases: list[Case], case_ids: Collection[str] | None, root: Path) -> list[Case]:
    if case_ids is None:
        return cases
    unknown = sorted(set(case_ids) - {case.id for case in cases})
    if unknown:
        raise RequestError(
            f"{len(unknown)} of {len(set(case_ids))} wanted cases have no reference: {_some(unknown)}",
            where=root,
            expected=f"ids such as {_some(sorted(case.id for case in cases))}",
        )
    return [case for case in cases if case.id in set(case_ids)]


def _require_fitting(challenge: str | None, scheme: LabelScheme) -> None:
    if challenge is not None and scheme.name not in CHALLENGES[challenge]:
        raise RequestError(
            f"challenge {challenge!r} has no label scheme {scheme.name!r}, in which the references are written",
            expected=f"one of {', '.join(CHALLENGES[challenge])}",
            remedy="Leave --challenge out, or correct --label-scheme",
        )


def _masks_like(case: Case, root: Path) -> tuple[Path, ...]:
    """The images below `root` that can be predictions: pictures where references are pictures, else volumes."""
    listing = list_images(root)
    is_picture = case.label is not None and suffix_of(case.label.path) in PICTURE_SUFFIXES
    return listing.pictures if is_picture else listing.volumes


def _match(cases: Sequence[Case], paths: Sequence[Path], root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Case id -> prediction, and case id -> complaint where several files in one folder could be it."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        for name in {stem_of(path), _mask_id(path)}:
            by_name[name].append(path)
    found: dict[str, Path] = {}
    ambiguous: dict[str, str] = {}
    for case in cases:
        candidates = by_name.get(case.id) or [
            path for path in paths if re.search(rf"[-_. ]{re.escape(case.id)}$", stem_of(path))
        ]
        depth = min((len(path.parts) for path in candidates), default=0)
        nearest = [path for path in candidates if len(path.parts) == depth]
        if len(nearest) == 1:
            found[case.id] = nearest[0]
        elif nearest:
            names = _some([str(path) for path in nearest])
            ambiguous[case.id] = f"{root}: {len(nearest)} files could be the prediction: {names}. Keep one of them"
    return found, ambiguous


def _mask_id(path: Path) -> str:
    """The case id of a mask file: its name without `-seg`, `_seg`, `_label` and the like at the end."""
    stem = stem_of(path)
    parts = split_name(stem)
    is_suffix = parts.kind == LABEL and parts.rest and stem.startswith(parts.rest)
    return parts.rest if is_suffix else stem


def _nothing_paired(cases: Sequence[Case], paths: Sequence[Path], predictions: Path, references: Path) -> RequestError:
    names = _some([path.name for path in paths]) if paths else "no images at all"
    return RequestError(
        f"no prediction belongs to any of the {len(cases)} references in {references}: found {names}",
        where=predictions,
        expected=f"names such as {cases[0].id}.nii.gz",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
