"""A vision transformer of the Segment Anything kind, with a light decoder, for images and for slices of volumes.

The encoder is the image encoder of Kirillov et al. 2023 (arXiv 2304.02643, appendix A; after ViTDet, Li et al. 2022)
without absolute position embedding, as LVM-Med publishes it: patches of 16 x 16 pixels become tokens, most blocks
attend inside windows, some globally, each with decomposed relative positions, and a convolutional neck reduces the
channels. Below "encoder." the state-dict names are those of the public ImageEncoderViT.

The decoder is segkit's own: four transposed convolutions back to full resolution, where a convolution of the image adds
fine detail.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from segkit.models.blocks import Mode, SegmentationNetwork, SlicewiseConfig, checkpointed, convolution, group_norm
from segkit.models.kernels.convolutions import pointwise, step_up

REFERENCE = "Kirillov et al. 2023, arXiv 2304.02643; LVM-Med, arXiv 2306.11925; our decoder"

_PATCH = 16  # pixels of a token's side, part of the published weights
_EPSILON = 1e-6  # of every layer norm of the published encoder


class VitConfig(SlicewiseConfig):
    """Sizes of the transformer; a token is a patch of 16 x 16 pixels."""

    width: int = Field(default=768, ge=1)
    """Channels of a token."""
    depth: int = Field(default=12, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=12, ge=1)
    """Attention heads."""
    window: int = Field(default=14, ge=1)
    """Side of the attention windows in tokens."""
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks that attend to the whole image, counted from 0."""
    image_size: int = Field(default=1024, ge=_PATCH)
    """Side in pixels for which the position tables of global blocks are stored; they are interpolated for others."""
    neck: int = Field(default=256, ge=1)
    """Channels of the encoder's result."""
    decoder_widths: tuple[int, int, int, int] = (128, 64, 32, 16)
    """Channels of the decoder at 1/8, 1/4, 1/2 and full resolution."""
    mode: Mode = "plain"
    """Memory mode: keep every activation, or one per transformer block; weights and results are the same."""

    @model_validator(mode="after")
    def _agrees(self) -> VitConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.image_size % _PATCH:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {_PATCH}")
        if any(not 0 <= block < self.depth for block in self.global_blocks):
            raise ValueError(f"global_blocks {self.global_blocks} are not all among blocks 0 to {self.depth - 1}")
        if min(self.decoder_widths) < 2:
            raise ValueError("decoder_widths are at least 2")
        return self


SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "width": 96,
        "depth": 4,
        "heads": 3,
        "window": 7,
        "global_blocks": (1, 3),
        "image_size": 256,
        "neck": 64,
        "decoder_widths": (48, 32, 24, 16),
    },
    "base": {},
}


def build_vit(config: VitConfig, in_channels: int, out_channels: int, dims: int) -> SegmentationNetwork:
    """The network for images (B, in_channels, H, W), or its slice-wise form for volumes."""
    return config.applied_to(VitNetwork(config, config.image_channels(in_channels, dims), out_channels), dims)


class RelativeAttention(nn.Module):
    """Multi-head attention over a map of tokens, with a relative position bias that is the sum of one per axis.

    The bias of query q (before scaling) at (y, x) towards the key at (y', x') is q . rel_pos_h[y - y'] +
    q . rel_pos_w[x - x'], the tables counted from the most negative distance on. They are stored for maps of `side`
    tokens and interpolated linearly for others.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, width) to the same shape."""
        batch, height, width, _ = x.shape
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, H, W, 3, heads, c)
        query, key, value = parts.permute(3, 0, 4, 1, 2, 5).unbind(0)  # (B, heads, H, W, c) each
        rows = torch.einsum("bnhwc,hkc->bnhwk", query, relative_positions(self.rel_pos_h, height))
        columns = torch.einsum("bnhwc,wkc->bnhwk", query, relative_positions(self.rel_pos_w, width))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)  # (B, heads, H * W, H * W)
        query, key, value = (part.flatten(2, 3) for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return cast(Tensor, self.proj(attended.transpose(1, 2).reshape(batch, height, width, -1)))


def relative_positions(table: Tensor, side: int) -> Tensor:
    """The table (rows, c) at every pair of `side` positions: (side, side, c), entry [q, k] for the distance q - k."""
    rows = 2 * side - 1
    if len(table) != rows:
        table = functional.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)[0].T
    positions = torch.arange(side, device=table.device)
    return table[positions[:, None] - positions + side - 1]


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a layer norm and added to the stream; window 0 attends globally.

    Maps that windows do not tile are padded with zeros, which take part in attention, as in the published training.
    """

    def __init__(self, width: int, heads: int, window: int, tokens: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=_EPSILON)
        self.attn = RelativeAttention(width, heads, window or tokens)
        self.norm2 = nn.LayerNorm(width, eps=_EPSILON)
        # The published names.
        layers = {"lin1": nn.Linear(width, 4 * width), "act": nn.GELU(), "lin2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, width) to the same shape."""
        tokens = self.norm1(x)
        x = x + (attend_in_windows(self.attn, tokens, self.window) if self.window else self.attn(tokens))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


