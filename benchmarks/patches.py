"""Patches and views per second of one core: of this checkout, or side by side with another one.

    python benchmarks/patches.py                        this checkout
    git worktree add ../before e3789ea
    python benchmarks/patches.py --other ../before      both, in alternating processes; the ratio of the medians
    python benchmarks/patches.py --transforms           ms of single transforms of MONAI and of those used instead

Patches are 4 x 64^3 and 4 x 128^3 with the default augmentation of BraTS, views 1 x 224^2 and 1 x 64^3 with that of
pre-training. The case is one volume of 4 x 176 x 200 x 160 voxels with a background of zeros, in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_HERE = Path(__file__).resolve().parents[1]
_SHAPE = (176, 200, 160)
_COUNTS = {"patches of 4 x 64^3": 150, "patches of 4 x 128^3": 30, "views of 224^2": 1000, "views of 64^3": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transforms", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure()))
        return
    if options.transforms:
        for name, ms in transform_times().items():
            print(f"{name:60} {ms:8.2f} ms")
        return
    roots = {"this": _HERE, **({"other": options.other.resolve()} if options.other else {})}
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for _ in range(options.rounds):
        for name, root in roots.items():
            rates[name].append(_in_process(root))
    for what in _COUNTS:
        medians = {name: statistics.median(found[what] for found in rates[name]) for name in roots}
        line = ", ".join(f"{name} {median:.2f}/s" for name, median in medians.items())
        print(f"{what:22} {line}" + (f", ratio {medians['this'] / medians['other']:.2f}" if options.other else ""))


def _in_process(root: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def measure() -> dict[str, float]:
    """Items per second of processor time, with the segkit on the path: this version's, or that of e3789ea."""
    from segkit.preparing.augmentation import AugmentationConfig
    from segkit.preparing.patch_sampling import PatchDataset
    from segkit.preparing.preprocessing import Preparation, PreparedCase
    from segkit.pretraining.views import ViewsConfig
    from segkit.reading.geometry import Reorientation
    from segkit.reading.volume import Grid

    generator = np.random.default_rng(0)
    places = np.indices(_SHAPE, dtype=np.float32)
    middle = np.array(_SHAPE, np.float32).reshape(3, 1, 1, 1) / 2
    radius = (((places - middle) / middle) ** 2).sum(axis=0)
    image = generator.normal(size=(4, *_SHAPE)).astype(np.float32) * (radius < 0.8)
    labels = (radius < 0.05).astype(np.uint8)
    turn = Reorientation((0, 1, 2), (False,) * 3, _SHAPE)
    preparation = Preparation(Grid(_SHAPE, np.eye(4)), turn, ((0,) * 3, _SHAPE), _SHAPE, (1.0,) * 3)
    case = PreparedCase("case", image, labels, preparation, {1: np.flatnonzero(labels)})
    config = AugmentationConfig(mirror_axes=(0,), modality_dropout=0.2)

    def patches(side: int) -> Callable[[int], object]:
        try:
            from segkit.preparing.augmentation import training_transforms
        except ImportError:
            old = PatchDataset([case], (side,) * 3, config, foreground_fraction=0.5, seed=1, length=10**6)
            return old.__getitem__
        transforms = training_transforms(config, (side,) * 3, foreground_fraction=0.5)
        return PatchDataset([case], transforms, seed=1, length=10**6).__getitem__

    def views(cut: np.ndarray, size: tuple[int, ...]) -> Callable[[int], object]:
        spacing, content = (1.0,) * len(size), ((0,) * len(size), cut.shape[1:])
        try:
            from segkit.preparing.transforms import run
            from segkit.pretraining.views import view_transforms
        except ImportError:
            from segkit.pretraining.views import draw_view

            random = np.random.default_rng(0)
            return lambda _: draw_view(cut, spacing, size, ViewsConfig(), random, content)
        transforms = view_transforms(ViewsConfig(), size)
        return lambda _: run(transforms, {"image": cut, "spacing_mm": spacing, "content": content})

    work = (
        patches(64),
        patches(128),
        views(image[:1, :, :, 80], (224, 224)),
        views(image[:1, :96, :96, :96], (64, 64, 64)),
    )
    rates = {}
    for (name, count), item in zip(_COUNTS.items(), work, strict=True):
        item(0)
        began = time.process_time()
        for index in range(1, count + 1):
            item(index)
        rates[name] = count / (time.process_time() - began)
    return rates


def transform_times() -> dict[str, float]:
    """Milliseconds of one call for 4 x 64^3 (noise: 1 x 64^3), the smallest of 20."""
    from monai.data import set_track_meta
    from monai.transforms import Compose, RandAffined, RandGaussianNoised, RandScaleIntensityd

    from segkit.preparing.patch_sampling import RandBoxd, ResampleBoxd
    from segkit.preparing.transforms import RandNoised, rotation

    set_track_meta(False)
    plane, whole, label = torch.rand(1, 64, 64, 64), torch.rand(4, 104, 104, 104), torch.zeros(1, 104, 104, 104)
    affine = RandAffined(
        ("image", "label"), (64,) * 3, 1.0, (0.5, 0.5, 0.5), scale_range=(0.3, 0.3, 0.3), mode=("bilinear", "nearest")
    )
    cut, resample = RandBoxd((64,) * 3, foreground_fraction=0.0), ResampleBoxd((64,) * 3)
    turn = 1.1 * rotation(3, (0, 1), 20) @ rotation(3, (1, 2), 10)
    before, after = (reach[0] for reach in (cut.reach(turn)))
    middle = np.full(3, 52)
    part = (slice(None), *[slice(52 - before, 52 + after)] * 3)

    def ours() -> None:
        box = {"image": whole[part].contiguous(), "label": label[part].contiguous()}
        resample({**box, "theta": cut.theta(turn, middle - (52 - before), box["image"].shape[1:])})

    ten = Compose([RandScaleIntensityd("image", 0.1, 0.0) for _ in range(10)])
    calls: dict[str, Callable[[], object]] = {
        "RandGaussianNoised": lambda: RandGaussianNoised("image", 1.0)({"image": plane}),
        "RandNoised": lambda: RandNoised("image", (0.0, 0.1), 1.0)({"image": plane}),
        "RandAffined, from a box of 104^3": lambda: affine({"image": whole, "label": label}),
        "RandBoxd and ResampleBoxd, rotated and scaled": ours,
        "Compose.set_random_state of ten transforms": lambda: ten.set_random_state(1),
    }
    return {name: min(_ms(call) for _ in range(20)) for name, call in calls.items()}


def _ms(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


if __name__ == "__main__":
    main()
