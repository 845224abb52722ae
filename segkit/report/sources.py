"""The sources of a page: training runs, inference outputs and evaluations, read from their folders.

Documents of runs and outputs may be of another version, so that any field may be missing; scores are validated as for
comparisons. Absolute paths are left out: a page is sent to others.
"""

import json
import math
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from segkit.errors import DataError, RequestError, as_request
from segkit.evaluation.pairing import manifest_records
from segkit.evaluation.score_files import SCORES_NAME, ScoresDocument, read_document, summarise, worst_first
from segkit.metrics.registry import METRICS
from segkit.reading.files import read_json

_EXPECTED = "a run folder, an output folder of `segkit infer`, or one of `segkit evaluate -o`"
_HEADLINES = ("dice", "hd95_mm", "nsd", "sensitivity", "precision", "auc")
"""Metrics to compare by, where the scores do not name their own."""
_ABSOLUTE = re.compile(
    r"(?<![\w.)\]}<>/~\u2026])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/'\"<>|:;,]+[\\/])+(?=[^\s\\/'\"<>|:;,]*)"
)

INTERRUPTED_NAME = "interrupted.json"
"""In the folder of a run that stopped early: the "reason". It is removed when the run is resumed."""

_PATIENCE = 3.0
"""A run counts as stopped after this multiple of the longest silence so far, and no sooner than after:"""
_LEAST_PATIENCE_S = 180.0

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run: its settings as text, the rows of its journal, and its documents."""

    name: str
    folder: Path
    config: str = ""
    rows: tuple[Document, ...] = ()
    card: Document = field(default_factory=dict)
    validation: Document = field(default_factory=dict)
    split: Document = field(default_factory=dict)
    interruption: Document = field(default_factory=dict)
    silent_s: float = 0.0
    """Seconds since the last row of the journal."""

    @property
    def data(self) -> list[Path]:
        """The folders with its data, as given by the user."""
        folders = self.split.get("data")
        return [Path(str(folder)) for folder in folders] if isinstance(folders, list) else []

    @property
    def step(self) -> int:
        """The last step of the journal."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def is_finished(self) -> bool:
        """Whether its last scores are written; a pre-training writes its first ones early, without "minutes"."""
        return "minutes" in self.validation

    @property
    def is_running(self) -> bool:
        """Whether it still seems to run."""
        return not (self.is_finished or self.interruption or self.silent_s >= self.patience_s) and bool(self.rows)

    @property
    def is_cut_off(self) -> bool:
        """Whether it stopped early, with or without a reason."""
        return bool(self.rows) and not self.is_finished and not self.is_running

    @property
    def patience_s(self) -> float:
        """The longest time without a new row: the journal grows after each epoch and its validation."""
        ends = [0.0, *(row["seconds"] for row in self.rows if "epoch" in row and "seconds" in row)]
        ends += [row["seconds"] for row in self.rows[-1:] if "seconds" in row]
        longest = max((after - before for before, after in pairwise(ends)), default=0.0)
        return max(_PATIENCE * longest, _LEAST_PATIENCE_S)

    @property
    def resume_command(self) -> str:
        """The command that resumes it, with the names of its folders."""
        verb = "pretrain" if re.search(r"^method:", self.config, re.MULTILINE) else "train"
        data = [folder.name for folder in self.data] or ["DATA"]
        folder = self.folder.resolve()
        is_fold = re.fullmatch(r"fold_\d+", folder.name) is not None and _is_run(folder.parent)
        run = [folder.parent.name, "-f", "all"] if is_fold else [folder.name]
        return shlex.join(["segkit", verb, *data, "-o", *run, "--resume"])


@dataclass(frozen=True)
class Output:
    """A folder of masks with the manifest of `segkit infer`, which is empty for masks from elsewhere.

    `card` is that of the model, or of the first of an ensemble, and empty if it is not on this machine.
    """

    name: str
    folder: Path
    manifest: Document
    card: Document = field(default_factory=dict)

    @property
    def records(self) -> list[Document]:
        """The entries of the manifest, each case once."""
        return list(manifest_records(self.manifest).values())

    @property
    def model_name(self) -> str:
        """The names of the folders of the models that made the masks."""
        name = str(mapping(self.manifest, "model").get("name") or "")
        return ", ".join(part.replace("\\", "/").rstrip("/").split("/")[-1] for part in name.split(", "))


