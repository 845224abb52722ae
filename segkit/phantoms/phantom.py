"""Phantoms: seeded volumes that look like small BraTS cases with one glioma, for trials, teaching and tests.

A trained network must score well above `best_single_thresholds`, although those are chosen on the scored cases.

First a map of tissues is drawn. All sizes are fractions of the volume, so that a case looks alike at every size: a
*position* is from -1 to 1 along each axis, positive to the right, front and top. *Fields* are smooth random functions
of position. *Depth* is 0 on the surface of the brain and 1 at its centre. A brain also has tissues that no single
intensity separates from the tumour: white-matter hyperintensities (as bright on FLAIR as oedema), vessels and choroid
plexus (as bright on contrast-enhanced T1 as enhancing tumour) and cerebrospinal fluid (brighter on T2 than any tumour).

Then the sequences are simulated, with the contrasts of a real case of BraTS 2021, partial volume, texture, a bias
field, Rician noise and an intensity scale that differs between cases and sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segkit.errors import RequestError
from segkit.labels import SCHEMES, LabelScheme
from segkit.reading.case import BRATS_MODALITIES
from segkit.shapes import Image, LabelMap, Mask

Field = NDArray[np.float64]
"""Values at the voxels of a volume, (D, H, W), or broadcastable to it."""
TissueMap = NDArray[np.uint8]
"""Values of `Tissue`, (D, H, W)."""

PHANTOM_SCHEME: LabelScheme = SCHEMES["brats2024"]
"""The label scheme of `Phantom.labels`."""

MINIMUM_SIZE = 24
"""Below this many voxels the parts of a brain are thinner than a voxel."""

_BRAIN_RADII = (0.72, 0.92, 0.88)
"""Half axes of the brain as parts of the volume's: the proportions of SRI24 where the height is 0.8 of the width."""


class Tissue(IntEnum):
    """Tissues of a phantom."""

    BACKGROUND = 0
    FLUID = 1
    GREY = 2
    WHITE = 3
    HYPERINTENSITY = 4
    VESSEL = 5
    CHOROID = 6
    OEDEMA = 7
    NECROSIS = 8
    ENHANCING = 9
    CAVITY = 10


_LABELLED = {Tissue.OEDEMA: "ED", Tissue.NECROSIS: "NCR", Tissue.ENHANCING: "ET", Tissue.CAVITY: "RC"}

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

_CANDIDATES, _MARGIN = 512, 1e-3
"""Thresholds tried for the baseline, and how far beyond all intensities they reach, in standard deviations."""


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
        """Whether there is no enhancing tumour."""
        return not bool((self.labels == PHANTOM_SCHEME.values["ET"]).any())


def make_phantom(
    number: int,
    *,
    size: int = 64,
    seed: int = 0,
    low_grade_probability: float = 0.1,
    resection_probability: float = 0.0,
) -> Phantom:
    """The case of (seed, number), with (size, size, 0.8 size) voxels of 1 mm.

    With a `resection_probability` some cases have a resection cavity (RC) in place of part of the tumour core; all
    other voxels are the same. Raises RequestError for a size below `MINIMUM_SIZE`, a negative number or seed.
    """
    if size < MINIMUM_SIZE:
        raise RequestError(f"phantoms of {size} voxels are too small", expected=f"a size of {MINIMUM_SIZE} or more")
    if number < 0 or seed < 0:
        raise RequestError(f"case {number} of seed {seed} does not exist", expected="neither to be negative")
    shape = (size, size, round(0.8 * size))
    # One stream per purpose: what is drawn for one never shifts what is drawn for another.
    grade, anatomy, surgery, scanner = (np.random.default_rng((seed, number, stream)) for stream in range(4))
    tissues = _draw_tissues(shape, anatomy, is_low_grade=bool(grade.random() < low_grade_probability))
    if surgery.random() < resection_probability:
        _add_cavity(tissues, surgery)
    values = np.zeros(len(Tissue), np.uint8)
    for tissue, name in _LABELLED.items():
        values[tissue] = PHANTOM_SCHEME.values[name]
    return Phantom(number, _scan(tissues, scanner), values[tissues])


