"""`segkit report`: one HTML page that needs nothing but itself.

A page carries its pictures, charts, scripts and volumes inside. Its content security policy forbids every address, and
every script but those that were written with it; names and notes are escaped by construction (`html`).

A page as one HTML document: its head, its scripts, the data of the viewer, and the policy that forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path

from segkit.errors import DataError, RequestError
from segkit.reading.files import written_atomically
from segkit.report import sections
from segkit.report.case_table import MOST_METRICS, cases_section, pictures_section
from segkit.report.charts import timing_section
from segkit.report.html import Markup, element, joined, json_for_script
from segkit.report.images import Gallery, find_gallery, load_arrays
from segkit.report.pictures import case_picture, embedded_figure
from segkit.report.sources import CaseFacts, Discretion, Findings, read_sources
from segkit.report.terms import MOST_ROWS, Section, colour_key, metric_name, model_name, section, shown_metrics
from segkit.report.viewer import DIFFERENCES, CaseVolumes, case_volumes, viewer_licence, viewer_script

MOST_BYTES = 15_000_000
"""A page is not larger than this, so that it can be sent by mail."""

_STILLS_BYTES = 6_000_000
_STILL_BYTES = 120_000
_MOST_STILLS = 200
_FIGURES = 6
_VIEWED_CASES = 10
_SPARE_BYTES = 20_000
_WITHOUT_VIEWER = "The interactive viewer is left out: pip install 'segkit[viewer]' and write the page again."


@dataclass(frozen=True)
class PageFacts:
    """What was written: the file, its size, and how many cases it has with scores, stills and volumes."""

    path: Path
    size_bytes: int
    cases: int
    stills: int
    volumes: int
    notes: tuple[str, ...] = ()


@dataclass
class _Media:
    """Stills and volumes by case id, worst first; what could not be had; and what was left out to save room."""

    stills: dict[str, Markup] = field(default_factory=dict)
    volumes: dict[str, CaseVolumes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    without_still: int = 0
    without_volume: int = 0
    has_planes: bool = False

    def drop(self, surplus: int) -> None:
        """Leave out volumes, best case first, then stills, until `surplus` bytes are gone."""
        while surplus > 0 and self.volumes:
            surplus -= self.volumes.popitem()[1].size
            self.without_volume += 1
        while surplus > 0 and self.stills:
            surplus -= len(self.stills.popitem()[1])
            self.without_still += 1

    def notes(self) -> list[str]:
        """What a reader should know of pictures and volumes that are missing."""
        room = f"so that the page stays below {MOST_BYTES // 10**6} MB"
        left_out = (
            (self.without_volume, "of the worst cases are not in the viewer"),
            (self.without_still, "cases have no picture"),
        )
        return [*self.problems, *(f"{count} {what}, {room}." for count, what in left_out if count)]


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
        data: Where the scans and references are; None looks where the documents say.
        title: The heading; None makes one of the names of the folders.
        with_viewer: Whether the worst cases can be opened in three dimensions, where `ipyniivue` is installed.
        is_live: Whether it is written by a training that goes on and will write it again.

    Raises:
        RequestError: a source is none of the three kinds or cannot be read, or `data` holds no images.
        DataError: the page cannot be written.
    """
    if not sources:
        raise RequestError("no folder to report on", remedy="Name a run, an output or an evaluation folder")
    findings = read_sources(sources)
    learnt_from = [folder for run in findings.runs for folder in run.data]
    tell = Discretion([*sources, target, *learnt_from, *([] if data is None else [data])])
    cases = findings.cases()
    gallery = find_gallery(findings, {case.id for case in cases}, data)
    script = viewer_script() if with_viewer and gallery.files else None
    media = _gather(cases, gallery, with_volumes=script is not None)
    notes = [*sections.evaluation_notes(findings, cases), *gallery.notes, *_omissions(findings, cases)]
    if with_viewer and gallery.files and script is None:
        notes.append(_WITHOUT_VIEWER)
    heading = title or _heading(findings)
    while True:
        told = [*notes, *media.notes()]
        state = sections.state_of_runs(findings.runs, tell, is_live=is_live)
        body = _body(findings, cases, gallery, media, told, heading, tell, state)
        page = whole_document(body, heading, media.volumes, gallery, script, is_live=is_live)
        size = len(page.encode("utf-8"))
        if size <= MOST_BYTES or not (media.volumes or media.stills):
            break
        media.drop(size - MOST_BYTES + _SPARE_BYTES)
    with written_atomically(target) as temporary:
        temporary.write_bytes(page.encode("utf-8"))
    return PageFacts(target, size, len(cases), len(media.stills), len(media.volumes), tuple(map(tell, told)))


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


