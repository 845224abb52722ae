"""The HTML of a page: elements that are safe by construction, sections, tables, legends, and how scores are written.

Text is escaped unless these functions made it: case ids, notes and error messages come from file names and headers that
anybody may have written, and nothing of them may become markup, a script or an address that is loaded.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import NamedTuple

from segkit.errors import printable
from segkit.metrics.registry import METRICS
from segkit.report.planes import COLOURS

_VOID = frozenset({"br", "img", "input", "link", "meta"})
_IN_SCRIPTS = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_DIGITS = {"mm": 2, "voxels": 2, "ml": 2, "lesions": 1}
"""Decimals by unit; shares have three."""


class Markup(str):
    """Text that is HTML already and is not escaped."""

    __slots__ = ()


Child = str | float | None
"""Content of an element: `Markup` as it is, other text escaped, None nothing."""


class Section(NamedTuple):
    """One part of a page: its heading, its id in the navigation, and its content."""

    title: str
    key: str
    content: Markup

    def to_html(self) -> Markup:
        """The part with its heading."""
        heading = element("h2", self.title, id=f"{self.key}-heading")
        return element("section", heading, self.content, id=self.key, aria_labelledby=f"{self.key}-heading")


def section(title: str, key: str, *children: Child) -> Section:
    """A part of the page with these children."""
    return Section(title, key, joined(children))


def escaped(value: object) -> Markup:
    """Any text for use between tags or in a quoted attribute; characters that are not `printable` become escapes."""
    return Markup(html.escape(printable(str(value)), quote=True))


def joined(children: Iterable[Child]) -> Markup:
    """Children one after the other."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escaped(child) for child in children if child is not None)
    )


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """One element, HTML or SVG.

    Attributes are written with underscores for hyphens (`aria_sort`), a trailing one where Python reserves the name
    (`class_`); True gives an attribute without a value, None and False leave it out.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.removesuffix("_").replace("_", "-")
        written.append(f" {attribute}" if value is True else f' {attribute}="{escaped(value)}"')
    start = f"<{name}{''.join(written)}>"
    return Markup(start) if name in _VOID else Markup(f"{start}{joined(children)}</{name}>")


def definitions(facts: Mapping[str, Child]) -> Markup:
    """A list of terms and their values; terms without a value are left out."""
    known = {term: fact for term, fact in facts.items() if fact not in (None, "")}
    rows = (element("div", element("dt", term), element("dd", fact)) for term, fact in known.items())
    return element("dl", *rows, class_="facts")


def details(summary: str, *children: Child) -> Markup:
    """Content that a reader opens."""
    return element("details", element("summary", summary), *children)


def plain_table(caption: str, columns: Iterable[Child], rows: Iterable[Iterable[Child]]) -> Markup:
    """A table whose first column names the row and whose other columns are numbers."""
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = [
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))
        for name, *cells in rows
    ]
    table = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body), class_="numbers"
    )
    return scrolling(table, caption)


def scrolling(table: Markup, label: str) -> Markup:
    """A table that scrolls sideways where it is wider than the window, with the keyboard too."""
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def colour_class(position: int) -> str:
    """The class of the region that comes at this position."""
    return f"c{position % len(COLOURS)}"


def swatch(class_: str) -> Markup:
    """A sample of the colour of a class."""
    return element("span", class_=f"swatch {class_}", aria_hidden="true")


def legend(classes: Mapping[str, str], lead: str = "") -> Markup:
    """Names (with the class of their colour) beside a sample of it; `lead` is a word before all."""
    items = (element("li", swatch(class_), name) for name, class_ in classes.items())
    return element("ul", element("li", lead) if lead else None, *items, class_="legend")


def label_legend(labels: Iterable[tuple[str, str]], lead: str = "") -> Markup:
    """The legend of labels by name and colour."""
    return legend({name: colour_class(COLOURS.index(colour)) for name, colour in labels}, lead)


def json_for_script(document: object) -> Markup:
    """JSON for the inside of a script element, where nothing can end the element early."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False)
    return Markup("".join(_IN_SCRIPTS.get(character, character) for character in text))


def asset(name: str) -> Markup:
    """The text of a file in `assets`."""
    return Markup(resources.files("segkit.report").joinpath("assets", name).read_text(encoding="utf-8"))


def metric_name(metric: str) -> str:
    """The heading of a metric."""
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def written(value: float | None, digits: int = 3) -> str:
    """A score as it stands in a table."""
    if value is None:
        return "\u2013"
    return f"{value:.{digits}f}" if math.isfinite(value) else "\u221e"


def digits_of(metric: str) -> int:
    """The number of decimals of a metric."""
    return _DIGITS.get(METRICS[metric].unit if metric in METRICS else "", 3)
