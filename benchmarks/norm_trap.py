"""What one batch norm for all steps of a recurrent layer does to evaluation, beside one norm for each step.

Run with `python benchmarks/norm_trap.py`; seconds on one core. A network sees one fixed batch 200 times in training
mode, so that its running averages have settled, then the very same batch in evaluation. No weight changes: any
difference between the two outputs comes from the norms alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segkit.models.r2unet import Norm, R2UNetConfig, build_recurrent_convolution
from segkit.models.table import build_model

PASSES = 200
CHANNELS = 16


def recurrent_layers(norm: Norm) -> nn.Module:
    """Four tied recurrent layers in a row, two recurrent steps each, 2D."""
    layers = [
        build_recurrent_convolution(CHANNELS, 2, R2UNetConfig(share="tied", norm=norm, bias=True)) for _ in range(4)
    ]
    return nn.Sequential(*layers)


def whole_network(norm: Norm) -> nn.Module:
    """The smallest R2U-Net in the popular tied form, 2D."""
    return build_model("r2unet", in_channels=CHANNELS, out_channels=1, dims=2, size="tiny", share="tied", norm=norm)


@torch.no_grad()
def change_in_evaluation(model: nn.Module, batch: Tensor) -> float:
    """|evaluation - training| / |training| of the output on `batch`, (B, C, H, W), after `PASSES` training passes."""
    model.train()
    for _ in range(PASSES):
        trained = _first(model(batch))
    return float((_first(model.eval()(batch)) - trained).norm() / trained.norm())


def _first(output: Tensor | list[Tensor]) -> Tensor:
    return output[0] if isinstance(output, list) else output


def main() -> None:
    """Print both numbers for four recurrent layers and for a whole network."""
    batch = torch.randn(4, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(0))
    print(f"relative change of the output from training to evaluation, same batch, after {PASSES} passes")
    for name, build in (("four recurrent layers", recurrent_layers), ("a whole R2U-Net", whole_network)):
        for norm in ("batch_shared", "batch_per_step"):
            torch.manual_seed(0)
            print(f"{name:22} {norm:15} {change_in_evaluation(build(norm), batch):.4f}")


if __name__ == "__main__":
    main()
