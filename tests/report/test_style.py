"""The colours of the page: whoever sees less must still read it."""

from __future__ import annotations

import re
from importlib import resources

import pytest

STYLE = resources.files("segkit.report").joinpath("assets", "page.css").read_text(encoding="utf-8")
SCHEMES = ("light", "dark", "print")


def colours(scheme: str) -> dict[str, str]:
    """The variables of a colour scheme; dark and print lie over light."""
    light, dark, printed = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{([^}]*)\}", STYLE)
    )
    return {"light": light, "dark": light | dark, "print": light | printed}[scheme]


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """From 1 to 21."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_of_what_wcag_gives_as_examples() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_from_every_ground(scheme: str) -> None:
    known = colours(scheme)
    grounds = [known[name] for name in ("page", "raised", "shade")]
    for text in ("ink", "muted", "accent", "alarm"):
        assert min(contrast(known[text], ground) for ground in grounds) >= 4.5, text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_have_an_edge_that_is_seen(scheme: str) -> None:
    known = colours(scheme)
    assert min(contrast(known["edge"], known[ground]) for ground in ("page", "raised")) >= 3
