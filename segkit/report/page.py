"""`segkit report`: one self-contained HTML page.

A page holds its pictures, charts, scripts and volumes. Its content security policy forbids every address, and every
script but its own; names and notes are escaped by construction (`html`).
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from segkit.errors import DataError, RequestError
from segkit.reading.files import written_atomically
from segkit.report import cases as about_cases
from segkit.report import sections
from segkit.report.html import Markup, asset, element, joined, json_for_script, label_legend
from segkit.report.images import Gallery, find_gallery, load_arrays
from segkit.report.pictures import case_picture
from segkit.report.sources import CaseFacts, Findings, PathRedactor, read_sources
from segkit.report.viewer import DIFFERENCES, CaseVolumes, case_volumes, viewer_script

MOST_BYTES = 15_000_000
"""The largest size of a page, so that it can be sent by mail."""

_STILLS_BYTES = 6_000_000
_STILL_BYTES = 120_000
_MOST_STILLS = 200
_VIEWED_CASES = 10
_SPARE_BYTES = 20_000
_REFRESH_S = 30
_WITHOUT_VIEWER = "The interactive viewer is left out: pip install 'segkit[viewer]' and write the page again."


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
        with_viewer: Whether the worst cases can be opened in three dimensions, where `ipyniivue` is installed.
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
    notes = about_cases.evaluation_notes(findings, cases)
    notes += [*gallery.notes, *about_cases.table_notes(findings, cases)]
    if with_viewer and gallery.files and script is None:
        notes.append(_WITHOUT_VIEWER)
    page = _Page(findings, cases, gallery, media, title or _heading(findings), redact, script, is_live=is_live)
    while True:
        all_notes = [*notes, *media.notes()]
        text = page.to_html(all_notes).encode("utf-8")
        if len(text) <= MOST_BYTES or not (media.volumes or media.stills):
            break
        media.drop(len(text) - MOST_BYTES + _SPARE_BYTES)
    with written_atomically(target) as temporary:
        temporary.write_bytes(text)
    counts = (len(text), len(cases), len(media.stills), len(media.volumes))
    return PageFacts(target, *counts, notes=tuple(map(redact, all_notes)))


def _heading(findings: Findings) -> str:
    """The names of the trained models where there are any, else of the folders."""
    models = [run.name for run in findings.runs] or [output.model_name for output in findings.outputs]
    named = [name for name in models if name] or [scored.name for scored in findings.evaluations]
    return " \u00b7 ".join(dict.fromkeys(named))


@dataclass
class _Media:
    """Stills and volumes by case id, worst first, problems with their files, and how many are left out to save room."""

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
        room = f"so that the page stays below {MOST_BYTES // 10**6} MB"
        left_out = (
            (self.without_volume, "of the worst cases are not in the viewer"),
            (self.without_still, "cases have no picture"),
        )
        return [*self.problems, *(f"{count} {what}, {room}." for count, what in left_out if count)]


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


@dataclass(frozen=True)
class _Page:
    """Everything that is in a page but its notes; `script` is that of the viewer."""

    findings: Findings
    cases: Sequence[CaseFacts]
    gallery: Gallery
    media: _Media
    heading: str
    redact: PathRedactor
    script: str | None
    is_live: bool

    def to_html(self, notes: Sequence[str]) -> str:
        """The whole document."""
        scripts, stores = [asset("page.js")], []
        if self.media.volumes:
            scripts.append(asset("viewer.js"))
            stores = self._stores()
        style = asset("page.css")
        refresh = element("noscript", element("meta", http_equiv="refresh", content=_REFRESH_S))
        head = [
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_policy(scripts, style)),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            refresh if self.is_live else None,
            element("title", self.heading),
            element("style", style),
        ]
        running = (element("script", text) for text in scripts)
        body = element("body", self._body(notes), *stores, *running)
        return f"<!DOCTYPE html>\n{element('html', element('head', *head), body, lang='en')}\n"

    def _body(self, notes: Sequence[str]) -> Markup:
        findings, cases, media, redact = self.findings, self.cases, self.media, self.redact
        anchors = {case_id: f"case-{position}" for position, case_id in enumerate(media.stills)}
        viewable = {case_id: f"v{position}" for position, case_id in enumerate(media.volumes)}
        key = label_legend([] if self.gallery.scheme is None else self.gallery.colours().values())
        are_scored = any(case.regions for case in cases)
        parts = [
            sections.summary_section(findings, cases, redact),
            about_cases.failures_section(cases, redact),
            sections.curves_section(findings.runs),
            about_cases.spread_section(findings, cases),
            about_cases.cases_section(findings, cases, anchors),
            about_cases.viewer_section(viewable, key, len(media.stills), are_scored=are_scored),
            about_cases.pictures_section(cases, media.stills, anchors, key, viewable, has_planes=media.has_planes),
            sections.figures_section(findings),
            about_cases.timing_section(findings),
            sections.reliability_section(findings),
            sections.settings_section(findings, redact),
            sections.notes_section(notes, redact),
        ]
        present = [part for part in parts if part is not None]
        links = (element("a", part.title, href=f"#{part.key}") for part in present)
        written = time.strftime("%Y-%m-%d %H:%M")
        header = element(
            "header",
            element("h1", self.heading),
            element("p", f"Written by segkit {metadata.version('segkit')} on {written}.", class_="muted"),
            element("nav", *links, aria_label="Sections"),
            sections.state_of_runs(findings.runs, redact, is_live=self.is_live),
        )
        footer = element("footer", element("p", "segkit is no medical device; no finding may rest on this page alone."))
        return joined([header, element("main", *(part.to_html() for part in present)), footer])

    def _stores(self) -> list[Markup]:
        """The data of the viewer, which no browser runs: NiiVue, the volumes, and how to show them."""
        volumes = {f"v{position}": (case_id, own) for position, (case_id, own) in enumerate(self.media.volumes.items())}
        facts = {
            "labels": _colours(self.gallery.colours()),
            "differences": _colours(DIFFERENCES),
            "cases": [{"id": case_id, "key": key, **dict(own.facts)} for key, (case_id, own) in volumes.items()],
        }
        binary = {"viewer-module": self.script or ""} | {
            f"{key}-{layer}": text for key, (_, own) in volumes.items() for layer, text in own.layers.items()
        }
        module, *layers = (
            element("script", Markup(text), type="application/octet-stream", id=key) for key, text in binary.items()
        )
        return [module, element("script", json_for_script(facts), type="application/json", id="viewer-facts"), *layers]


def _colours(labels: Mapping[int, tuple[str, str]]) -> dict[str, dict[str, str]]:
    return {str(value): {"name": name, "colour": colour} for value, (name, colour) in labels.items()}


def _policy(scripts: Sequence[str], style: str) -> str:
    """Nothing from anywhere: only these scripts and this style, pictures in the page, and the viewer's own blobs."""
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
