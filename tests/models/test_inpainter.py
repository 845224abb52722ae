"""The inpainting U-Net: what it is shown, which norms it has, and the image that it goes on from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segkit.errors import RequestError
from segkit.models.region_layers import RegionNormBasic, RegionNormLearnable
from segkit.models.table import build_model

ALL_NORMS = [("region", "learnable"), ("region", "region"), ("region", "instance"), ("instance", "instance")]


def network(dims: int = 3, context: str = "mirror", **arguments: object) -> nn.Module:
    """A small one whose head is not 0, so that its layers can be seen in what it gives."""
    made = build_model(
        "inpainter", in_channels=2, out_channels=2, dims=dims, widths=(4, 8), context=context, **arguments
    )
    nn.init.normal_(made.get_parameter("head.weight"))
    return made.eval()


def seen(dims: int = 3, size: int = 8) -> Tensor:
    """An image of two channels with all that context "mirror" adds, (1, 6, *)."""
    x = torch.randn(1, 6, *(size,) * dims)
    hole = torch.zeros(1, 1, *(size,) * dims)
    hole[..., 2:5, 3:6] = 1
    x[:, 2:3] = hole
    return x


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("encoder_norm", "decoder_norm"), ALL_NORMS)
def test_an_image_with_a_hole_is_restored(encoder_norm: str, decoder_norm: str, dims: int) -> None:
    made = network(dims, encoder_norm=encoder_norm, decoder_norm=decoder_norm)
    x = seen(dims)
    with torch.no_grad():
        found = made(x)
    assert found.shape == x[:, :2].shape
    assert bool(found.isfinite().all())
    assert not torch.equal(found, x[:, :2])


def test_region_norm_is_told_background_tissue_and_hole() -> None:
    """What the first layers make of tissue far from the hole depends on tissue alone, of the hole on the hole."""
    made = network(encoder_norm="region", context="none")
    encoder = made.get_submodule("encoder")
    x = seen()[:, :3]
    x[:, :2, :, :, 7] = 0
    told = []
    encoder.norm.register_forward_hook(lambda _, inputs, __: told.append(inputs[1]))  # type: ignore[union-attr]
    with torch.no_grad():
        made(x)
        made(x[:, :2])
    with_hole, without = (regions[0, 0] for regions in told)
    assert torch.equal(with_hole == 2, x[0, 2] > 0)
    assert torch.equal(with_hole[..., 7] == 0, x[0, 2, ..., 7] == 0)
    assert bool((with_hole[..., :2] == 1).all())
    assert torch.equal(without == 0, torch.zeros(8, 8, 8).index_fill(2, torch.tensor([7]), 1) > 0)


def test_context_decides_what_is_seen() -> None:
    x = seen()
    other_mirror = torch.cat((x[:, :3], torch.randn_like(x[:, 3:])), 1)
    with torch.no_grad():
        mirror, hole, none = network(context="mirror"), network(context="hole"), network(context="none")
        assert not torch.equal(mirror(x), mirror(other_mirror))
        assert torch.equal(hole(x), hole(other_mirror))
        assert torch.equal(hole(x), hole(x[:, :3]))
        assert none.get_submodule("encoder").context is None
        alone = mirror(x[:, :2])
    assert alone.shape == (1, 2, 8, 8, 8)


def test_an_image_alone_is_not_added_to() -> None:
    """Without a hole channel nothing is added to what the head gives: logits of a segmentation."""
    made = network()
    nn.init.zeros_(made.get_parameter("head.weight"))
    nn.init.constant_(made.get_parameter("head.bias"), 3.0)
    x = seen()
    with torch.no_grad():
        assert torch.equal(made(x[:, :2]), torch.full((1, 2, 8, 8, 8), 3.0))
        torch.testing.assert_close(made(x), 3 + x[:, :2])


def test_a_fresh_network_gives_nearly_the_image_as_it_came() -> None:
    fresh = build_model("inpainter", in_channels=2, out_channels=2, widths=(4, 8), context="hole").eval()
    x = seen()
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), x[:, :2], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("norms", "basic", "learnable"),
    [(("region", "learnable"), 4, 2), (("region", "instance"), 4, 0), (("instance", "instance"), 0, 0)],
)
def test_norms_are_where_they_were_asked_for(norms: tuple[str, str], basic: int, learnable: int) -> None:
    made = network(encoder_norm=norms[0], decoder_norm=norms[1])
    assert sum(isinstance(layer, RegionNormBasic) for layer in made.modules()) == basic
    assert sum(isinstance(layer, RegionNormLearnable) for layer in made.modules()) == learnable


def test_unknown_norms_are_refused() -> None:
    with pytest.raises(RequestError, match="decoder_norm"):
        network(decoder_norm="batch")
