"""The predictor of a MONAI bundle: prepared by MONAI's own transforms, brought back by their inverse.

Where no transform changes the grid, logits are decoded slab by slab as for any model. Else the whole case is computed
first, and each output, or the label map, is brought back to the grid of the input by MONAI's `Invertd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from segkit.checkpoint.card import BundleCard
from segkit.errors import DataError, RequestError
from segkit.inference.decode import decode_prepared, logits_of, probabilities
from segkit.inference.predictor import Predictor, Stage
from segkit.inference.scans import Prediction
from segkit.inference.sliding_window import Logits, Slab, WindowPlan
from segkit.labels import LabelScheme
from segkit.preparing.preprocessing import LoadedCase, Preparation, PreparedCase
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid

_MOST_VOXELS = 2**31
_HALF = 6e-8
"""The sigmoid of logits above minus this is at least 0.5 in float32; MONAI paints 0.5, `decode` logits above 0."""


def require_alone(folders: Sequence[Path], *, uses_tta: bool) -> None:
    """RequestError for options that a MONAI bundle does not have."""
    if len(folders) > 1:
        raise RequestError(
            f"a MONAI bundle cannot be part of an ensemble of {len(folders)} models",
            remedy="Run the models one by one, each with its own output folder",
        )
    if uses_tta:
        raise RequestError(
            "a MONAI bundle does not say along which axes its training mirrored", where=folders[0], remedy="Omit --tta"
        )


@dataclass(frozen=True)
class BundleCase(PreparedCase):
    """A case that MONAI prepared; `image` is the data of `transformed`, whose trace is needed for the way back."""

    transformed: Any = field(default=None, repr=False)
    """`MetaTensor` (C, *prepared) with the operations that were applied."""
    pipeline: Any = field(default=None, repr=False)
    """The `Compose` that applied them."""


@dataclass(frozen=True, eq=False)
class BundlePredictor(Predictor):
    """The predictor of a card with a `bundle`."""

    @property
    def bundle(self) -> BundleCard:
        """That part of the card."""
        return cast(BundleCard, self.card.bundle)

    @property
    def identity(self) -> str:
        """Also the digest of the configuration."""
        return f"{super().identity}+{self.bundle.sha256[:8]}"

    @property
    def is_moved(self) -> bool:
        """Whether a transform changes the grid."""
        from segkit.preparing.monai_transforms import has_spatial_transforms

        return has_spatial_transforms(self.bundle.transforms)

    def _prepared(self, loaded: LoadedCase) -> PreparedCase:
        """Apply the transforms of the bundle; `preparation` is that of the source grid, to which `slabs` returns."""
        import torch
        from monai.data import MetaTensor

        from segkit.preparing.monai_transforms import IMAGE, build_preparation

        grid, pipeline = loaded.grid, build_preparation(self.bundle.transforms)
        if prod(shape := self.prepared_shape(grid)) > _MOST_VOXELS:
            where, remedy = grid.source or loaded.id, "Check the spacing in the header"
            raise DataError(f"resampling gives {shape} voxels", where=where, expected="a usual spacing", remedy=remedy)
        image = MetaTensor(torch.from_numpy(loaded.image), affine=torch.from_numpy(grid.affine))
        made = pipeline({IMAGE: image})[IMAGE]
        turn = reorientation_to(grid, "IJK")
        preparation = Preparation(grid, turn, ((0,) * 3, grid.shape), grid.shape, grid.spacing_mm)
        array = np.ascontiguousarray(made.numpy(), np.float32)
        return BundleCase(loaded.id, array, None, preparation, transformed=made, pipeline=pipeline)

    def plan(self, shape: Sequence[int], axis: int | None = None) -> WindowPlan:
        """The windows over a prepared volume (*spatial), blended as the bundle does."""
        return replace(super().plan(shape, axis), blending=self.bundle.blending, padding=self.bundle.padding)

    def predict_prepared(
        self,
        prepared: PreparedCase,
        scheme: LabelScheme | None = None,
        *,
        with_probabilities: bool = False,
        with_uncertainty: bool = False,
        stage: Stage = nullcontext,
    ) -> Prediction:
        """See `Predictor.predict_prepared`.

        Raises:
            DataError: maps of a bundle that brings back labels.
        """
        maps = {"with_probabilities": with_probabilities, "with_uncertainty": with_uncertainty}
        if self.bundle.restores != "labels" or not self.is_moved:
            return super().predict_prepared(prepared, scheme, **maps, stage=stage)
        if any(maps.values()):
            found = "this bundle brings labels back to the grid of the scan, not probabilities"
            raise DataError(found, where=prepared.id, remedy="Omit --save-probabilities and --uncertainty")
        with stage("predict"):
            values = self.values(scheme or self.scheme)
            labels = decode_prepared(super().slabs(prepared), prepared.image.shape[1:], "softmax", values)
        with stage("decode"):
            restored = self._inverted(prepared, labels.astype(np.float32), is_nearest=True).astype(np.uint8)
        return Prediction(restored, prepared.preparation.source_grid, scheme or self.scheme)

    def slabs(self, prepared: PreparedCase, axis: int | None = None) -> Iterator[Slab]:
        """Logits (K, *source) float32 on the grid of the input."""
        slabs = super().slabs(prepared, axis)
        if self.is_moved:
            slabs = self._restored(prepared, slabs)
        if self.segmentation.activation == "softmax":
            return slabs
        return (replace(slab, values=slab.values + _HALF) for slab in slabs)

    def restoring_bytes(self, shape: Sequence[int], grid: Grid) -> int:
        """Probabilities on both grids, or labels; with the copies of one output that resampling makes in float64."""
        outputs = 1 if self.bundle.restores == "labels" else len(self.card.outputs)
        voxels = prod(shape) + prod(grid.shape)
        return (4 * outputs + 24) * voxels if self.is_moved else 0

    def _restored(self, prepared: PreparedCase, slabs: Iterator[Slab]) -> Iterator[Slab]:
        activation, uses_logits = self.segmentation.activation, self.bundle.restores == "logits"
        planes = np.empty((len(self.card.outputs), *prepared.image.shape[1:]), np.float32)
        for slab in slabs:
            planes[(slice(None), *slab.index)] = slab.logits if uses_logits else probabilities(slab.logits, activation)
        restored = np.stack([self._inverted(prepared, plane, is_nearest=False) for plane in planes])
        yield Slab(0, 0, restored.shape[1], restored if uses_logits else logits_of(restored, activation))

    def _inverted(self, prepared: PreparedCase, plane: NDArray[np.float32], *, is_nearest: bool) -> Logits:
        """A map (*prepared) on the grid of the input, (*source), by MONAI's `Invertd`."""
        import torch
        from monai.data import MetaTensor
        from monai.transforms import Invertd

        from segkit.preparing.monai_transforms import IMAGE

        case = cast(BundleCase, prepared)
        invert = Invertd("map", case.pipeline, orig_keys=IMAGE, nearest_interp=is_nearest)
        inverted = invert({"map": MetaTensor(torch.from_numpy(plane[None])), IMAGE: case.transformed})["map"]
        return np.asarray(inverted[0].numpy(), np.float32)
