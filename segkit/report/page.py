"""`segkit report`: one self-contained HTML page with its pictures, charts, scripts and volumes.

Its content security policy forbids every address, and every script but its own; `templates` escapes names and notes.
"""

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from markupsafe import Markup

from segkit.errors import DataError, RequestError
from segkit.reading.files import written_atomically
from segkit.report import sections
from segkit.report.images import Gallery, find_gallery, load_arrays
from segkit.report.pictures import DIFFERENCES, CaseVolumes, case_picture, case_volumes, viewer_script
from segkit.report.sources import CaseFacts, Findings, PathRedactor, read_sources
from segkit.report.templates import asset, render

MOST_BYTES = 15_000_000
"""The size limit of a page, so that it can be sent by mail."""

_STILLS_BYTES = 6_000_000
_STILL_BYTES = 120_000
_MOST_STILLS = 200
_VIEWED_CASES = 10
_SPARE_BYTES = 20_000
_WITHOUT_VIEWER = "The interactive viewer is missing: pip install 'segkit[viewer]' and write the page again."


@dataclass(frozen=True)
class PageFacts:
    """The written file, its size, and its number of cases with scores, stills and volumes."""

    path: Path
    size_bytes: int
    cases: int
    stills: int
    volumes: int
    notes: tuple[str, ...] = ()


def write_page(
    sources: Sequence[Path],
    target: Path,
    *,
    data: Path | None = None,
    title: str | None = None,
    with_viewer: bool = True,
    is_live: bool = False,
) -> PageFacts:
    """Write one self-contained page about training runs, inference outputs and evaluations together.

    Args:
        sources: Folders of `segkit train -o`, `segkit infer -o` and `segkit evaluate -o`, in any number and order.
        target: The file to write, atomically.
        data: Where the scans and references are; None looks in the folders that the documents name.
        title: The heading; None makes one of the names of the folders.
        with_viewer: Whether the worst cases open in three dimensions, where `ipyniivue` is installed.
        is_live: Whether a running training writes it, and will write it again.

    Raises:
        RequestError: a source is none of the three kinds or cannot be read, or `data` holds no images.
        DataError: the page cannot be written.
    """
    if not sources:
        raise RequestError("no folder to report on", remedy="Name a run, an output or an evaluation folder")
    findings = read_sources(sources)
    run_data = [folder for run in findings.runs for folder in run.data]
    redact = PathRedactor([*sources, target, *run_data, *([] if data is None else [data])])
    cases = findings.cases()
    gallery = find_gallery(findings, {case.id for case in cases}, data)
    script = viewer_script() if with_viewer and gallery.files else None
    media = _gather(cases, gallery, with_volumes=script is not None)
    notes = sections.evaluation_notes(findings, cases)
    notes += [*gallery.notes, *sections.table_notes(findings, cases)]
    if with_viewer and gallery.files and script is None:
        notes.append(_WITHOUT_VIEWER)
    common = {
        "heading": title or _heading(findings),
        "version": metadata.version("segkit"),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "is_live": is_live,
        "states": sections.state_of_runs(findings.runs, redact, is_live=is_live),
    }
    while True:
        parts = _sections(findings, cases, gallery, media, redact)
        if all_notes := [redact(note) for note in (*notes, *media.notes())]:
            parts.append(sections.Section("notes", "Notes", {"notes": all_notes}))
        text = _html(common, parts, _viewer_data(media, gallery, script or "")).encode("utf-8")
        if len(text) <= MOST_BYTES or not (media.volumes or media.stills):
            break
        media.drop(len(text) - MOST_BYTES + _SPARE_BYTES)
    with written_atomically(target) as temporary:
        temporary.write_bytes(text)
    counts = (len(text), len(cases), len(media.stills), len(media.volumes))
    return PageFacts(target, *counts, notes=tuple(all_notes))


def _heading(findings: Findings) -> str:
    """The names of the trained models where there are any, else of the folders."""
    models = [run.name for run in findings.runs] or [output.model_name for output in findings.outputs]
    named = [name for name in models if name] or [scored.name for scored in findings.evaluations]
    return " \u00b7 ".join(dict.fromkeys(named))


