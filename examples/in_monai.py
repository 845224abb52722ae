"""A network of segkit in a training loop of MONAI, on phantoms: `python examples/in_monai.py OUT`, seconds."""

import sys
from pathlib import Path

import torch
from monai.data import DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.transforms import Compose, ConvertToMultiChannelBasedOnBratsClassesd, NormalizeIntensityd, RandFlipd

import segkit.monai
from segkit.phantoms.layouts import write_phantoms


def main(folder: Path, epochs: int = 20) -> tuple[list[float], dict[str, float]]:
    write_phantoms(folder, range(3), convention="brats2021", size=32)
    normalise = NormalizeIntensityd("image", nonzero=True, channel_wise=True)
    regions = ConvertToMultiChannelBasedOnBratsClassesd("label")  # TC, WT, ET of the labels 1, 2 and 4
    flip = RandFlipd(["image", "label"], prob=0.5, spatial_axis=0)
    cases = segkit.monai.as_dataset(folder, Compose([normalise, regions, flip]))
    network = segkit.build_model("stunet", size="S", in_channels=4, out_channels=3, deep_supervision=False, width=8)
    optimiser, loss_of = torch.optim.AdamW(network.parameters(), 3e-3), DiceCELoss(sigmoid=True)
    losses = []
    for _ in range(epochs):
        for batch in DataLoader(cases, batch_size=1, shuffle=True):
            optimiser.zero_grad()
            loss = loss_of(network(batch["image"]), batch["label"].float())
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    dice, network = DiceMetric(reduction="mean_batch"), network.eval()
    for batch in DataLoader(cases, batch_size=1):
        with torch.no_grad():
            logits = sliding_window_inference(batch["image"], (32, 32, 32), 1, network, mode="gaussian")
        dice((logits > 0).float(), batch["label"])
    return losses, dict(zip(("TC", "WT", "ET"), dice.aggregate().tolist(), strict=True))


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
