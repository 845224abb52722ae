"""The pairs of predictions and references, and the label scheme of each."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segkit.errors import DataError, RequestError, some
from segkit.labels import SCHEMES, LabelScheme, classes_scheme
from segkit.reading.case import LABEL, Case, Cohort, ImageFile, split_name
from segkit.reading.files import read_json, stem_of, suffix_of
from segkit.reading.layouts.layout import list_images
from segkit.reading.layouts.schemes import CONVENTIONS, MOST_CLASSES, one_foreground, patient_of, values_in, values_of
from segkit.reading.layouts.table import PLAIN_CLASSES, find_cases, scheme_named
from segkit.reading.pictures import PICTURE_SUFFIXES

CHALLENGES: dict[str, tuple[str, ...]] = {
    "gli": ("brats2015", "brats2017", "brats2023", "brats2024", "msd-brats"),
    "met": ("brats2023", "brats2024"),
    "ped": ("brats-ped", "brats2023"),
    "men-rt": ("brats-men-rt",),
    **dict.fromkeys(("men", "goat", "ssa"), ("brats2023",)),
}
"""Every BraTS challenge with the label schemes it has used."""

_GLIOMA_IDS = re.compile(r"(BraTS(17|18|19|20|2021)|FeTS|UPENN-GBM|BRATS_\d|brats_(2012|2013|tcia))", re.IGNORECASE)
_CHALLENGE_IDS = re.compile(r"BraTS-(MEN-RT|GLI|MET|PED|MEN|GoAT|SSA)-", re.IGNORECASE)
_DECATHLON_IDS = re.compile(r"BRATS_\d{3}")
_POST_TREATMENT_IDS = re.compile(r"BraTS-GLI-\d+-[1-9]\d\d", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A reference case and its prediction, None if there is none; `scheme` is that of the prediction."""

    reference: Case
    prediction: Path | None
    scheme: LabelScheme