@dataclass(frozen=True)
class Scored:
    """An evaluation and its scores.json."""

    name: str
    folder: Path
    document: ScoresDocument


@dataclass(frozen=True)
class CaseFacts:
    """One case of a page.

    `regions` are its scores by region and metric, some of them infinite, without undefined ones; `record` is its entry
    in a manifest; `reason` is why it failed or could not be scored.
    """

    id: str
    regions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    record: Document = field(default_factory=dict)
    reason: str | None = None
    is_missing: bool = False


@dataclass(frozen=True)
class Findings:
    """The contents of the folders of a page."""

    runs: tuple[Run, ...] = ()
    outputs: tuple[Output, ...] = ()
    evaluations: tuple[Scored, ...] = ()

    def cases(self) -> list[CaseFacts]:
        """All cases, worst first: those that failed, then by mean Dice, then by id."""
        found = {case_id: CaseFacts(case_id, regions) for case_id, regions in self._scores().items()}
        for output in self.outputs:
            for record in output.records:
                case = found.get(str(record["case"]), CaseFacts(str(record["case"])))
                failed = record.get("error") if record.get("status") == "failed" else None
                found[case.id] = replace(case, record=record, reason=None if failed is None else str(failed))
        for document in (scored.document for scored in self.evaluations):
            for failure in document.errors:
                case = found.get(failure.case, CaseFacts(failure.case))
                found[case.id] = replace(case, reason=case.reason or failure.error)
            for case in [found[entry.case] for entry in document.cases if entry.missing]:
                found[case.id] = replace(case, is_missing=True)
        for run in self.runs:
            for case_id, reason in mapping(run.validation, "skipped").items():
                found.setdefault(case_id, CaseFacts(case_id, reason=str(reason)))
        ordered = [found[case_id] for case_id in worst_first({case.id: case.regions for case in found.values()})]
        return sorted(ordered, key=lambda case: case.reason is None)

    def summary(self) -> Document:
        """Region -> metric -> mean, median, n (and `ci95` where the evaluation has it)."""
        written = (scored.document.summary for scored in self.evaluations if scored.document.summary)
        return next(written, None) or summarise(self._scores().values())

    def headline_metrics(self) -> list[str]:
        """The metrics to compare by: those of the protocols of the evaluations."""
        named = dict.fromkeys(metric for scored in self.evaluations for metric in scored.document.headline)
        return list(named or _HEADLINES)

    def shown_metrics(self, cases: Iterable[CaseFacts]) -> list[str]:
        """The metrics of the cases in the order of tables: those to compare by, then other known ones, then others."""
        present = dict.fromkeys(name for case in cases for scores in case.regions.values() for name in scores)
        order = dict.fromkeys((*self.headline_metrics(), *METRICS, *present))
        return [metric for metric in order if metric in present]

    def _scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Case id -> region -> metric -> value, of the evaluations, or else of the validation of the runs."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for scored in self.evaluations:
            for entry in scored.document.cases:
                if entry.case in found:
                    remedy = "Write one page for each of them"
                    raise RequestError(f"two evaluations score case {entry.case}", where=scored.folder, remedy=remedy)
                found[entry.case] = {
                    region: {metric: value for metric, value in scores.items() if not math.isnan(value)}
                    for region, scores in entry.scores().items()
                }
        if not self.evaluations:
            for run in self.runs:
                for case_id, dice in mapping(run.validation, "cases").items():
                    found[case_id] = {name: {"dice": value} for name, value in _numbers(dice).items()}
        return found


