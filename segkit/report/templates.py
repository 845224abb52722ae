"""The templates of the page in `assets`, and how scores are written in it.

All text that a template prints is escaped, unless a template made it: case ids, notes and error messages come from file
names and headers of unknown origin, and nothing of them may become markup, a script or an address that is loaded.
"""

import math
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from segkit.errors import printable
from segkit.metrics.registry import METRICS
from segkit.report.images import COLOURS

_DIGITS = {"mm": 2, "voxels": 2, "ml": 2, "lesions": 1}
"""Decimals by unit; shares have three."""


def render(name: str, **data: object) -> Markup:
    """The text of a template with these data; a name that the template uses and `data` lacks is an error."""
    return Markup(_environment().get_template(name).render(data))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("segkit.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    environment.filters["px"] = lambda value: f"{value:.1f}"
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def asset(name: str) -> Markup:
    """The text of a script or style in `assets`."""
    return Markup(resources.files("segkit.report").joinpath("assets", name).read_text(encoding="utf-8"))


def colour_class(position: int) -> str:
    """The class of the region at this position."""
    return f"c{position % len(COLOURS)}"


def metric_name(metric: str) -> str:
    """The heading of a metric."""
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def written(value: float | None, digits: int = 3) -> str:
    """A score as text."""
    if value is None:
        return "\u2013"
    return f"{value:.{digits}f}" if math.isfinite(value) else "\u221e"


def digits_of(metric: str) -> int:
    """The number of decimals of a metric."""
    return _DIGITS.get(METRICS[metric].unit if metric in METRICS else "", 3)