def _omissions(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """What of the scores the table does not show."""
    notes = []
    if len(cases) > MOST_ROWS:
        notes.append(f"Tables have the first {MOST_ROWS} of {len(cases)} cases, the worst of them.")
    more = shown_metrics(findings, cases)[MOST_METRICS:]
    if more:
        names = ", ".join(map(metric_name, more))
        notes.append(f"Metrics that are in scores.csv and not in the table: {names}.")
    return notes


def _body(
    findings: Findings,
    cases: Sequence[CaseFacts],
    gallery: Gallery,
    media: _Media,
    notes: Sequence[str],
    heading: str,
    tell: Discretion,
    state: Markup | None,
) -> Markup:
    anchors = {case_id: f"case-{position}" for position, case_id in enumerate(media.stills)}
    viewable = {case_id: f"v{position}" for position, case_id in enumerate(media.volumes)}
    key = colour_key([] if gallery.scheme is None else gallery.colours().values())
    parts = [
        sections.summary_section(findings, cases, tell),
        sections.failures_section(cases, tell),
        sections.curves_section(findings.runs),
        sections.spread_section(findings, cases),
        cases_section(findings, cases, anchors),
        _viewer_section(viewable, key, len(media.stills), are_scored=any(case.regions for case in cases)),
        pictures_section(cases, media.stills, anchors, key, viewable, has_planes=media.has_planes),
        _figures_section(findings),
        timing_section(findings),
        sections.reliability_section(findings),
        sections.settings_section(findings, tell),
        sections.notes_section(notes, tell),
    ]
    present = [part for part in parts if part is not None]
    links = (element("a", part.title, href=f"#{part.key}") for part in present)
    written = time.strftime("%Y-%m-%d %H:%M")
    header = element(
        "header",
        element("h1", heading),
        element("p", f"Written by segkit {metadata.version('segkit')} on {written}.", class_="muted"),
        element("nav", *links, aria_label="Sections"),
        state,
    )
    footer = element("footer", element("p", "segkit is no medical device; no finding may rest on this page alone."))
    return joined([header, element("main", *(part.to_html() for part in present)), footer])


def _viewer_section(viewable: Mapping[str, str], key: Markup, drawn: int, *, are_scored: bool) -> Section | None:
    """The viewer of the cases with volumes (case id -> key), which are `drawn` in all."""
    if not viewable:
        return None
    choices = (element("option", case_id, value=name) for case_id, name in viewable.items())
    picker = element("label", "Case ", element("select", *choices, id="viewer-case"))
    which = "all" if len(viewable) >= drawn else "the worst" if are_scored else "the first"
    told = f"Here are {which} {len(viewable)} cases" if len(viewable) > 1 else "The case"
    about = element("p", f"{told}, cropped to what matters, with the intensities of the scan.")
    controls = Markup(asset("viewer.html"))
    keys = [key, colour_key(DIFFERENCES.values(), "difference:")]
    terms = element("details", element("summary", "Licence of NiiVue, the viewer"), element("pre", viewer_licence()))
    filters = element("div", picker, class_="filters")
    return section("Viewer", "viewer", about, filters, controls, *keys, terms)


def _figures_section(findings: Findings) -> Section | None:
    """The pictures that a training left in its folder."""
    figures = []
    for run in findings.runs:
        paths = [path for path in sorted((run.folder / "figures").glob("*.png")) if path.stem != "curves"]
        for path in paths[:_FIGURES]:
            try:
                picture = embedded_figure(path, f"{run.name}: {path.stem}")
            except (OSError, ValueError):  # it may be written at this moment
                continue
            figures.append(element("figure", element("figcaption", path.stem.replace("_", " ")), picture))
    if not figures:
        return None
    return section("Figures", "figures", element("div", *figures, class_="figures"))


def _heading(findings: Findings) -> str:
    """The names of the trained models where there are any, else of the folders."""
    models = [run.name for run in findings.runs] or [model_name(output.manifest) for output in findings.outputs]
    named = [name for name in models if name] or [scored.name for scored in findings.evaluations]
    return " \u00b7 ".join(dict.fromkeys(named))


_REFRESH_S = 30


def whole_document(
    body: Markup,
    heading: str,
    volumes: Mapping[str, CaseVolumes],
    gallery: Gallery,
    script: str | None,
    *,
    is_live: bool,
) -> str:
    """The HTML of a page with everything it needs: `body`, volumes by case id, and the `script` of their viewer."""
    scripts = [asset("page.js")]
    stores: list[Markup] = []
    if volumes:
        scripts.append(asset("viewer.js"))
        stores = _stores(volumes, gallery, script or "")
    style = asset("page.css")
    policy = _policy(scripts, style)
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("noscript", element("meta", http_equiv="refresh", content=_REFRESH_S)) if is_live else None,
        element("title", heading),
        element("style", Markup(style)),
    ]
    running = (element("script", Markup(text)) for text in scripts)
    page = element("html", element("head", *head), element("body", body, *stores, *running), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _stores(volumes: Mapping[str, CaseVolumes], gallery: Gallery, script: str) -> list[Markup]:
    """What the viewer needs, as data that no browser runs: NiiVue, the volumes, and how to show them."""
    cases = [
        {"id": case_id, "key": f"v{position}", **dict(case.facts)}
        for position, (case_id, case) in enumerate(volumes.items())
    ]
    facts = {"labels": _colours(gallery.colours()), "differences": _colours(DIFFERENCES), "cases": cases}
    stores = [
        element("script", Markup(script), type="application/octet-stream", id="viewer-module"),
        element("script", json_for_script(facts), type="application/json", id="viewer-facts"),
    ]
    for position, case in enumerate(volumes.values()):
        for layer, text in case.layers.items():
            key = f"v{position}-{layer}"
            stores.append(element("script", Markup(text), type="application/octet-stream", id=key))
    return stores


def _colours(labels: Mapping[int, tuple[str, str]]) -> dict[str, dict[str, str]]:
    return {str(value): {"name": name, "colour": colour} for value, (name, colour) in labels.items()}


def _policy(scripts: Sequence[str], style: str) -> str:
    """Nothing from anywhere: only these scripts and this style, pictures in the page, and the viewer's own blobs."""
    allowed = " ".join(_digest(script) for script in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": f"{allowed} blob:",
        "style-src": _digest(style),
        "img-src": "data: blob:",
        "connect-src": "blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def asset(name: str) -> str:
    """The text of a file in `assets`."""
    return resources.files("segkit.report").joinpath("assets", name).read_text(encoding="utf-8")