def read_sources(paths: Sequence[Path]) -> Findings:
    """Read folders; a file such as scores.json stands for its folder.

    Beside an evaluation, a folder without documents counts as the evaluated masks.

    Raises:
        RequestError: a folder is none of the three kinds, or a document in it cannot be read.
    """
    runs: list[Run] = []
    outputs: list[Output] = []
    evaluations: list[Scored] = []
    bare: list[Path] = []  # folders without documents
    for path in paths:
        folder = path.parent if path.is_file() else path
        if not folder.is_dir():
            raise RequestError("there is no such folder", where=path, expected=_EXPECTED)
        folds = [fold for fold in sorted(folder.glob("fold_*")) if _is_run(fold)]
        name, scores, manifests = folder.resolve().name, folder / SCORES_NAME, sorted(folder.glob("manifest*.json"))
        found_runs = [read_run(folder)] if _is_run(folder) else []
        found_runs += [read_run(fold, f"{name}/{fold.name}") for fold in folds]
        runs += found_runs
        outputs += [Output(name, folder, manifest, _card_of(manifest)) for manifest in map(_read_json, manifests)]
        evaluations += [Scored(name, folder, read_document(scores))] if scores.is_file() else []
        if not found_runs and not manifests and not scores.is_file():
            bare.append(folder)
    if bare and not evaluations:
        raise RequestError("holds nothing to report", where=bare[0], expected=_EXPECTED)
    outputs += [Output(folder.resolve().name, folder, {}) for folder in bare]
    return Findings(tuple(runs), tuple(outputs), tuple(evaluations))


def read_run(folder: Path, name: str | None = None) -> Run:
    """A run folder, finished or not; documents that are not written yet are empty."""
    config, journal = folder / "config.yaml", folder / "metrics.jsonl"
    settings = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    rows = tuple(_journal(journal))
    names = ("model.json", "validation.json", "split.json", INTERRUPTED_NAME)
    card, validation, split, interruption = (_read_json(folder / name) for name in names)
    silent_s = time.time() - journal.stat().st_mtime if rows else 0.0
    name = name or folder.resolve().name
    return Run(name, folder, settings, rows, card, validation, split, interruption, silent_s)


def mapping(document: Document, key: str) -> Document:
    """The mapping under `key`, empty if there is none."""
    value = document.get(key)
    return value if isinstance(value, dict) else {}


class PathRedactor:
    """Removes the folders of this machine from texts.

    An absolute path is cut to its last name, one below the parent of a given folder or below the user's home to the
    part after that. Other folders with blanks in their names are not recognised as a whole.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        folders = {form.parent for path in paths for form in (path.absolute(), path.resolve())} | {Path.home()}
        known = (str(folder) for folder in folders if folder != Path(folder.anchor))
        self._known = sorted(known, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text without folders."""
        for folder in self._known:
            text = re.sub(re.escape(folder) + r"(?:[\\/]|(?![\w.-]))", "\u2026/", text)
        return _ABSOLUTE.sub("\u2026/", text)


def _is_run(folder: Path) -> bool:
    names = ("model.json", "metrics.jsonl", "config.yaml", "validation.json")
    return any((folder / name).is_file() for name in names)


def _card_of(manifest: Document) -> Document:
    """The model card that a manifest names, if its weights are those that made the masks."""
    model = mapping(manifest, "model")
    path = Path(str(model.get("name") or "").split(", ")[0]) / "model.json"
    try:
        card = _read_json(path)
    except (RequestError, OSError, ValueError):
        return {}
    digests = model.get("sha256")
    return card if isinstance(digests, list) and card.get("sha256") in digests else {}


def _journal(path: Path) -> list[Document]:
    """The numbers of the rows with a step; a line that is still being written is left out."""
    rows: list[Document] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "step" in (own := _numbers(row)):
            rows.append(own | {name: _numbers(value) for name, value in row.items() if isinstance(value, dict)})
    return rows


def _read_json(path: Path) -> Document:
    """A document that segkit wrote; empty if there is no such file."""
    try:
        return read_json(path, most_bytes=None) if path.is_file() else {}
    except DataError as error:
        raise as_request(error) from error


def _numbers(scores: object) -> dict[str, float]:
    named = scores.items() if isinstance(scores, dict) else ()
    return {name: value for name, given in named if (value := number(given)) is not None}


def number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
