"""The vision transformer: names and shapes of the published encoder, and attention worked out the long way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from segkit.errors import RequestError
from segkit.models.table import build_model
from segkit.models.vit import ChannelNorm, RelativeAttention, attend_in_windows, relative_positions

_SMALL: dict[str, object] = {
    "size": "tiny",
    "width": 16,
    "depth": 2,
    "heads": 2,
    "window": 3,
    "global_blocks": (1,),
    "image_size": 64,
    "neck": 8,
    "decoder_widths": (8, 8, 8, 8),
}


def _vit(dims: int = 2, in_channels: int = 1, **arguments: object) -> nn.Module:
    return build_model("vit", in_channels=in_channels, out_channels=2, dims=dims, **{**_SMALL, **arguments})  # type: ignore[arg-type]


def _published_names() -> dict[str, tuple[int, ...]]:
    """Tensors of the ViT-B image encoder of Segment Anything, without the absolute position table `pos_embed`."""
    width, head, window, whole = 768, 768 // 12, 14, 1024 // 16
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "neck.0.weight": (256, width, 1, 1),
        "neck.1.weight": (256,),
        "neck.1.bias": (256,),
        "neck.2.weight": (256, 256, 3, 3),
        "neck.3.weight": (256,),
        "neck.3.bias": (256,),
    }
    for block in range(12):
        rows = 2 * (whole if block in (2, 5, 8, 11) else window) - 1
        shapes |= {
            f"blocks.{block}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "attn.rel_pos_h": (rows, head),
                "attn.rel_pos_w": (rows, head),
                "attn.qkv.weight": (3 * width, width),
                "attn.qkv.bias": (3 * width,),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "mlp.lin1.weight": (4 * width, width),
                "mlp.lin1.bias": (4 * width,),
                "mlp.lin2.weight": (width, 4 * width),
                "mlp.lin2.bias": (width,),
            }.items()
        }
    return shapes


def test_names_and_shapes_are_those_of_the_published_encoder() -> None:
    with torch.device("meta"):
        model = build_model("vit", in_channels=3, out_channels=2, dims=2, size="base")
    prefix: str = model.encoder_prefix  # type: ignore[assignment]
    state = model.state_dict()
    ours = {name.removeprefix(prefix): tuple(v.shape) for name, v in state.items() if name.startswith(prefix)}
    assert ours == _published_names()
    assert len(ours) == 176
    assert ours["blocks.2.attn.rel_pos_h"] == (127, 64)
    assert ours["blocks.3.attn.rel_pos_h"] == (27, 64)
    # 89,670,912 in the published image encoder, of which the absolute positions are 64 x 64 x 768.
    assert sum(math.prod(shape) for shape in ours.values()) == 89_670_912 - 64 * 64 * 768


def test_relative_positions_count_from_the_most_negative_distance() -> None:
    table = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    assert relative_positions(table, 3)[..., 0].tolist() == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]


def test_relative_positions_are_interpolated_for_other_sizes() -> None:
    table = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    # Three rows of 5/3 rows each: centres at rows 1/3, 2 and 11/3, that is at distances -5/3, 0 and 5/3.
    assert relative_positions(table, 2)[..., 0].flatten().tolist() == pytest.approx([0, -5 / 3, 5 / 3, 0], abs=1e-6)
    assert relative_positions(table, 1)[..., 0].tolist() == [[0]]


def _attention_the_long_way(attention: RelativeAttention, x: Tensor) -> Tensor:
    """Attention of tokens (H, W, width), one query and one key at a time."""
    height, width, channels = x.shape
    size = channels // attention.heads
    queries, keys, values = attention.qkv(x).split(channels, dim=-1)
    result = torch.zeros_like(x)
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        for y in range(height):
            for z in range(width):
                query = queries[y, z, part]
                scores = torch.stack(
                    [
                        query @ keys[v, w, part] / math.sqrt(size)
                        + query @ attention.rel_pos_h[y - v + height - 1]
                        + query @ attention.rel_pos_w[z - w + width - 1]
                        for v in range(height)
                        for w in range(width)
                    ]
                )
                result[y, z, part] = scores.softmax(0) @ values[..., part].flatten(0, 1)
    projected: Tensor = attention.proj(result)
    return projected


def test_attention_and_its_gradients_are_what_its_formula_says() -> None:
    attention = RelativeAttention(4, 2, 3).double()
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        nn.init.normal_(table)
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    sources = (x, *attention.parameters())
    made, expected = attention(x)[0], _attention_the_long_way(attention, x[0])
    torch.testing.assert_close(made, expected)
    weights = torch.randn_like(made)
    for ours, theirs in zip(
        torch.autograd.grad((made * weights).sum(), sources),
        torch.autograd.grad((expected * weights).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_rows_and_columns_have_tables_of_their_own() -> None:
    attention = RelativeAttention(2, 1, 2)
    nn.init.ones_(attention.qkv.weight)
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, :, :, None].expand(-1, -1, -1, 2)
    plain = attention(x)
    nn.init.normal_(attention.rel_pos_w)
    moved = attention(x)
    assert not torch.allclose(moved, plain)
    nn.init.zeros_(attention.rel_pos_w)
    nn.init.normal_(attention.rel_pos_h)
    assert not torch.allclose(attention(x), plain)
    assert not torch.allclose(attention(x), moved)


class _Sum(nn.Module):
    """Every token becomes the sum over its window."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=(1, 2), keepdim=True).expand_as(x)