@dataclass(frozen=True)
class Pairing:
    """The pairs of two folders in the order of their case ids.

    `scheme` is that of the references. `surplus` are predictions without a reference. `ambiguous` maps a case id to a
    sentence where several files could be its prediction, or where one could be that of several cases. `notes` are
    sentences that a reader of the scores must know. `left_out` are files of the references that belong to no case.
    `sources` are the paths of "predictions" and "references".
    """

    pairs: tuple[Pair, ...]
    scheme: LabelScheme
    challenge: str | None
    surplus: tuple[Path, ...] = ()
    ambiguous: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    sources: Mapping[str, Path] = field(default_factory=dict)


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

    If the references name no classes, every value that occurs in them or in the predictions is a class.

    Args:
        predictions: Folder of `<case>.nii.gz` (`<case>-seg.nii.gz`, `anything_<case>.nii.gz`), or one file. A
            `manifest.json` of `segkit infer` beside them gives the label scheme of each case.
        references: A dataset in any layout, a folder of masks, or one file.
        challenge: A name of `CHALLENGES`; None infers it from the case ids.
        case_ids: Only these cases; None takes all references.
        label_scheme: Scheme of the references, a name of `SCHEMES` or "classes"; None infers it.
        prediction_scheme: Scheme of the predictions, where it differs and no manifest gives it.

    Raises:
        RequestError: nothing could be paired, an id or name is unknown, or the label scheme cannot be inferred.
    """
    if challenge is not None and challenge not in CHALLENGES:
        raise RequestError(f"unknown challenge {challenge!r}", expected="one of " + ", ".join(CHALLENGES))
    cases, scheme, notes, left_out = _references(references, label_scheme, challenge)
    cases = _chosen(cases, case_ids, references)
    _require_fitting(challenge, PLAIN_CLASSES if scheme is None else scheme.name)
    found, ambiguous, surplus = _find_predictions(cases, predictions, references)
    declared = _schemes_in(predictions)
    predicted = scheme if prediction_scheme is None else _known_scheme(prediction_scheme)
    classes = LabelScheme(PLAIN_CLASSES, {})
    if scheme is None or predicted is None:
        nameless = [path for case_id, path in found.items() if predicted is None and case_id not in declared]
        ignore = None if label_scheme is None else scheme_named(label_scheme).ignore
        classes, more = _classes_by_value(cases, nameless, ignore, references if label_scheme is None else None)
        notes += more
    default = predicted or classes
    cases = sorted(cases, key=lambda case: case.id)
    pairs = tuple(Pair(case, found.get(case.id), declared.get(case.id, default)) for case in cases)
    challenge = challenge or challenge_of(case.id for case in cases)
    sources = {"predictions": predictions, "references": references}
    surplus, left_out = ((), ()) if case_ids else (surplus, left_out)
    if left_out:
        notes.append(f"{len(left_out)} files of the references belong to no usable case: {some(left_out)}")
    return Pairing(pairs, scheme or classes, challenge, surplus, ambiguous, tuple(notes), left_out, sources)


def challenge_of(case_ids: Iterable[str]) -> str | None:
    """The BraTS challenge that all these ids belong to, or None."""
    challenges = set()
    for case_id in case_ids:
        match = _CHALLENGE_IDS.match(case_id)
        challenges.add(match.group(1).lower() if match else "gli" if _GLIOMA_IDS.match(case_id) else None)
    return challenges.pop() if len(challenges) == 1 else None


def _references(
    root: Path, label_scheme: str | None, challenge: str | None
) -> tuple[list[Case], LabelScheme | None, list[str], tuple[str, ...]]:
    """The cases with a reference below `root`, the scheme they share (None: classes without names), notes, left out."""
    cohort = _labelled_cohort(root, label_scheme)
    if cohort is None and (root.parent / "dataset.json").is_file():  # `labelsTr`, for example: the dataset has names
        cohort = _labelled_cohort(root.parent, label_scheme)
        if cohort is not None:
            cases = [case for case in cohort.cases if case.label and root in case.label.path.absolute().parents]
            cohort = replace(cohort, cases=tuple(cases)) if cases else None
    if cohort is None:
        cases, notes = _bare_masks(root)
        if label_scheme is not None:
            return cases, _known_scheme(label_scheme), notes, ()
        declared = {scheme.name: scheme for scheme in _schemes_in(root).values()}
        inferred = declared.popitem()[1] if len(declared) == 1 else _only_scheme(challenge) or _scheme_of_ids(cases)
        return cases, inferred, notes, ()
    cases, scheme = list(cohort.cases), cohort.scheme
    is_nameless = scheme is not None and scheme == classes_scheme(PLAIN_CLASSES, _class_names(scheme.values.values()))
    if is_nameless or (label_scheme is not None and _known_scheme(label_scheme) is None):
        return cases, None, [], cohort.left_out
    scheme = scheme or _only_scheme(challenge)
    if scheme is None and _values_in(case.label for case in cases if case.label) - {0}:
        reasons = "; ".join(str(problem) for problem in cohort.problems if problem.is_fatal)
        raise RequestError(
            "cannot infer the label scheme of the references" + (f" ({reasons})" if reasons else ""),
            where=root,
            remedy=f"Name it with --label-scheme: {', '.join(SCHEMES)} or {PLAIN_CLASSES}",
        )
    return cases, scheme, [], cohort.left_out


def _labelled_cohort(root: Path, label_scheme: str | None) -> Cohort | None:
    """The cohort of a dataset with references, None if `root` is something else."""
    if root.is_file():
        return None
    try:
        return find_cases(root.absolute(), label_scheme=label_scheme, require_labels=True)
    except DataError:
        return None


def _bare_masks(root: Path) -> tuple[list[Case], list[str]]:
    """The masks below `root` as cases without images: those named as a segmentation, or all if there are none.

    A note names the others, which may be images or masks.
    """
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
    others = [path.name for path in paths if path not in set(named)] if named else []
    note = (
        f"{len(others)} files beside the references are not named as masks, as the others are, and are not taken for "
        f"references: {some(others)}"
    )
    cases = [Case(case_id, patient_of(case_id), {}, ImageFile(path)) for case_id, (path,) in by_id.items()]
    return cases, [note] if others else []


def _only_scheme(challenge: str | None) -> LabelScheme | None:
    """The scheme of a challenge that has used a single one."""
    names = CHALLENGES.get(challenge or "", ())
    return SCHEMES[names[0]] if len(names) == 1 else None


def _scheme_of_ids(cases: Sequence[Case]) -> LabelScheme | None:
    """The BraTS scheme of the case ids; years that share ids are distinguished by whether value 4 occurs."""
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


def _known_scheme(name: str) -> LabelScheme | None:
    """A scheme of the table, None for plain classes."""
    scheme = scheme_named(name)
    return None if scheme.name == PLAIN_CLASSES else scheme


def _class_names(values: Iterable[int]) -> dict[str, int]:
    return {f"label_{value}": value for value in sorted(values)}


def _classes_by_value(
    cases: Sequence[Case], predictions: Sequence[Path], ignore: int | None, root: Path | None
) -> tuple[LabelScheme, list[str]]:
    """A class of every value in references and predictions, value 1 if all are empty; a note on new values.

    RequestError where the references below `root` have one foreground of several values; None does not check it.
    """
    known = _values_in(case.label for case in cases if case.label) - {0, ignore}
    if root is not None and (problem := one_foreground(cases, known, root)):
        raise RequestError(problem.found, where=root, remedy=problem.remedy)
    new = _values_in(ImageFile(path) for path in predictions) - known - {0, ignore}
    scheme = classes_scheme(PLAIN_CLASSES, _class_names(known | new or {1}), ignore)
    listed = ", ".join(map(str, sorted(new)))
    note = f"label values {listed} occur in predictions only, and are scored against empty references"
    return scheme, [note] if new else []


def _values_in(masks: Iterable[ImageFile]) -> set[int]:
    """The values of all masks, without images; unusable files are reported later, by the scoring."""
    return values_in(masks, most=MOST_CLASSES)


def manifest_records(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Case id -> its entry in a manifest.json of `segkit infer`; entries of the last run come before earlier ones."""
    found: dict[str, Mapping[str, Any]] = {}
    for key in ("cases", "earlier"):
        listed = manifest.get(key)
        for entry in listed if isinstance(listed, list) else []:
            if isinstance(entry, dict) and "case" in entry:
                found.setdefault(str(entry["case"]), entry)
    return found


