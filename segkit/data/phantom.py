"""Phantoms: seeded volumes that look like small BraTS cases, to try, teach and test with where no data are at hand.

Contrasts follow a real case of BraTS 2021: for each sequence, how far each tissue lies from the mean of the brain in
units of the brain's standard deviation. Then come what scanners add: partial volume, texture, a bias field, Rician
noise and an intensity scale that differs from case to case and from sequence to sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.data.case import BRATS_MODALITIES
from segkit.data.phantom_anatomy import Tissue, TissueMap, add_cavity, draw_tissues
from segkit.errors import RequestError
from segkit.labels import SCHEMES, LabelScheme
from segkit.shapes import LabelMap

PHANTOM_SCHEME: LabelScheme = SCHEMES["brats2024"]
"""The label scheme of `Phantom.labels`: the one with a value for every tissue that a phantom may hold."""

MINIMUM_SIZE = 24
"""Below this many voxels the parts of a brain are thinner than a voxel."""

_LABELLED = {"OEDEMA": "ED", "NECROSIS": "NCR", "ENHANCING": "ET", "CAVITY": "RC"}

# Deviations from the mean of the brain, in standard deviations of the brain, by sequence.
_CONTRASTS: dict[Tissue, tuple[float, float, float, float]] = {
    #                         t1n   t1c   t2w   t2f
    Tissue.FLUID: (-2.2, -1.1, 3.0, -1.8),
    Tissue.GREY: (-0.3, -0.2, -0.1, 0.2),
    Tissue.WHITE: (0.9, 0.2, -0.5, -0.4),
    Tissue.HYPERINTENSITY: (0.4, 0.1, 0.4, 2.2),
    Tissue.VESSEL: (-0.3, 3.2, -0.9, -0.6),
    Tissue.CHOROID: (-1.0, 2.6, 1.9, 0.3),
    Tissue.OEDEMA: (-0.3, -0.2, 1.4, 2.0),
    Tissue.NECROSIS: (-1.0, -0.7, 2.1, 0.5),
    Tissue.ENHANCING: (0.2, 3.2, 1.2, 2.0),
    Tissue.CAVITY: (-2.0, -1.1, 2.8, -1.4),
}
_RELATIVE_DEVIATION = np.array([0.23, 0.44, 0.53, 0.44])  # of the brain, as a fraction of its mean, by sequence
_TYPICAL_MEAN = np.array([900.0, 1200.0, 650.0, 800.0])


@dataclass(frozen=True)
class Phantom:
    """One case: four skull-stripped sequences (D, H, W), int16, exactly 0 outside the brain, and its reference.

    Axes are in RAS order with a spacing of 1 mm; `labels` is in `PHANTOM_SCHEME`.
    """

    number: int
    images: Mapping[str, NDArray[np.int16]] = field(repr=False)
    labels: LabelMap = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels to the right, to the front and to the top."""
        return self.labels.shape

    @property
    def is_low_grade(self) -> bool:
        """Whether no part of the tumour enhances."""
        return not bool((self.labels == PHANTOM_SCHEME.values["ET"]).any())


def make_phantom(
    number: int,
    *,
    size: int = 64,
    seed: int = 0,
    low_grade_probability: float = 0.1,
    resection_probability: float = 0.0,
) -> Phantom:
    """The case that belongs to (seed, number), with (size, size, 0.8 size) voxels of 1 mm.

    With a `resection_probability` some cases have a resection cavity (RC) in place of part of the tumour core and are
    otherwise the same, voxel for voxel.

    Raises:
        RequestError: a size below `MINIMUM_SIZE`, a negative number or seed.
    """
    _refuse_impossible(number, size, seed)
    shape = (size, size, round(0.8 * size))
    # One stream per purpose: what is drawn for one never shifts what is drawn for another.
    streams = (np.random.default_rng((seed, number, stream)) for stream in range(4))
    grade, anatomy, surgery, scanner = streams
    tissues = draw_tissues(shape, anatomy, is_low_grade=bool(grade.random() < low_grade_probability))
    if surgery.random() < resection_probability:
        add_cavity(tissues, surgery)
    return Phantom(number, _scan(tissues, scanner), _label(tissues))


def _refuse_impossible(number: int, size: int, seed: int) -> None:
    if size < MINIMUM_SIZE:
        raise RequestError(f"phantoms of {size} voxels are too small", expected=f"a size of {MINIMUM_SIZE} or more")
    if number < 0 or seed < 0:
        raise RequestError(f"case {number} of seed {seed} does not exist", expected="neither to be negative")


def _label(tissues: TissueMap) -> LabelMap:
    lookup = np.zeros(len(Tissue), np.uint8)
    for tissue, name in _LABELLED.items():
        lookup[Tissue[tissue]] = PHANTOM_SCHEME.values[name]
    return lookup[tissues]


def _scan(tissues: TissueMap, generator: np.random.Generator) -> dict[str, NDArray[np.int16]]:
    """The four sequences of one scan session, each (D, H, W)."""
    contrasts = np.zeros((len(Tissue), len(BRATS_MODALITIES)))
    for tissue, values in _CONTRASTS.items():
        contrasts[tissue] = values
    contrasts += generator.normal(0, 0.12, contrasts.shape)  # no two patients and scanners agree
    contrasts[Tissue.NECROSIS] += generator.normal(0, 0.3, len(BRATS_MODALITIES))
    relative = 1 + _RELATIVE_DEVIATION * contrasts  # (tissues, sequences), fractions of the brain's mean
    means = _TYPICAL_MEAN * np.exp(generator.uniform(-0.7, 0.7, len(BRATS_MODALITIES)))
    brain = tissues != Tissue.BACKGROUND
    return {
        modality: _acquire(relative[:, channel][tissues], brain, means[channel], channel, generator)
        for channel, modality in enumerate(BRATS_MODALITIES)
    }


def _acquire(
    ideal: NDArray[np.float64], brain: NDArray[np.bool_], mean: float, channel: int, generator: np.random.Generator
) -> NDArray[np.int16]:
    """What a scanner makes of an ideal image (D, H, W) of mean 1."""
    deviation = _RELATIVE_DEVIATION[channel]
    # Partial volume: neighbours mix, but nothing leaks in from outside the brain.
    weights = ndimage.gaussian_filter(brain.astype(np.float64), 0.55)
    signal = ndimage.gaussian_filter(ideal * brain, 0.55) / np.maximum(weights, 1e-6)
    texture = ndimage.gaussian_filter(generator.standard_normal(brain.shape), 1.0)
    signal = signal + deviation * 0.22 * texture / texture.std()
    signal *= _bias_field(brain.shape, generator)
    sigma = 0.18 * deviation
    real, imaginary = generator.normal(0, sigma, (2, *brain.shape))
    magnitude = mean * np.hypot(signal + real, imaginary)
    # At least 1 inside: only background is 0, as after skull-stripping.
    return np.where(brain, np.clip(np.rint(magnitude), 1, 32767), 0).astype(np.int16)


def _bias_field(shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float64]:
    """A smooth gain (D, H, W) about 1: a quadratic function of position, up to some 10 % at the corners."""
    positions = np.meshgrid(*(np.linspace(-1, 1, count) for count in shape), indexing="ij", sparse=True)
    gain = np.zeros(shape)
    for position in positions:
        gain = gain + generator.normal(0, 0.04) * position + generator.normal(0, 0.03) * position**2
    return np.exp(gain)
