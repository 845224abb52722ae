"""The manifest of an output folder: the result of each case, on disk as soon as the case ends.

A manifest of many cases takes long to write. Beyond some hundreds it is rewritten only when a twentieth of them has
ended; newer records are in a journal beside it, one line per case, which the next run also reads. `close` removes it.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from segkit.errors import DataError, RequestError
from segkit.reading.files import file_sha256, stored_files, written_atomically

MANIFEST_NAME = "manifest.json"
_NAMES = ("utf-8", "surrogateescape")
"""Encoding of file names, which need not be UTF-8."""
_LISTS = ("cases", "remaining", "replacing", "earlier")
_AT_ONCE, _SHARE = 400, 20
"""Up to this many cases the manifest is written after each; beyond, when a `_SHARE`-th of them has ended."""
STAGES = ("read", "preprocess", "predict", "decode", "write")

TaskName = Literal["segmentation", "inpainting"]
_VERBS: Mapping[str, str] = {"segmentation": "infer", "inpainting": "inpaint"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFile:
    """An image or a mask that a result was made from: a file, or the folder of a DICOM series.

    `stamp` has the bytes and the time of the last change in ns of each of its files, shortened to a digest if there are
    several; `sha256` is that of their contents. Both are empty where it could not be read.
    """

    name: str
    stamp: str = ""
    sha256: str = ""

    @classmethod
    def of(cls, path: Path, known: Mapping[str, Any] | None = None) -> "InputFile":
        """The input as it is now; the contents are read unless `known`, an earlier entry, has the same stamp."""
        try:
            files = stored_files(path)
            stamps = [f"{file.name} {status.st_size} {status.st_mtime_ns}" for file in files if (status := file.stat())]
            stamp = stamps[0] if len(files) == 1 else hashlib.sha256("\n".join(stamps).encode(*_NAMES)).hexdigest()
            if known and known.get("stamp") == stamp:
                return cls(path.name, stamp, str(known.get("sha256")))
            digests = [file_sha256(file) for file in files]
        except (OSError, DataError):  # reading it reports why
            return cls(path.name)
        digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return cls(path.name, stamp, digest)


@dataclass(frozen=True)
class CaseRecord:
    """The result of one case: `seconds` by stage (of `STAGES`), memory in MB; `model` is the identity of the task."""

    case: str
    status: Literal["done", "failed", "skipped"]
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    peak_rss_mb: float = 0.0
    backend: str = "torch"
    label_scheme: str | None = None
    missing_modalities: tuple[str, ...] = ()
    model: str = ""
    window: tuple[int, ...] = ()
    """Voxels of the windows; smaller than the model's patch if memory was short."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Expected `peak_rss_mb` of the process and `seconds`."""
    inputs: tuple[InputFile, ...] = ()
    """In the order of the plan; empty for results of earlier versions."""
    recorded: str = ""
    """When it was added to the manifest, UTC; of several records of a case the latest counts."""


