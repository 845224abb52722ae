"""HTML that is safe by construction: text is escaped unless it was made by these functions.

Case ids, notes and error messages come from file names and headers that anybody may have written; nothing of them may
become markup, a script or an address that is loaded.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping

from segkit.errors import printable

_VOID = frozenset({"br", "img", "input", "link", "meta"})
_IN_SCRIPTS = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Markup(str):
    """Text that is HTML already and is passed on as it is."""

    __slots__ = ()


Child = str | float | None
"""What stands inside an element: `Markup` as it is, other text escaped, None nothing."""


def escaped(value: object) -> Markup:
    """Any text for use between tags or within a quoted attribute; what is not `printable` is told as there."""
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
    """A list of terms with what is known of each; terms of which nothing is known are left out."""
    known = {term: fact for term, fact in facts.items() if fact not in (None, "")}
    rows = (element("div", element("dt", term), element("dd", fact)) for term, fact in known.items())
    return element("dl", *rows, class_="facts")


def plain_table(caption: str, columns: Iterable[Child], rows: Iterable[Iterable[Child]]) -> Markup:
    """A table whose first column names the row and whose other columns are numbers."""
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = []
    for name, *cells in rows:
        body.append(element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells)))
    table = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body), class_="numbers"
    )
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def json_for_script(document: object) -> Markup:
    """JSON for the inside of a script element, where nothing can end the element early."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False)
    return Markup("".join(_IN_SCRIPTS.get(character, character) for character in text))