@dataclass
class _Media:
    """Stills and volumes by case id, worst first, problems with their files, and the numbers left out to save space."""

    stills: dict[str, Markup] = field(default_factory=dict)
    volumes: dict[str, CaseVolumes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    without_still: int = 0
    without_volume: int = 0
    has_planes: bool = False

    def drop(self, surplus: int) -> None:
        """Leave out volumes, best case first, then stills, until `surplus` bytes are saved."""
        while surplus > 0 and self.volumes:
            surplus -= self.volumes.popitem()[1].size
            self.without_volume += 1
        while surplus > 0 and self.stills:
            surplus -= len(self.stills.popitem()[1])
            self.without_still += 1

    def notes(self) -> list[str]:
        """Missing pictures and volumes."""
        reason = f"so that the page stays below {MOST_BYTES // 10**6} MB"
        volumes = f"{self.without_volume} of the worst cases are not in the viewer, {reason}."
        stills = f"{self.without_still} cases have no picture, {reason}."
        return self.problems + [volumes] * (self.without_volume > 0) + [stills] * (self.without_still > 0)


def _gather(cases: Sequence[CaseFacts], gallery: Gallery, *, with_volumes: bool) -> _Media:
    """Stills of the cases with files and volumes of the worst ones; one case is in memory at a time."""
    media = _Media()
    with_files = [case.id for case in cases if case.id in gallery.files]
    shown = with_files[:_MOST_STILLS]
    media.without_still = len(with_files) - len(shown)
    share = min(_STILL_BYTES, _STILLS_BYTES // max(len(shown), 1))
    for position, case_id in enumerate(shown):
        try:
            arrays = load_arrays(gallery.files[case_id], gallery.scheme)
        except DataError as error:
            media.problems.append(f"No picture of {case_id}: {error}")
            continue
        media.has_planes |= arrays.grid.dims == 3
        still = case_picture(case_id, arrays, gallery.colours(), f"p{position}", share)
        if still is None:
            media.without_still += 1
        else:
            media.stills[case_id] = still
        if with_volumes and len(media.volumes) < _VIEWED_CASES:
            volumes = case_volumes(arrays)
            media.volumes |= {} if volumes is None else {case_id: volumes}
    return media


def _sections(
    findings: Findings, cases: Sequence[CaseFacts], gallery: Gallery, media: _Media, redact: PathRedactor
) -> list[sections.Section]:
    """All sections with content but the notes."""
    anchors = {case_id: f"case-{position}" for position, case_id in enumerate(media.stills)}
    viewable = {case_id: f"v{position}" for position, case_id in enumerate(media.volumes)}
    labels = [] if gallery.scheme is None else list(gallery.colours().values())
    are_scored = any(case.regions for case in cases)
    parts = [
        sections.summary_section(findings, cases, redact),
        sections.failures_section(cases, redact),
        sections.training_section(findings.runs),
        sections.spread_section(findings, cases),
        sections.cases_section(findings, cases, anchors),
        sections.viewer_section(viewable, labels, len(media.stills), are_scored=are_scored),
        sections.pictures_section(cases, media.stills, anchors, labels, viewable, has_planes=media.has_planes),
        sections.figures_section(findings),
        sections.timing_section(findings),
        sections.reliability_section(findings),
        sections.settings_section(findings, redact),
    ]
    return [part for part in parts if part is not None]


def _viewer_data(media: _Media, gallery: Gallery, script: str) -> dict[str, Any] | None:
    """NiiVue, the volumes by the id of their element, and how to show them; None without volumes."""
    if not media.volumes:
        return None
    volumes = {f"v{position}": (case_id, own) for position, (case_id, own) in enumerate(media.volumes.items())}
    facts = {
        "labels": _colours(gallery.colours()),
        "differences": _colours(DIFFERENCES),
        "cases": [{"id": case_id, "key": key, **own.facts} for key, (case_id, own) in volumes.items()],
    }
    layers = {f"{key}-{layer}": text for key, (_, own) in volumes.items() for layer, text in own.layers.items()}
    return {"module": script, "facts": facts, "volumes": layers}


def _html(common: Mapping[str, Any], parts: Sequence[sections.Section], viewer: Mapping[str, Any] | None) -> str:
    """The whole document."""
    scripts, style = [asset("page.js"), *([asset("viewer.js")] if viewer else [])], asset("page.css")
    assets = {"scripts": scripts, "style": style, "policy": _policy(scripts, style)}
    return render("page.html", sections=parts, viewer=viewer, **common, **assets) + "\n"


def _colours(labels: Mapping[int, tuple[str, str]]) -> dict[str, dict[str, str]]:
    return {str(value): {"name": name, "colour": colour} for value, (name, colour) in labels.items()}


def _policy(scripts: Sequence[str], style: str) -> str:
    """No network: only these scripts and this style, pictures inside the page, and the blobs of the viewer."""
    rules = {
        "default-src": "'none'",
        "script-src": f"{' '.join(map(_digest, scripts))} blob:",
        "style-src": _digest(style),
        "img-src": "data: blob:",
        "connect-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