class Manifest:
    """The records of one run over an output folder, and those of earlier runs.

    `part` names one of several runs that share the folder. On disk: `cases` of this run in the order in which they
    ended, `remaining` ids (`replacing`: those with an earlier result), `earlier` records of other runs, `task`,
    `summary`, `model` and `environment`. All runs of a folder have one task: a record replaces the earlier one.

    Raises:
        RequestError: the folder has the manifest of another task.
    """

    def __init__(
        self,
        folder: Path,
        ids: Iterable[str],
        facts: Mapping[str, Any],
        identity: str,
        part: str | None = None,
        *,
        task: TaskName = "segmentation",
    ) -> None:
        self.path = folder / (MANIFEST_NAME if part is None else f"manifest_{part}.json")
        self.task = task
        self.facts = dict(facts)
        self.identity = identity
        self.ids = list(ids)
        self.records: list[CaseRecord] = []
        self._journal = _journal_of(self.path)
        self._unwritten = 0
        self._has_file = False
        self.replacing: set[str] = set()
        # Parts of a run may run at the same time and have their own manifests, which count as earlier runs.
        others = sorted(path for path in folder.glob("manifest*.json") if path != self.path)
        documents = {path: _read(path) for path in (*others, self.path)}
        for path, one in documents.items():
            _refuse_other_task(path, one, task)
        known = [entry for one in documents.values() for key in ("cases", "earlier") for entry in one[key]]
        named = [entry for entry in known if isinstance(entry, dict) and _names_case(entry)]
        self._known = {entry["case"]: entry for entry in sorted(named, key=_precedence)}
        self._cut_short: set[str] = set()
        for one in documents.values():
            if one.get("identity") == identity:
                self._cut_short |= set(one["remaining"]) - set(one["replacing"])

    def was_made(self, case_id: str, label_scheme: str | None, missing_modalities: tuple[str, ...]) -> bool:
        """Whether an earlier run made the result of this case with the same model and options."""
        entry = self._known.get(case_id, {})
        return (
            entry.get("status") in ("done", "skipped")
            and entry.get("model") == self.identity
            and entry.get("label_scheme") == label_scheme
            and entry.get("missing_modalities") == list(missing_modalities)
        )

    def inputs_of(self, case_id: str) -> list[Mapping[str, Any]]:
        """What the earlier result of a case was made from, as `CaseRecord.inputs`; empty if that was not recorded."""
        inputs = self._known.get(case_id, {}).get("inputs")
        return [one for one in inputs if isinstance(one, dict)] if isinstance(inputs, list) else []

    def was_cut_short(self, case_id: str) -> bool:
        """Whether a run of the same model was killed before it recorded this case, whose result may exist."""
        return case_id in self._cut_short

    def add(self, *records: CaseRecord) -> None:
        """Record cases on disk; raises DataError if the folder cannot be written."""
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        records = tuple(replace(record, recorded=now) for record in records)
        self.records.extend(records)
        self._unwritten += len(records)
        size = len(self.ids) + len(self._known)
        if not self._has_file or self._unwritten >= (size - _AT_ONCE) // _SHARE:
            self.write()
            return
        try:
            with self._journal.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        except OSError:
            self.write()  # raises the error of the folder

    def close(self) -> None:
        """Write the records of the journal into the file; raises DataError if the folder cannot be written."""
        if self._unwritten:
            self.write()

    def to_json(self) -> dict[str, Any]:
        """The current document."""
        ended = {record.case: record.status for record in self.records}
        remaining = [case_id for case_id in self.ids if case_id not in ended]
        counts = Counter(record.status for record in self.records)
        return {
            "task": self.task,
            "cases": [asdict(record) for record in self.records],
            "summary": {
                **{status: counts[status] for status in ("done", "failed", "skipped")},
                "remaining": len(remaining),
                "seconds": round(sum(sum(record.seconds.values()) for record in self.records), 3),
            },
            **self.facts,
            "identity": self.identity,
            "remaining": remaining,
            "replacing": [case_id for case_id in remaining if case_id in self.replacing],
            "earlier": [entry for entry in self._known.values() if _still_counts(entry, ended)],
        }

    def write(self) -> None:
        """Write the document atomically and remove the journal; raises DataError if the folder cannot be written."""
        with written_atomically(self.path) as temporary:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
            # File names that are not UTF-8 reach Python as lone surrogates; `\udce9` is JSON's own escape for them.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        with suppress(OSError):  # its records are then in both files, which is harmless
            self._journal.unlink()
        self._unwritten = 0
        self._has_file = True


def _refuse_other_task(path: Path, document: Mapping[str, Any], task: TaskName) -> None:
    """Refuse the manifest of another verb; old manifests name no task, but those of inpainting have `holes`."""
    if "identity" not in document:
        return  # no manifest that can be read
    other = str(document.get("task", "inpainting" if "holes" in document else "segmentation"))
    if other != task:
        raise RequestError(
            f"was written by `segkit {_VERBS.get(other, other)}`, and `segkit {_VERBS[task]}` replaces its records",
            where=path,
            expected="an output folder for each of them",
            remedy="Choose another output folder",
        )


def _names_case(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("case"), str)


def _precedence(entry: Mapping[str, Any]) -> tuple[bool, str]:
    """Later records come after earlier ones, and those of a result after failures, which leave it in place."""
    return entry.get("status") != "failed", str(entry.get("recorded") or "")


def _still_counts(entry: Mapping[str, Any], ended: Mapping[str, str]) -> bool:
    """Whether an earlier record still describes the result on disk: a failure leaves the result before it in place."""
    now = ended.get(entry["case"])
    return now is None or (now == "failed" and entry.get("status") != "failed")


def _read(path: Path) -> dict[str, Any]:
    """The manifest of a run with the records of its journal; an empty one if there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {key: [] for key in _LISTS}
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in _LISTS):
        _log.warning("%s is not a manifest that can be read; it is replaced", path)
        return {key: [] for key in _LISTS}
    remaining = dict.fromkeys(_texts(document["remaining"]))
    added = {entry["case"]: entry for entry in _read_journal(_journal_of(path)) if entry["case"] in remaining}
    return {
        **document,
        "cases": [*document["cases"], *added.values()],
        "remaining": [case_id for case_id in remaining if case_id not in added],
        "replacing": _texts(document["replacing"]),
    }


def _texts(entries: list[Any]) -> list[str]:
    return [entry for entry in entries if isinstance(entry, str)]


def _journal_of(manifest: Path) -> Path:
    return manifest.with_suffix(".journal")


def _read_journal(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return  # the run was killed while this line was written
        if isinstance(entry, dict) and _names_case(entry):
            yield entry
