"""Label schemes, regions, and the outputs of a network.

A *label scheme* maps tissue names to label values. BraTS has used several, and the same value means different tissues
in different years, so values are always kept with their scheme. A *region* is a union of tissues (WT, TC, ET ...). An
*output* is one channel of a network: the tissue values it covers and the value it paints when masks become a label map;
outputs are painted in order, later over earlier.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelScheme:
    """Tissue names with their label values, background (0) left out.

    `regions` lists (name, tissues, painted tissue) in painting order; empty means that each tissue is a class of its
    own (softmax), non-empty means nested regions (sigmoid). `ignore` is the value of voxels of unknown tissue (label
    "ignore" of nnU-Net): no output covers or paints it, and they have no part in sampling, loss and scores.
    """

    name: str
    values: Mapping[str, int]
    regions: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    ignore: int | None = None

    def __post_init__(self) -> None:
        if self.ignore is not None and self.ignore in {0, *self.values.values()}:
            raise ValueError(f"the ignored value {self.ignore} is also the value of a class")

    @property
    def has_regions(self) -> bool:
        """Whether outputs are nested regions (sigmoid) rather than exclusive classes (softmax)."""
        return bool(self.regions)

    @property
    def reference_values(self) -> set[int]:
        """The values that a reference may have, 0 and `ignore` included."""
        return {0, *self.values.values(), self.ignore or 0}

    def to_json(self) -> dict[str, object]:
        """Name, values and, if there is one, the ignored value; `scheme_from_json` is the inverse."""
        ignore = {} if self.ignore is None else {"ignore": self.ignore}
        return {"name": self.name, "labels": dict(self.values), **ignore}


@dataclass(frozen=True)
class Output:
    """One output channel: its name, the label value it paints, and the label values it covers."""

    name: str
    label: int
    members: tuple[int, ...]


_NESTED = (("WT", ("ED", "NCR", "ET"), "ED"), ("TC", ("NCR", "ET"), "NCR"), ("ET", ("ET",), "ET"))

SCHEMES: dict[str, LabelScheme] = {
    scheme.name: scheme
    for scheme in (
        LabelScheme(
            "brats2015",
            {"NCR": 1, "ED": 2, "NET": 3, "ET": 4},
            (("WT", ("ED", "NCR", "NET", "ET"), "ED"), ("TC", ("NCR", "NET", "ET"), "NCR"), ("ET", ("ET",), "ET")),
        ),
        LabelScheme("brats2017", {"NCR": 1, "ED": 2, "ET": 4}, _NESTED),
        LabelScheme("brats2023", {"NCR": 1, "ED": 2, "ET": 3}, _NESTED),
        LabelScheme("brats2024", {"NCR": 1, "ED": 2, "ET": 3, "RC": 4}, (*_NESTED, ("RC", ("RC",), "RC"))),
        LabelScheme("msd-brats", {"ED": 1, "NCR": 2, "ET": 3}, _NESTED),
        LabelScheme(
            "brats-ped",
            {"ET": 1, "NET": 2, "CC": 3, "ED": 4},
            (
                ("WT", ("ET", "NET", "CC", "ED"), "ED"),
                ("TC", ("ET", "NET", "CC"), "NET"),
                ("CC", ("CC",), "CC"),
                ("ET", ("ET",), "ET"),
            ),
        ),
        LabelScheme("brats-men-rt", {"GTV": 1}, (("GTV", ("GTV",), "GTV"),)),
    )
}
"""Every BraTS scheme by name: `brats2017` serves 2017 to 2022, FeTS and UPENN; `brats2023` serves GLI, SSA, MEN, MET
of 2023; `brats2024` the post-treatment gliomas and MET of 2024 and later; `msd-brats` the Decathlon's Task01."""

_STAND_INS = {"NET": "NCR"}
"""Non-enhancing tumour was folded into the necrotic core from 2017 on."""


def classes_scheme(name: str, values: Mapping[str, int], ignore: int | None = None) -> LabelScheme:
    """A scheme of exclusive classes, such as those a `dataset.json` names; background entries are dropped."""
    return LabelScheme(name, {tissue: value for tissue, value in values.items() if value != 0}, ignore=ignore)


def scheme_from_json(document: Mapping[str, object]) -> LabelScheme:
    """The scheme that `LabelScheme.to_json` wrote: a known name gives the known scheme, else exclusive classes."""
    name, labels, ignore = str(document["name"]), document["labels"], document.get("ignore")
    if ignore is not None and not isinstance(ignore, int):
        raise TypeError(f"`ignore` of label scheme {name!r} is {ignore!r}, not a label value")
    if name in SCHEMES:
        return SCHEMES[name] if ignore is None else replace(SCHEMES[name], ignore=ignore)
    if not isinstance(labels, Mapping):
        raise TypeError(f"`labels` of label scheme {name!r} is {labels!r}, not a mapping of names to values")
    return classes_scheme(name, {str(tissue): int(value) for tissue, value in labels.items()}, ignore)


def outputs_of(scheme: LabelScheme) -> tuple[Output, ...]:
    """The outputs a network needs for a scheme, in painting order.

    Nested regions give one sigmoid output each; exclusive classes give one softmax output each, background first.
    """
    if scheme.has_regions:
        return tuple(
            Output(name, scheme.values[paints], tuple(sorted(scheme.values[tissue] for tissue in tissues)))
            for name, tissues, paints in scheme.regions
        )
    classes = sorted(scheme.values.items(), key=lambda item: item[1])
    return (Output("background", 0, (0,)), *(Output(name, value, (value,)) for name, value in classes))


def translation(source: LabelScheme, target: LabelScheme) -> dict[int, int]:
    """Label value of `source` to label value of `target` by tissue name; tissues `target` lacks go to 0.

    Non-enhancing tumour becomes the necrotic core where the target has no class of its own for it. Ignored voxels stay
    so, with their value if `target` has none for them.
    """
    table = {0: 0}
    if source.ignore is not None:
        table[source.ignore] = source.ignore if target.ignore is None else target.ignore
    for tissue, value in source.values.items():
        stand_in = _STAND_INS.get(tissue, tissue)
        table[value] = target.values.get(tissue, target.values.get(stand_in, 0))
    return table


def translate(labels: NDArray[np.uint8], source: LabelScheme, target: LabelScheme) -> NDArray[np.uint8]:
    """A label map of `source` in the values of `target`; values that `source` does not know become 0."""
    lookup = np.zeros(256, np.uint8)
    for old, new in translation(source, target).items():
        lookup[old] = new
    return lookup[labels]


def without_ignored(labels: NDArray[np.uint8], scheme: LabelScheme | None) -> NDArray[np.uint8]:
    """The label map with 0 in place of ignored voxels, to be shown."""
    if scheme is None or scheme.ignore is None:
        return labels
    return np.where(labels == scheme.ignore, np.uint8(0), labels)


def painted_values(outputs: Iterable[Output], source: LabelScheme, target: LabelScheme) -> list[int]:
    """The values that `outputs`, defined in `source`, paint when the mask is written in `target`."""
    table = translation(source, target)
    return [table[output.label] for output in outputs]
