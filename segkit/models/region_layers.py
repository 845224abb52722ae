"""The two layers of region normalisation (Yu et al. 2020, arXiv 1911.10375), in 2D and 3D.

RN-B, for the encoder, gets the regions of the image, resized to its map. RN-L, for the decoder, detects a region,
because after some layers the border of the hole has moved: the mean and the largest of the channels of a voxel are
convolved to a response from 0 to 1; voxels with at least `threshold` are one region, all others the other. Regions are
0 valid and 1 hole, or 0 background, 1 valid and 2 hole: on one voxel of a small map the larger number can win.

The threshold passes no gradient to the response. A straight-through gradient does not help: while no voxel is in the
region, both regions have the same moments and moving a voxel changes nothing; later it follows whatever lowers the
loss. On a toy it took as much of the rest as of the hole. `detected_shares` measures what a trained layer detects.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from segkit.models.blocks import convolution
from segkit.models.kernels.region_norm import Rule, masks_of, normalise_regions, pool_channels

Learning = Literal["affine", "supervised"]
"""What trains RN-L's response: the voxel-wise affine that is computed from it, as in the released code, which does not
make it find the hole; or also a loss of its own against the true hole."""


class RegionNormBasic(nn.Module):
    """RN-B: region norm with a scale 1 + gamma and a shift beta per region and channel, all of them 0 at first.

    `paper_affine` gives each region its own shift; without it all shifts are added everywhere, as in the released code.
    `keeps_thin` resizes regions so that a thin hole stays a hole; nearest neighbours can miss it.
    """

    def __init__(
        self,
        channels: int,
        regions: int = 2,
        *,
        rule: Rule | None = None,
        paper_affine: bool = True,
        keeps_thin: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(regions, channels))
        self.beta = nn.Parameter(torch.zeros(regions, channels))
        self.rule = rule or Rule()
        self.paper_affine = paper_affine
        self.keeps_thin = keeps_thin

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape; `regions` (B, 1, *) of any size, booleans or whole numbers.

        Raises:
            ValueError: the regions do not go with x.
        """
        masks = masks_of(x, resize_regions(regions, x.shape[2:], keeps_thin=self.keeps_thin), len(self.gamma))
        beta = self.beta if self.paper_affine else self.beta.sum(0, keepdim=True).expand_as(self.beta)
        return normalise_regions(x, masks, masks, 1 + self.gamma.transpose(0, 1), beta.transpose(0, 1), self.rule)


class RegionNormLearnable(nn.Module):
    """RN-L: region norm of a region that the layer detects, with scale 1 + gamma and shift beta per voxel.

    Gamma and beta are convolutions of the response, one map for all channels. While no voxel reaches the threshold, as
    at first, the layer is instance (or batch) norm. The region is the hole only as far as training made it so, see
    `Learning`.
    """

    def __init__(
        self,
        dims: int,
        *,
        kernel: int | None = None,
        threshold: float = 0.8,
        learning: Learning = "affine",
        rule: Rule | None = None,
    ) -> None:
        super().__init__()
        if learning not in get_args(Learning):
            raise ValueError(f"learning {learning!r} is not one of {', '.join(get_args(Learning))}")
        kernel = kernel or {2: 7, 3: 3}[dims]
        self.detector = convolution(dims, 2, 1, kernel, bias=False)
        self.affine = convolution(dims, 1, 2, kernel)  # gamma, beta
        nn.init.zeros_(self.affine.get_parameter("bias"))
        self.threshold = threshold
        self.learning: Learning = learning
        self.rule = rule or Rule()
        self._logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same shape."""
        x, pooled = pool_channels(x)
        logits = self.detector(pooled)
        response = logits.sigmoid()
        sum_type = torch.promote_types(x.dtype, torch.float32)
        hole = (response >= self.threshold).flatten(2).to(sum_type)
        if self.training and self.learning == "supervised":
            self._logits = logits
        masks = torch.cat((1 - hole, hole), 1)
        gamma, beta = self.affine(response).flatten(2).to(sum_type).chunk(2, 1)
        weights = torch.cat((masks * (1 + gamma), beta), 1)
        gain = masks.new_ones(x.shape[1], 2)
        return normalise_regions(x, masks, weights, gain, torch.zeros_like(gain), self.rule)

    def supervise(self, hole: Tensor) -> Tensor:
        """Mean binary cross-entropy of the last training pass's response, to be added to the loss; once per pass.

        `hole` is (B, 1, *) of any size, 1 in the hole of the image, else 0.

        Raises:
            ValueError: `learning` is not "supervised", or there was no training pass since the last call.
        """
        if self._logits is None:
            found = f"no response of a training pass to supervise, with learning {self.learning!r}"
            raise ValueError(f"{found}; expected learning 'supervised' and a pass before each call")
        logits, self._logits = self._logits, None
        target = resize_regions(hole, logits.shape[2:]).to(torch.float32)
        return functional.binary_cross_entropy_with_logits(logits.float(), target)


@torch.no_grad()
def detected_shares(network: nn.Module, x: Tensor, hole: Tensor) -> dict[str, tuple[float, float]]:
    """The share of the hole, and of all other voxels, that each RN-L layer takes for the hole, by the layer's name.

    `x` is the input of the network, `hole` (B, 1, *) of any size, 1 in the hole, else 0, with both on each layer's map.
    """
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, layer: RegionNormLearnable, logits: Tensor) -> None:
        region = logits.sigmoid() >= layer.threshold
        is_hole = resize_regions(hole, region.shape[2:]) > 0
        found[name] = (float(region[is_hole].float().mean()), float(region[~is_hole].float().mean()))

    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, RegionNormLearnable)}
    handles = [
        layer.detector.register_forward_hook(lambda _, __, logits, name=name, layer=layer: note(name, layer, logits))
        for name, layer in layers.items()
    ]
    try:
        if layers:
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def resize_regions(regions: Tensor, size: torch.Size, *, keeps_thin: bool = False) -> Tensor:
    """Regions (B, 1, *) on a grid of another size, (B, 1, *size), of the same type.

    Each voxel gets the number of its nearest neighbour or, with `keeps_thin`, the largest number within it.
    """
    if regions.shape[2:] == size:
        return regions
    numbers = regions.float()
    if keeps_thin:
        steps = [int(old) // int(new) for old, new in zip(regions.shape[2:], size, strict=True)]
        if [int(new) * step for new, step in zip(size, steps, strict=True)] == list(regions.shape[2:]):
            pool = functional.max_pool2d if len(size) == 2 else functional.max_pool3d
            return pool(numbers, steps).to(regions.dtype)  # the same result, and ONNX has it
        adaptive = functional.adaptive_max_pool2d if len(size) == 2 else functional.adaptive_max_pool3d
        return adaptive(numbers, list(size)).to(regions.dtype)
    return functional.interpolate(numbers, list(size), mode="nearest").to(regions.dtype)
