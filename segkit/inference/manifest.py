"""The manifest of an output folder: what became of every case, rewritten after each one so that nothing is lost."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from segkit.data.files import written_atomically

MANIFEST_NAME = "manifest.json"
_LISTS = ("cases", "remaining", "replacing", "earlier")
STAGES = ("read", "preprocess", "predict", "decode", "write")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseRecord:
    """What became of one case. `seconds` by stage (of `STAGES`), memory in MB, `model` tells how it was predicted."""

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
    """Voxels of the windows that were computed; smaller than the model's patch where memory was short."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """What the case was expected to take: `peak_rss_mb` of the process and `seconds`."""


class Manifest:
    """The records of one run over an output folder, and those that earlier runs left there.

    `part` names one of several runs that share the folder. On disk: `cases` of this run in the order in which they
    ended, `remaining` ids that have not (`replacing`: those of them whose mask was there before), `earlier` records of
    other runs, `summary`, `model` and `environment`.
    """

    def __init__(
        self, folder: Path, ids: Iterable[str], facts: Mapping[str, Any], identity: str, part: str | None = None
    ) -> None:
        self.path = folder / (MANIFEST_NAME if part is None else f"manifest_{part}.json")
        before = _read(self.path)
        self.facts = dict(facts)
        self.identity = identity
        self.ids = list(ids)
        self.records: list[CaseRecord] = []
        self.replacing: set[str] = set()
        # Parts of a run keep manifests of their own, for they may run at the same time; they count as earlier runs.
        others = [_read(path) for path in sorted(folder.glob("manifest*.json")) if path != self.path]
        known = [entry for one in (*others, before) for key in ("cases", "earlier") for entry in one[key]]
        self._known = {str(entry["case"]): entry for entry in known if isinstance(entry, dict) and "case" in entry}
        self._cut_short: set[str] = set()
        for one in (*others, before):
            if one.get("identity") == identity:
                self._cut_short |= set(one["remaining"]) - set(one["replacing"])

    def was_made(self, case_id: str, label_scheme: str | None, missing_modalities: tuple[str, ...]) -> bool:
        """Whether an earlier run made the mask of this case just as this run would."""
        entry = self._known.get(case_id, {})
        return (
            entry.get("status") in ("done", "skipped")
            and entry.get("model") == self.identity
            and entry.get("label_scheme") == label_scheme
            and entry.get("missing_modalities") == list(missing_modalities)
        )

    def was_cut_short(self, case_id: str) -> bool:
        """Whether a run of the same model was killed before it could note this case: a mask that is there is its."""
        return case_id in self._cut_short

    def add(self, *records: CaseRecord) -> None:
        """Note what became of cases, on disk at once."""
        self.records.extend(records)
        self.write()

    def to_json(self) -> dict[str, Any]:
        """The document as it stands now."""
        ended = {record.case: record.status for record in self.records}
        remaining = [case_id for case_id in self.ids if case_id not in ended]
        counts = Counter(record.status for record in self.records)
        return {
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
        """Rewrite the file, atomically.

        Raises:
            DataError: the folder cannot be written.
        """
        with written_atomically(self.path) as temporary:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
            # File names that are not UTF-8 reach Python as lone surrogates; `\udce9` is JSON's own escape for them.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _still_counts(entry: Mapping[str, Any], ended: Mapping[str, str]) -> bool:
    """Whether an earlier record still tells of the mask on disk: a failure leaves the mask before it in place."""
    now = ended.get(entry["case"])
    return now is None or (now == "failed" and entry.get("status") != "failed")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {key: [] for key in _LISTS}
    except (OSError, ValueError):
        document = None
    if isinstance(document, dict) and all(isinstance(document.get(key), list) for key in _LISTS):
        return document
    _log.warning("%s is not a manifest that can be read; it is written anew", path)
    return {key: [] for key in _LISTS}
