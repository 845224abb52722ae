"""How things are called and written all over a page: sections, metrics, numbers, colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from segkit.metrics.registry import METRICS
from segkit.report.figures import COLOURS
from segkit.report.html import Child, Markup, element, joined
from segkit.report.sources import CaseFacts, Document, Findings, mapping

MOST_ROWS = 1000
"""Cases that a table has at most."""
_HEADLINES = ("dice", "hd95_mm", "nsd", "sensitivity", "precision", "auc")
"""Metrics that people compare, where the scores do not name their own."""
_DIGITS = {"mm": 2, "voxels": 2, "ml": 2, "lesions": 1}
"""Decimals by unit; shares have three."""


class Section(NamedTuple):
    """One part of a page: its heading, the id that the navigation leads to, and what it holds."""

    title: str
    key: str
    content: Markup

    def to_html(self) -> Markup:
        """The part with its heading."""
        heading = element("h2", self.title, id=f"{self.key}-heading")
        return element("section", heading, self.content, id=self.key, aria_labelledby=f"{self.key}-heading")


def section(title: str, key: str, *children: Child) -> Section:
    """A part of the page that holds these children."""
    return Section(title, key, joined(children))


def headline_metrics(findings: Findings) -> list[str]:
    """The metrics that people compare: those of the protocols by which was scored."""
    named = dict.fromkeys(metric for scored in findings.evaluations for metric in scored.document.headline)
    return list(named or _HEADLINES)


def shown_metrics(findings: Findings, cases: Sequence[CaseFacts]) -> list[str]:
    """The metrics of the cases in the order of tables: what people compare, then others that are known."""
    present = dict.fromkeys(name for case in cases for scores in case.regions.values() for name in scores)
    order = dict.fromkeys((*headline_metrics(findings), *METRICS, *present))
    return [metric for metric in order if metric in present]


def metric_name(metric: str) -> str:
    """How a metric is called in a heading."""
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def digits_of(metric: str) -> int:
    """How many decimals of a metric say something."""
    return _DIGITS.get(METRICS[metric].unit if metric in METRICS else "", 3)


def written(value: float | None, digits: int = 3) -> str:
    """A score as it stands in a table."""
    if value is None:
        return "\u2013"
    return f"{value:.{digits}f}" if math.isfinite(value) else "\u221e"


def colour_key(labels: Iterable[tuple[str, str]], lead: str = "") -> Markup:
    """The names of labels beside their colours; pairs of name and colour, `lead` says what they are."""
    items = (element("li", swatch(COLOURS.index(colour)), name) for name, colour in labels)
    return element("ul", element("li", lead) if lead else None, *items, class_="legend")


def swatch(position: int) -> Markup:
    """A sample of the colour of the region at this position."""
    return element("span", class_=f"swatch c{position % len(COLOURS)}", aria_hidden="true")


def model_name(manifest: Document) -> str:
    """The folders of the models that made the masks, without the way to them."""
    name = str(mapping(manifest, "model").get("name") or "")
    return ", ".join(part.replace("\\", "/").rstrip("/").split("/")[-1] for part in name.split(", "))