class _Space:
    """Positions of the voxel centres of a volume along its three axes, each shaped to broadcast to (D, H, W)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        x, y, z = (2 * (np.arange(count) + 0.5) / count - 1 for count in shape)
        self.x, self.y, self.z = x[:, None, None], y[None, :, None], z[None, None, :]

    def distance(self, centre: Sequence[float], radii: Sequence[float]) -> Field:
        """Distance from the centre of an ellipsoid as a multiple of its radii, (D, H, W): 1 on its surface."""
        offsets = zip((self.x, self.y, self.z), centre, radii, strict=True)
        squared: Field = sum(((axis - middle) / radius) ** 2 for axis, middle, radius in offsets)  # type: ignore[assignment]
        return np.sqrt(squared)

    def field(self, generator: np.random.Generator, cells: int) -> Field:
        """A smooth random field of mean 0 and deviation 1, (D, H, W), with about `cells` bumps along each axis."""
        lattice = generator.standard_normal((cells + 4, cells + 4, cells + 4))
        nodes = 2 * (np.arange(cells + 4) - 1.5) / cells - 1  # the outermost nodes lie beyond the edges of the volume
        for axis in (self.x, self.y, self.z):
            weights = np.exp(-0.5 * ((axis.ravel()[:, None] - nodes) * cells / 1.4) ** 2)
            # One axis in, one out: (nodes, b, c) -> (b, c, voxels). einsum, not BLAS: the same bits with any threads.
            lattice = np.einsum("nbc,vn->bcv", lattice, weights)
        standard: Field = (lattice - lattice.mean()) / lattice.std()
        return standard


def _draw_tissues(shape: tuple[int, int, int], generator: np.random.Generator, *, is_low_grade: bool) -> TissueMap:
    """A brain with one tumour, (D, H, W) in RAS order; in a low-grade tumour the core does not enhance."""
    space = _Space(shape)
    radii = [radius * generator.uniform(0.93, 1.0) for radius in _BRAIN_RADII]
    depth = 1 - space.distance((0, 0, 0), radii) * (1 + 0.03 * space.field(generator, 3))
    tissues = _draw_healthy(space, depth, generator)
    _add_lookalikes(tissues, space, depth, generator)
    _add_tumour(tissues, space, depth, generator, is_low_grade=is_low_grade)
    return tissues


def _add_cavity(tissues: TissueMap, generator: np.random.Generator) -> None:
    """Turn part of the tumour core into a resection cavity, in place."""
    core = np.isin(tissues, (Tissue.NECROSIS, Tissue.ENHANCING))
    inner = ndimage.distance_transform_edt(core)
    tissues[inner > inner.max() * generator.uniform(0.25, 0.5)] = Tissue.CAVITY


def _draw_healthy(space: _Space, depth: Field, generator: np.random.Generator) -> TissueMap:
    """White matter under a folded grey ribbon, deep grey nuclei, ventricles, sulci and the fissure between halves."""
    fold = np.abs(space.field(generator, 14))  # small where a sulcus runs
    ribbon = depth < 0.11 + 0.2 * np.exp(-((fold / 0.5) ** 2))
    tissues = np.where(ribbon, Tissue.GREY, Tissue.WHITE).astype(np.uint8)
    for side in (-1, 1):
        tissues[space.distance((0.24 * side, 0.04, -0.06), (0.1, 0.24, 0.2)) < 1] = Tissue.GREY

    is_sulcus = (fold < 0.24) & (depth < 0.16)
    is_fissure = (np.abs(space.x) < 0.025) & (depth < 0.3) & (space.z > -0.3)
    tissues[is_sulcus | is_fissure | _draw_ventricles(space, generator)] = Tissue.FLUID
    tissues[(depth < 0) | (is_sulcus & (depth < 0.04))] = Tissue.BACKGROUND
    return tissues


def _draw_ventricles(space: _Space, generator: np.random.Generator) -> Mask:
    """Two lateral ventricles that bend outward to the front and the back, and the third one between them."""
    width = generator.uniform(0.8, 1.4)
    mask: Mask = space.distance((0, -0.02, -0.12), (0.045, 0.16, 0.22)) < 1
    for side in (-1, 1):
        size = width * generator.uniform(0.9, 1.1)
        bent = space.x * side - 0.11 - 0.35 * space.y**2
        mask = mask | (
            (bent / (0.075 * size)) ** 2 + ((space.y + 0.03) / 0.42) ** 2 + ((space.z - 0.1) / 0.19) ** 2 < size
        )
    return mask


def _add_lookalikes(tissues: TissueMap, space: _Space, depth: Field, generator: np.random.Generator) -> None:
    """Add hyperintensities beside the ventricles, branching vessels, a sagittal sinus and choroid plexus."""
    ventricles = (tissues == Tissue.FLUID) & (depth > 0.3)
    voxels = ndimage.distance_transform_edt(~ventricles) / space.x.shape[0]
    patches = space.field(generator, 11)
    spread = patches + patches[::-1] - 14 * voxels  # symmetric, as such lesions mostly are, and denser near ventricles
    _fill(tissues, Tissue.HYPERINTENSITY, spread, tissues == Tissue.WHITE, generator.uniform(0.18, 0.28))

    plexus = space.field(generator, 12)
    _fill(tissues, Tissue.CHOROID, plexus, ventricles, generator.uniform(0.15, 0.3))
    # Two fields vanish together along curves: thickened, they are vessels.
    closeness = -np.hypot(space.field(generator, 8), space.field(generator, 8)) - 0.4 * depth
    _fill(tissues, Tissue.VESSEL, closeness, (tissues != Tissue.BACKGROUND), generator.uniform(0.025, 0.04))
    is_sinus = (np.abs(space.x) < 0.04) & (depth < 0.09) & (space.z > -0.2) & (space.y < 0.6)
    tissues[is_sinus & (tissues != Tissue.BACKGROUND)] = Tissue.VESSEL


def _fill(tissues: TissueMap, tissue: Tissue, field: Field, where: Mask, fraction: float) -> None:
    """Give `tissue` to the `fraction` of the voxels of `where` at which `field` is largest."""
    if where.any():
        tissues[where & (field > np.quantile(field[where], 1 - fraction))] = tissue


def _add_tumour(
    tissues: TissueMap, space: _Space, depth: Field, generator: np.random.Generator, *, is_low_grade: bool
) -> None:
    """Add oedema, not in fluid or most of the cortex, around an enhancing rim around a necrotic core."""
    side = generator.choice((-1, 1))
    centre = (side * generator.uniform(0.26, 0.4), generator.uniform(-0.42, 0.42), generator.uniform(-0.2, 0.4))
    scale = generator.uniform(0.2, 0.27)
    radii = (scale * generator.uniform(0.85, 1.15), scale * generator.uniform(0.85, 1.15), scale * 1.25)
    distance = space.distance(centre, radii)
    rough, lobes, rim = (space.field(generator, cells) for cells in (12, 6, 9))

    bumpy = distance * (1 + 0.15 * lobes + 0.08 * rough)
    core = bumpy < 1
    necrosis = bumpy < 0.66 + 0.12 * np.clip(rim, -2, 1.8)
    reach = generator.uniform(1.3, 1.55)
    fingers = distance * (1 + 0.2 * lobes - 0.1 * rough) < reach - 0.25 * (tissues == Tissue.GREY)
    swollen = fingers & (tissues != Tissue.FLUID) & (tissues != Tissue.CHOROID)

    is_brain = (tissues != Tissue.BACKGROUND) & (depth > 0.03)
    tissues[swollen & is_brain] = Tissue.OEDEMA
    tissues[core & is_brain] = Tissue.NECROSIS if is_low_grade else Tissue.ENHANCING
    tissues[necrosis & is_brain] = Tissue.NECROSIS


def _scan(tissues: TissueMap, generator: np.random.Generator) -> dict[str, NDArray[np.int16]]:
    """The four sequences of one session, each (D, H, W)."""
    contrasts = np.zeros((len(Tissue), len(BRATS_MODALITIES)))
    for tissue, values in _CONTRASTS.items():
        contrasts[tissue] = values
    contrasts += generator.normal(0, 0.12, contrasts.shape)  # patients and scanners differ
    contrasts[Tissue.NECROSIS] += generator.normal(0, 0.3, len(BRATS_MODALITIES))
    relative = 1 + _RELATIVE_DEVIATION * contrasts  # (tissues, sequences), fractions of the brain's mean
    means = _TYPICAL_MEAN * np.exp(generator.uniform(-0.7, 0.7, len(BRATS_MODALITIES)))
    brain = tissues != Tissue.BACKGROUND
    return {
        modality: _acquire(relative[:, channel][tissues], brain, means[channel], channel, generator)
        for channel, modality in enumerate(BRATS_MODALITIES)
    }


def _acquire(ideal: Field, brain: Mask, mean: float, channel: int, generator: np.random.Generator) -> NDArray[np.int16]:
    """The scanned image (D, H, W) of an ideal one with mean 1."""
    deviation = _RELATIVE_DEVIATION[channel]
    # Partial volume: neighbouring voxels mix, without those outside the brain.
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


def _bias_field(shape: tuple[int, ...], generator: np.random.Generator) -> Field:
    """A smooth gain (D, H, W) around 1: a quadratic function of position, up to some 10 % at the corners."""
    gain = np.zeros(shape)
    for position in np.meshgrid(*(np.linspace(-1, 1, count) for count in shape), indexing="ij", sparse=True):
        gain = gain + generator.normal(0, 0.04) * position + generator.normal(0, 0.03) * position**2
    return np.exp(gain)


class ThresholdScore(NamedTuple):
    """The best rule for a region: voxels of the brain whose intensity is above (">") or below ("<") `threshold`.

    `threshold` is in standard deviations from the mean of the brain; `dice` is the mean over cases, 0 to 1.
    """

    region: str
    modality: str
    direction: str
    threshold: float
    dice: float


def best_single_thresholds(
    images: Sequence[Image],
    labels: Sequence[LabelMap],
    *,
    modalities: Sequence[str],
    regions: Mapping[str, Sequence[int]],
) -> dict[str, ThresholdScore]:
    """For each region the one threshold on one sequence, in either direction, with the best mean Dice over all cases.

    Each image (C, D, H, W) is z-scored per sequence within its brain (voxels where any sequence is not 0); voxels
    outside the brain are never chosen. `regions` gives the label values of each region. Dice is 1 where both the
    region and the choice are empty. Raises RequestError where there are no cases, or not as many images as label maps.
    """
    if not images or len(images) != len(labels):
        found = f"{len(images)} images and {len(labels)} label maps cannot be compared"
        raise RequestError(found, expected="as many of each, not none")
    brains = [(image != 0).any(axis=0) for image in images]
    inside = [reference[brain] for reference, brain in zip(labels, brains, strict=True)]
    best: dict[str, ThresholdScore] = {}
    for channel, modality in enumerate(modalities):
        cases = [image[channel][brain].astype(np.float64) for image, brain in zip(images, brains, strict=True)]
        cases = [(values - values.mean()) / (values.std() + 1e-8) for values in cases]
        pooled = np.concatenate(cases)
        # The candidates include all voxels and none.
        thresholds = np.linspace(pooled.min() - _MARGIN, pooled.max() + _MARGIN, _CANDIDATES)
        for name, members in regions.items():
            targets = [np.isin(reference, members) for reference in inside]
            for direction, sign in ((">", 1), ("<", -1)):
                curves = [_dice_curve(v, t, thresholds, sign) for v, t in zip(cases, targets, strict=True)]
                dice = np.mean(curves, axis=0)
                place = int(dice.argmax())
                if name not in best or dice[place] > best[name].dice:
                    score = float(thresholds[place]), float(dice[place])
                    best[name] = ThresholdScore(name, modality, direction, *score)
    return best


def _dice_curve(
    values: NDArray[np.float64], target: NDArray[np.bool_], thresholds: NDArray[np.float64], sign: int
) -> NDArray[np.float64]:
    """Dice of `sign * values > sign * threshold` against `target` (N,) for each threshold, (T,)."""
    chosen, hits = (
        len(some) - np.searchsorted(np.sort(sign * some), sign * thresholds, side="right")
        for some in (values, values[target])
    )
    total = chosen + int(target.sum())
    return np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))
