"""The settings of an inpainting run, as a YAML file or `--set` gives them."""

from typing import Literal

from pydantic import Field

from segkit.checkpoint.card import Fill
from segkit.config import Config
from segkit.losses.restoration import RestorationConfig
from segkit.preparing.holes import HolesConfig
from segkit.preparing.preprocessing import PreprocessingConfig
from segkit.training.config import LoopConfig, NetworkConfig, OptimiserConfig, RunConfig


class PatchesConfig(Config):
    """Training patches and their augmentation."""

    size: int | tuple[int, ...] | None = None
    """Voxels of a patch along each axis; None: 64 for volumes, 256 for pictures and slices."""
    mirror_axes: tuple[int, ...] | None = None
    """Axes along which half of the patches are mirrored; None: left-right, the first axis of a volume in RAS, the
    second of a picture."""
    gain: float = Field(default=0.1, ge=0)
    """Standard deviation of the random factor, around 1, of the intensities of tissue."""
    shift: float = Field(default=0.1, ge=0)
    """Standard deviation of the random offset of the intensities of tissue, whose standard deviation is 1."""


class AdversarialConfig(Config):
    """A discriminator of filled and real images, trained together with the network."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the adversarial loss; 0: no discriminator; 0.1: as in the released code of region normalisation. The
    loss, spectral norm and `width` are as released too; the optimiser is ours: one AdamW with the settings of
    `optimiser` for both networks, where the released code has Adam with betas of 0 and 0.9 and a tenth of the learning
    rate for the discriminator."""
    width: int = Field(default=64, ge=1)
    """Channels of the discriminator's first layer."""


class InpaintingConfig(RunConfig):
    """The settings of `segkit pretrain --method inpainting`."""

    method: Literal["inpainting"] = "inpainting"
    """The method of `segkit pretrain`."""
    network: NetworkConfig = NetworkConfig(family="inpainter", size="small", arguments={"context": "mirror"})
    preprocessing: PreprocessingConfig = PreprocessingConfig(normalisation="scale-nonzero", crop="nonzero")
    optimiser: OptimiserConfig = OptimiserConfig()
    training: LoopConfig = LoopConfig(steps=20_000)
    modalities: tuple[str, ...] | None = None
    """Modalities to fill jointly; None: all of the cases."""
    dims: Literal[2, 3] | None = None
    """3: patches of volumes; 2: pictures, or patches of axial slices of volumes; None: 2 for networks for images, else
    that of the data."""
    patches: PatchesConfig = PatchesConfig()
    batch_size: int = Field(default=2, ge=1)
    """Patches of a step."""
    holes: HolesConfig = HolesConfig()
    fill: Fill = "biharmonic"
    """What the network sees in a hole. constant: 0, a constant as in the paper of region normalisation; biharmonic: a
    smooth fill; mirrored-detail: that with a share of the detail that the mirrored image has there (heads only)."""
    spares_marked: bool = True
    """Whether labelled voxels of references are not healthy, so that no hole touches them. False ignores references,
    for data in which they label healthy tissue such as organs or parts of the brain."""
    hidden_lesions: float = Field(default=0.5, ge=0, le=1)
    """Share of patches in which the labelled voxels, with a margin, are missing too, as in scans whose lesions are to
    be filled; they never count in the loss. Labelled voxels without image content are always missing."""
    loss: RestorationConfig = RestorationConfig()
    supervision: float = Field(default=1.0, ge=0)
    """Weight of the loss of RN-L for the position of the hole, with network.arguments.learning=supervised. On a toy
    with constant holes 0.1 was too little for 200 steps."""
    adversarial: AdversarialConfig = AdversarialConfig()
    validation_holes: int = Field(default=24, ge=1)
    """Holes in images of held-out patients that choose the best weights."""