def attend_in_windows(attention: nn.Module, x: Tensor, window: int) -> Tensor:
    """`attention` inside each window of `window` x `window` tokens of (B, H, W, width)."""
    batch, height, width, _ = x.shape
    x = functional.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(batch, rows, window, columns, window, -1).transpose(2, 3)
    x = attention(x.flatten(0, 2)).view(batch, rows, columns, window, window, -1)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows * window, columns * window, width)
    return x[:, :height, :width]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W), at each pixel by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VitEncoder(nn.Module):
    """Patch embedding, transformer blocks, convolutional neck; names as in the public ImageEncoderViT."""

    def __init__(self, config: VitConfig, in_channels: int) -> None:
        super().__init__()
        tokens = config.image_size // _PATCH
        blocks = [
            TransformerBlock(config.width, config.heads, 0 if index in config.global_blocks else config.window, tokens)
            for index in range(config.depth)
        ]
        to_tokens = nn.Conv2d(in_channels, config.width, _PATCH, stride=_PATCH)
        self.patch_embed = nn.Sequential(OrderedDict(proj=to_tokens))  # the published name
        self.blocks = nn.ModuleList(blocks)
        self.neck = nn.Sequential(
            nn.Conv2d(config.width, config.neck, 1, bias=False),
            ChannelNorm(config.neck, eps=_EPSILON),
            nn.Conv2d(config.neck, config.neck, 3, padding=1, bias=False),
            ChannelNorm(config.neck, eps=_EPSILON),
        )
        self.mode: Mode = config.mode
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, neck, H / 16, W / 16)."""
        is_checkpointed = self.mode == "checkpoint" and self.training
        x = self.patch_embed(x).permute(0, 2, 3, 1)  # (B, H / 16, W / 16, width)
        for block in self.blocks:
            x = checkpointed(block, x, within=block) if is_checkpointed else block(x)
        return cast(Tensor, self.neck(x.permute(0, 3, 1, 2)))


class TokenDecoder(nn.Module):
    """Four transposed convolutions, each with norm and GELU, then the image's own detail is added and mixed in."""

    def __init__(self, in_channels: int, neck: int, widths: Sequence[int]) -> None:
        super().__init__()
        steps, last = zip((neck, *widths[:-1]), widths, strict=True), widths[-1]
        self.ups = nn.Sequential(
            *(nn.Sequential(step_up(2, *step, (2, 2)), group_norm(step[1]), nn.GELU()) for step in steps)
        )
        self.detail = nn.Sequential(convolution(2, in_channels, last), group_norm(last), nn.GELU())
        self.mix = nn.Sequential(convolution(2, last, last), group_norm(last), nn.GELU())

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """(B, neck, H / 16, W / 16) and (B, in_channels, H, W) to (B, widths[-1], H, W)."""
        return cast(Tensor, self.mix(self.ups(features) + self.detail(image)))


class VitNetwork(SegmentationNetwork):
    """Encoder, decoder and head for images."""

    divisor = (_PATCH, _PATCH)
    input_weights = ("encoder.patch_embed.proj.weight", "decoder.detail.0.weight")

    def __init__(self, config: VitConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.encoder = VitEncoder(config, in_channels)
        self.decoder = TokenDecoder(in_channels, config.neck, config.decoder_widths)
        self.heads = nn.ModuleList([pointwise(2, config.decoder_widths[-1], out_channels)])

    def encode(self, x: Tensor) -> list[Tensor]:
        """The one feature map of a transformer, (B, neck, H / 16, W / 16)."""
        return [self.encoder(x)]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In training the list has one entry, in full resolution."""
        logits: Tensor = self.heads[0](self.decoder(self.encoder(x), x))
        return [logits] if self.training else logits
