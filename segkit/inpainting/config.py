"""The settings of an inpainting run: what a YAML file or `--set` can say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from segkit.config import Config
from segkit.losses.restoration import RestorationConfig
from segkit.preparing.holes import HolesConfig
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.training.config import LoopConfig, NetworkConfig, OptimiserConfig, RunConfig


class PatchesConfig(Config):
    """What is cut from the cases, and how it is changed."""

    size: int | tuple[int, ...] | None = None
    """Voxels of a patch along each axis; None is 64 for volumes and 256 for pictures and slices."""
    mirror_axes: tuple[int, ...] | None = None
    """Axes along which half of the patches are mirrored; None is left and right: the first of a volume in RAS, the
    second of a picture."""
    gain: float = Field(default=0.1, ge=0)
    """Standard deviation of the random factor, around 1, of the intensities of tissue."""
    shift: float = Field(default=0.1, ge=0)
    """Standard deviation of the random offset of the intensities of tissue, which have the deviation 1."""


class AdversarialConfig(Config):
    """A discriminator that learns, beside the network, to distinguish filled images from real ones."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of its verdict in the network's loss; 0 builds none, 0.1 is the released code of region normalisation."""
    width: int = Field(default=64, ge=1)
    """Channels of the discriminator's first layer."""


class InpaintingConfig(RunConfig):
    """A whole inpainting run."""

    method: Literal["inpainting"] = "inpainting"
    """What distinguishes this file from those of the other methods of `segkit pretrain`."""
    network: NetworkConfig = NetworkConfig(family="inpainter", size="small", arguments={"context": "mirror"})
    preprocessing: PreprocessingConfig = PreprocessingConfig(normalisation="scale-nonzero", crop="nonzero")
    optimiser: OptimiserConfig = OptimiserConfig()
    training: LoopConfig = LoopConfig(steps=20_000)
    modalities: tuple[str, ...] | None = None
    """Modalities to restore, jointly; None is all that the cases have."""
    dims: Literal[2, 3] | None = None
    """3: patches of volumes; 2: pictures, or patches of the axial slices of volumes; None is that of the data, and 2
    where the network is one for images."""
    patches: PatchesConfig = PatchesConfig()
    batch_size: int = Field(default=2, ge=1)
    """Patches of a step."""
    holes: HolesConfig = HolesConfig()
    spares_marked: bool = True
    """What references mark is not healthy: no hole touches it. False does not look at references, which mark healthy
    tissue, too, in data such as organs or parts of the brain."""
    hidden_lesions: float = Field(default=0.5, ge=0, le=1)
    """Part of the patches in which what the reference marks, with its margin, is missing too, as it is in scans whose
    lesions are to be filled; it never counts in the loss. Where the image has nothing there it always is."""
    loss: RestorationConfig = RestorationConfig()
    supervision: float = Field(default=0.1, ge=0)
    """Weight of the loss by which RN-L learns where the hole is, with network.arguments.learning=supervised."""
    adversarial: AdversarialConfig = AdversarialConfig()
    validation_holes: int = Field(default=24, ge=1)
    """Holes in images of held-out patients that are filled to choose the best weights."""
