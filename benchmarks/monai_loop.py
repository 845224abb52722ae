"""What a MONAI user writes by hand, as the measure for segkit: transforms, a loop, and masks of the cases kept out.

    python benchmarks/monai_loop.py DATA OUT --exclude FILE --minutes 30 [--network segresnet] [--seed 0]

DATA is `brats2018` or the Decathlon's `Task04_Hippocampus`; FILE names the cases that are kept out. Random patches of
prepared cases in memory, SegResNet with 16 filters, AdamW with half a cosine over the minutes, in which the preparation
counts and the writing of masks does not. `--network FAMILY/SIZE` trains a network of segkit, all else alike: what is
left of a difference is then the recipe's. Writes `OUT/masks/CASE.nii.gz` and `OUT/metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from segkit.models.table import build_model

LR, WEIGHT_DECAY = 1e-3, 1e-5
BOTH = ("image", "label")


@dataclass(frozen=True)
class Recipe:
    """What depends on the data: files of a case, channels, outputs, patches, loss, and the mask of the logits."""

    items: Callable[[Path], list[dict[str, Any]]]
    channels: int
    outputs: int
    patch: tuple[int, int, int]
    window: tuple[int, int, int]
    has_background_zero: bool
    loss: nn.Module
    dropout: float | None
    to_mask: Callable[[Tensor], Tensor]
    cut: Callable[[tuple[int, int, int]], list[transforms.Transform]]
    to_targets: Callable[[Tensor], Tensor]


def brats_items(data: Path) -> list[dict[str, Any]]:
    """Four images and the mask of each folder."""
    return [
        {
            "name": case.name,
            "image": [str(case / f"{case.name}_{modality}.nii.gz") for modality in ("t1", "t1ce", "t2", "flair")],
            "label": str(case / f"{case.name}_seg.nii.gz"),
        }
        for case in sorted(data.iterdir())
        if case.is_dir()
    ]


def same(label: Tensor) -> Tensor:
    """The labels (1, D, H, W) of classes."""
    return label


def brats_targets(label: Tensor) -> Tensor:
    """Whole tumour, core and enhancing tumour (3, D, H, W) of the labels 1, 2 and 4."""
    return torch.cat([label > 0, (label == 1) | (label == 4), label == 4]).float()


def brats_mask(logits: Tensor) -> Tensor:
    """Labels (D, H, W), uint8, of the three regions' logits."""
    whole, core, enhancing = logits > 0
    mask = 2 * whole.to(torch.uint8)
    mask[core] = 1
    mask[enhancing] = 4
    return mask


def brats_cut(patch: tuple[int, int, int]) -> list[transforms.Transform]:
    """Patches from anywhere, mirrored on each axis."""
    flips = [transforms.RandFlipd(BOTH, 0.5, axis) for axis in range(3)]
    return [transforms.RandSpatialCropd(BOTH, patch, random_size=False), *flips]


def hippocampus_items(data: Path) -> list[dict[str, Any]]:
    """The image and the mask of each case."""
    paths = sorted((data / "imagesTr").glob("hippo*.nii.gz"))
    return [
        {"name": path.name.removesuffix(".nii.gz"), "image": str(path), "label": str(data / "labelsTr" / path.name)}
        for path in paths
    ]


def hippocampus_cut(patch: tuple[int, int, int]) -> list[transforms.Transform]:
    """Two patches in three on the hippocampus."""
    return [transforms.RandCropByPosNegLabeld(BOTH, "label", patch, pos=2, neg=1, num_samples=1)]


RECIPES = {
    "brats2018": Recipe(
        brats_items, 4, 3, (64, 64, 64), (96, 96, 96), True,
        DiceLoss(sigmoid=True, smooth_nr=0, smooth_dr=1e-5, squared_pred=True), 0.2,
        brats_mask, brats_cut, brats_targets,
    ),
    "Task04_Hippocampus": Recipe(
        hippocampus_items, 1, 3, (40, 56, 40), (40, 56, 40), False,
        DiceCELoss(softmax=True, to_onehot_y=True), None,
        lambda logits: logits.argmax(0).to(torch.uint8), hippocampus_cut, same,
    ),
}  # fmt: skip