def declared_schemes(manifest: Mapping[str, Any]) -> dict[str, LabelScheme]:
    """Case id -> label scheme of its mask by a manifest of `segkit infer`, where it is one of `SCHEMES`."""
    names = {case_id: str(entry.get("label_scheme")) for case_id, entry in manifest_records(manifest).items()}
    return {case_id: SCHEMES[name] for case_id, name in names.items() if name in SCHEMES}


def _schemes_in(folder: Path) -> dict[str, LabelScheme]:
    path = folder / "manifest.json"
    return declared_schemes(read_json(path)) if path.is_file() else {}


def _chosen(cases: list[Case], case_ids: Collection[str] | None, root: Path) -> list[Case]:
    if case_ids is None:
        return cases
    known = sorted(case.id for case in cases)
    unknown = sorted(set(case_ids).difference(known))
    if unknown:
        found = f"{len(unknown)} of {len(set(case_ids))} wanted cases have no reference: {some(unknown)}"
        raise RequestError(found, where=root, expected=f"ids such as {some(known)}")
    return [case for case in cases if case.id in set(case_ids)]


def _require_fitting(challenge: str | None, scheme: str) -> None:
    if challenge is not None and scheme not in CHALLENGES[challenge]:
        raise RequestError(
            f"challenge {challenge!r} has no label scheme {scheme!r}, that of the references",
            expected=f"one of {', '.join(CHALLENGES[challenge])}",
            remedy="Leave --challenge out, or correct --label-scheme",
        )


def _find_predictions(
    cases: Sequence[Case], predictions: Path, references: Path
) -> tuple[dict[str, Path], dict[str, str], tuple[Path, ...]]:
    """Case id -> prediction, complaints of `match_files`, and the files without a case id in their names.

    Predictions are pictures if the references are pictures, else volumes.
    """
    listing, reference = list_images(predictions), cases[0].label
    is_picture = reference is not None and suffix_of(reference.path) in PICTURE_SUFFIXES
    paths = listing.pictures if is_picture else listing.volumes
    ambiguous: dict[str, str] = {}
    if predictions.is_file() and references.is_file():
        found = {cases[0].id: predictions}
    else:
        found, ambiguous = match_files(cases, paths, predictions)
    if not found and not ambiguous:
        names = some(path.name for path in paths) or "no images at all"
        raise RequestError(
            f"no prediction belongs to any of the {len(cases)} references in {references}: found {names}",
            where=predictions,
            expected=f"names such as {cases[0].id}.nii.gz",
        )
    ids = [re.compile(rf"(?<![a-zA-Z0-9]){re.escape(case.id)}(?![a-zA-Z0-9])") for case in cases]
    rest = sorted(set(paths) - set(found.values()))
    return found, ambiguous, tuple(path for path in rest if not any(case_id.search(path.name) for case_id in ids))


def match_files(
    cases: Sequence[Case], paths: Sequence[Path], root: Path, role: str = "prediction"
) -> tuple[dict[str, Path], dict[str, str]]:
    """Case id -> file, and case id -> complaint where several files, or several cases, fit.

    A file has the name of its case, with or without `-seg`, `-mask` and the like, or ends with it; one with the name of
    a case never belongs to another. Complaints call it by its `role`.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        for name in {stem_of(path), _mask_id(path)}:
            by_name[name].append(path)
    taken = {path for case in cases for path in by_name.get(case.id, ())}
    free = [(path, stem_of(path)) for path in paths if path not in taken]
    candidates: dict[str, list[Path]] = {}
    for case in cases:
        ending = re.compile(rf"[-_. ]{re.escape(case.id)}$")
        named = by_name.get(case.id) or [path for path, stem in free if ending.search(stem)]
        depth = min((len(path.parts) for path in named), default=0)
        candidates[case.id] = [path for path in named if len(path.parts) == depth]
    uses = Counter(path for own in candidates.values() for path in own)
    found: dict[str, Path] = {}
    ambiguous: dict[str, str] = {}
    for case_id, own in candidates.items():
        if len(own) > 1:
            names = some([str(path) for path in own])
            ambiguous[case_id] = f"{root}: {len(own)} files could be the {role}: {names}. Keep one of them"
        elif own and uses[own[0]] > 1:
            fitting = some([other for other, files in candidates.items() if own[0] in files])
            ambiguous[case_id] = f"{own[0]}: could be the {role} of several cases: {fitting}. Name it after one"
        elif own:
            found[case_id] = own[0]
    return found, ambiguous


def _mask_id(path: Path) -> str:
    """The case id of a mask file: its name without `-seg`, `_seg`, `_label` and the like at the end."""
    stem = stem_of(path)
    parts = split_name(stem)
    is_suffix = parts.kind == LABEL and parts.rest and stem.startswith(parts.rest)
    return parts.rest if is_suffix else stem
