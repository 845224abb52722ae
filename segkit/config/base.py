"""The base of every configuration class.

Configuration classes live beside what they configure; their defaults are the product's defaults, and each field's
description is what `segkit config show` prints above it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, strict set of named settings; unknown keys are refused, and numbers that are none.

    A field whose value is None is decided by planning, which records what it chose and why.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