def test_windows_hold_their_own_tokens_and_padding_is_cut_off() -> None:
    x = torch.arange(1.0, 7.0).view(1, 2, 3, 1)  # rows 1 2 3 and 4 5 6; the second window has one column of padding
    assert attend_in_windows(_Sum(), x, 2)[0, ..., 0].tolist() == [[12, 12, 9], [12, 12, 9]]
    batch = torch.cat([x, 10 * x])
    assert attend_in_windows(_Sum(), batch, 2)[1, ..., 0].tolist() == [[120, 120, 90], [120, 120, 90]]
    assert attend_in_windows(_Sum(), x, 1).equal(x)


def test_padding_takes_part_in_attention() -> None:
    """A padded token has the value of the bias: with equal scores, half of what a lone token of two attends to."""
    attention = RelativeAttention(1, 1, 2)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.tensor([[0.0], [0.0], [1.0]]))
        attention.qkv.bias.zero_()
        attention.proj.weight.fill_(1)
        attention.proj.bias.zero_()
    x = torch.full((1, 1, 1, 1), 8.0)
    assert attend_in_windows(attention, x, 2).item() == pytest.approx(8 / 4)


def test_channel_norm_looks_at_one_pixel() -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]]).view(1, 2, 1, 2)  # channels (1, 3) in one pixel, (10, 30) in the other
    assert ChannelNorm(2)(x).flatten().tolist() == pytest.approx([-1, -1, 1, 1], abs=1e-4)


def test_blocks_attend_globally_where_they_are_told_to() -> None:
    model = _vit(global_blocks=()).eval()
    x = torch.randn(1, 1, 96, 96)
    changed = x.clone()
    changed[..., :16, :16] += 1  # the first of 6 x 6 tokens, in the first of 2 x 2 windows
    encoder: nn.Module = model.encoder  # type: ignore[assignment]
    with torch.no_grad():
        before, after = (encoder.patch_embed(image).permute(0, 2, 3, 1) for image in (x, changed))  # type: ignore[operator]
        difference = (encoder.blocks[0](before) - encoder.blocks[0](after)).abs()  # type: ignore[index, operator]
        assert (difference[0, :3, :3].amax(-1) > 0).all()
        assert difference[0, 3:].sum() == difference[0, :, 3:].sum() == 0
        block = _vit(global_blocks=(0,)).encoder.blocks[0]  # type: ignore[union-attr, index]
        difference = (block(before) - block(after)).abs()  # type: ignore[operator]
        assert (difference[0].amax(-1) > 0).all()


def test_checkpointing_changes_no_weight_and_no_gradient() -> None:
    plain, checkpointed = _vit(mode="plain").train(), _vit(mode="checkpoint").train()
    checkpointed.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 1, 32, 48)
    for model in (plain, checkpointed):
        model(x)[0].square().sum().backward()
    for (name, ours), theirs in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_of_another_image_size_serve_any_image() -> None:
    model = _vit(image_size=64).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 16, 16)).shape == (1, 2, 16, 16)
        assert model(torch.randn(1, 1, 80, 32)).shape == (1, 2, 80, 32)


def test_slices_of_a_volume_are_images() -> None:
    planar, slicewise = _vit(2).eval(), _vit(3, slice_axis=1).eval()
    slicewise.load_state_dict(planar.state_dict(), strict=True)
    assert slicewise.divisor == (16, 1, 16)
    x = torch.randn(1, 1, 16, 3, 32)
    with torch.no_grad():
        logits = slicewise(x)
        for index in range(3):
            torch.testing.assert_close(logits[:, :, :, index], planar(x[:, :, :, index]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 15}, "width 15 is not a multiple of 2 heads"),
        ({"image_size": 100}, "image_size 100 is not a multiple of 16"),
        ({"global_blocks": (0, 2)}, "are not all among blocks 0 to 1"),
        ({"decoder_widths": (8, 8, 8, 1)}, "decoder_widths are at least 2"),
        ({"slice_axis": 0}, "slice_axis and neighbours need data of three axes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _vit(**arguments)
