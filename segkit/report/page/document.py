"""A page as one HTML document: its head, its scripts, the data of the viewer, and the policy that forbids the rest."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources

from segkit.report.page.html import Markup, element, json_for_script
from segkit.report.page.images import Gallery
from segkit.report.page.viewer import DIFFERENCES, CaseVolumes

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
    return resources.files("segkit.report.page").joinpath("assets", name).read_text(encoding="utf-8")