def main() -> None:
    """Train for the minutes, then write the masks of the cases kept out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--exclude", type=Path, required=True, help="text file of the cases kept out")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--network", default="segresnet", help="or FAMILY/SIZE of segkit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    recipe = RECIPES[arguments.data.resolve().name]
    kept_out = set(arguments.exclude.read_text(encoding="utf-8").split())
    items = recipe.items(arguments.data)
    training = [item for item in items if item["name"] not in kept_out]
    network = build(arguments.network, recipe)
    (arguments.out / "masks").mkdir(parents=True, exist_ok=True)
    steps = train(network, recipe, training, started, 60 * arguments.minutes)
    line = json.dumps({"step": steps, "seconds": round(time.monotonic() - started, 1)})
    (arguments.out / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    write_masks(network, recipe, [item for item in items if item["name"] in kept_out], arguments.out / "masks")


def build(name: str, recipe: Recipe) -> nn.Module:
    """SegResNet, or a network of segkit without deep supervision, `FAMILY/SIZE`."""
    if name == "segresnet":
        return SegResNet(3, 16, recipe.channels, recipe.outputs, dropout_prob=recipe.dropout)
    family, _, size = name.partition("/")
    return build_model(
        family, size=size or None, in_channels=recipe.channels, out_channels=recipe.outputs, deep_supervision=False
    )


def prepared(keys: tuple[str, ...], recipe: Recipe) -> list[transforms.Transform]:
    """Reading, orientation and intensities, for training and for masks."""
    return [
        transforms.LoadImaged(keys),
        transforms.EnsureChannelFirstd(keys),
        transforms.Orientationd(keys, "RAS", labels=None),
        transforms.NormalizeIntensityd("image", nonzero=recipe.has_background_zero, channel_wise=True),
    ]


def train(network: nn.Module, recipe: Recipe, items: list[dict[str, Any]], started: float, seconds: float) -> int:
    """Train until `seconds` after `started`; returns the number of steps."""
    steps_of_case = [*prepared(BOTH, recipe), transforms.Lambdad("label", recipe.to_targets)]
    if recipe.has_background_zero:
        steps_of_case.append(transforms.CropForegroundd(BOTH, "image"))
    random = [
        transforms.SpatialPadd(BOTH, recipe.patch),
        *recipe.cut(recipe.patch),
        transforms.RandScaleIntensityd("image", 0.1, prob=1.0),
        transforms.RandShiftIntensityd("image", 0.1, prob=1.0),
    ]
    # Serial: threads would share a reader and lose channels.
    dataset = CacheDataset(items, transforms.Compose([*steps_of_case, *random]), progress=False, num_workers=None)
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    optimiser = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
    network.train()
    steps = 0
    while True:
        for batch in loader:
            progress = (time.monotonic() - started) / seconds
            if progress >= 1:
                return steps
            for group in optimiser.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * progress))
            optimiser.zero_grad()
            logits = network(batch["image"].as_tensor())
            loss: Tensor = recipe.loss(logits, batch["label"].as_tensor())
            loss.backward()
            optimiser.step()
            steps += 1


@torch.no_grad()
def write_masks(network: nn.Module, recipe: Recipe, items: list[dict[str, Any]], folder: Path) -> None:
    """The masks on the grids of the files, with seconds for each."""
    network.eval()
    load = transforms.Compose(prepared(("image",), recipe))
    for item in items:
        started = time.monotonic()
        image = load({"image": item["image"]})["image"]
        logits = sliding_window_inference(
            image[None].as_tensor(), recipe.window, 1, network, overlap=0.5, mode="gaussian"
        )
        mask = nib.Nifti1Image(recipe.to_mask(logits[0]).numpy(), image.affine.numpy())
        reference = nib.load(item["label"])
        axes = [nib.orientations.io_orientation(image.affine) for image in (mask, reference)]
        back = mask.as_reoriented(nib.orientations.ornt_transform(*axes))
        voxels = np.asarray(back.dataobj)
        nib.save(nib.Nifti1Image(voxels, reference.affine), folder / f"{item['name']}.nii.gz")
        print(item["name"], f"{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
