"""Compares `segkit infer` with `nnUNetv2_predict` on the same models: seconds, peak memory, differing voxels.

    python benchmarks/nnunet.py commands GOLDEN --nnunet ENVIRONMENT/bin/nnUNetv2_predict
    python benchmarks/nnunet.py network CASE_FOLDER --nnunet ENVIRONMENT/bin/nnUNetv2_predict
    python benchmarks/nnunet.py decode
    python benchmarks/nnunet.py decode --outputs 26 --before 110 128 128 --to 140 192 192 --nnunet ENVIRONMENT/bin/...

`commands` runs a golden folder (by default Dataset401_Plain) with and without mirroring. `network` runs a standard
6-stage network of random weights on a case of four channels, without mirroring: CASE_0000.nii.gz to CASE_0003.nii.gz.
`decode` paints a mask from synthetic logits slab by slab, and prints seconds and peak memory; by default 104 outputs,
from 1.5 mm to 512 x 512 x 400 voxels of 0.8 mm. With --nnunet also those of nnU-Net's export (`export`, run by the
python beside that program), which needs all logits of both grids at once.

Memory is the largest sum of the resident memory of a command and all its processes, from /proc, every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

Shape = tuple[int, ...]
FULL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
STRIDES = [[1, 1, 1], *([[2, 2, 2]] * 5)]


def processes_below(root: int) -> set[int]:
    """The process and all its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, before = {root}, 0
    while len(found) > before:
        before = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def resident_mb(process: int) -> float:
    """Proportional resident memory, so that pages shared by several processes count once."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure(command: Sequence[str | Path], **environment: str) -> dict[str, float]:
    """Seconds and peak MB of a command; its output is shown only if it fails."""
    began, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env={**os.environ, **environment})
        while process.poll() is None:
            peak = max(peak, sum(map(resident_mb, processes_below(process.pid))))
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read()[-3000:]}")
    return {"seconds": round(seconds, 1), "peak_mb": round(peak)}


def differing(one: Path, other: Path) -> tuple[int, int]:
    """Voxels that differ between the masks of two folders, and all voxels."""
    different = voxels = 0
    for path in sorted(other.glob("*.nii.gz")):
        a, b = (np.asarray(nib.load(folder / path.name).dataobj) for folder in (one, other))
        different, voxels = different + int(np.count_nonzero(a != b)), voxels + a.size
    return different, voxels


def compare(results: Path, scans: Path, nnunet: Path, *, mirrors: bool, backend: str) -> dict[str, Any]:
    """Both programs on the same scans, one after the other."""
    trainer, plans, configuration = results.name.split("__")
    dataset, root = results.parent.name, results.parent.parent
    folds = sorted(fold.name.removeprefix("fold_") for fold in results.glob("fold_*"))
    with tempfile.TemporaryDirectory() as scratch:
        own, theirs = Path(scratch, "segkit"), Path(scratch, "nnunet")
        segkit = [sys.executable, "-m", "segkit", "infer", "-m", results, "-i", scans, "-o", own, "-d", "cpu", "-q"]
        segkit += ["--backend", backend, *([] if mirrors else ["--no-tta"])]
        predict = [nnunet, "-i", scans, "-o", theirs, "-d", dataset, "-c", configuration, "-tr", trainer, "-p", plans]
        predict += ["-f", *folds, "-device", "cpu", *([] if mirrors else ["--disable_tta"])]
        places = {f"nnUNet_{name}": scratch for name in ("raw", "preprocessed")} | {"nnUNet_results": str(root)}
        measure(segkit)  # writes the graph of the network to the cache, once
        shown = {"segkit": measure([*segkit, "--overwrite"]), "nnunet": measure(predict, **places)}
        different, voxels = differing(own, theirs)
    return {"model": dataset, "mirroring": mirrors, **shown, "different_voxels": different, "voxels": voxels}


def write_standard_network(folder: Path) -> Path:
    """A results folder of nnU-Net's usual network of six stages, patch 128, four channels, with random weights."""
    import torch

    from segkit.models.table import build_model

    torch.manual_seed(0)
    widths = (32, 64, 128, 256, 320, 320)
    network = build_model(
        "plainunet", in_channels=4, out_channels=4, widths=widths, kernels=((3, 3, 3),) * 6, strides=((2, 2, 2),) * 5
    )
    linear = {"order_z": 0, "force_separate_z": None}
    arguments = {
        "n_stages": 6, "features_per_stage": list(widths), "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 6, "strides": STRIDES, "n_conv_per_stage": [2] * 6,
        "n_conv_per_stage_decoder": [2] * 5, "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [128, 128, 128], "median_image_size_in_voxels": [140.0, 171.0, 137.0],
        "spacing": [1.0, 1.0, 1.0], "normalization_schemes": ["ZScoreNormalization"] * 4,
        "use_mask_for_norm": [True] * 4, "batch_dice": False,
        **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")},
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **linear},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **linear},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **linear},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }  # fmt: skip
    properties = {
        "max": 1.0,
        "mean": 0.5,
        "median": 0.5,
        "min": 0.0,
        "percentile_00_5": 0,
        "percentile_99_5": 1,
        "std": 1,
    }
    plans = {
        "dataset_name": "Dataset990_Random", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0], "experiment_planner_used": "ExperimentPlanner",
        "original_median_shape_after_transp": [140, 171, 137], "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {str(channel): properties for channel in range(4)},
    }  # fmt: skip
    dataset = {
        "channel_names": {str(channel): f"channel {channel}" for channel in range(4)},
        "labels": {"background": 0, "one": 1, "two": 2, "three": 3}, "numTraining": 1, "file_ending": ".nii.gz",
    }  # fmt: skip
    results = folder / "Dataset990_Random" / FULL
    (results / "fold_0").mkdir(parents=True)
    for name, document in {"plans": plans, "dataset": dataset}.items():
        (results / f"{name}.json").write_text(json.dumps(document))
    # nnU-Net's own checkpoints have second names of these tensors, and nnU-Net loads them strictly.
    weights = dict(network.state_dict())
    for name, tensor in list(weights.items()):
        for layer, number in ((".conv.", 0), (".norm.", 1)):
            if layer in name:
                weights[name.replace(layer, f".all_modules.{number}.")] = tensor
    weights |= {f"decoder.{name}": tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    checkpoint = {
        "network_weights": weights, "optimizer_state": {}, "grad_scaler_state": None, "logging": {}, "_best_ema": None,
        "current_epoch": 1, "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2),
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset},
    }  # fmt: skip
    torch.save(checkpoint, results / "fold_0" / "checkpoint_final.pth")
    return results


def synthetic_logits(outputs: int, shape: Shape, start: int, stop: int) -> np.ndarray:
    """Planes `start` to `stop` of smooth logits (outputs, *shape), in half precision: each is largest at a place."""
    centres = np.random.default_rng(0).uniform(0.1, 0.9, (outputs, 3)) * shape
    axes = [np.arange(length, dtype=np.float32) for length in shape]
    logits = np.empty((outputs, stop - start, *shape[1:]), np.float16)
    for plane, centre in zip(logits, centres, strict=True):
        squares = [(axis - np.float32(place)) ** 2 for axis, place in zip(axes, centre, strict=True)]
        plane[...] = (squares[0][start:stop, None, None] + squares[1][:, None] + squares[2]) * np.float32(-0.01)
    return logits


def decode_synthetic(outputs: int, old: Shape, target: Shape) -> tuple[np.ndarray, float]:
    """The mask (*target) that segkit paints from slabs of synthetic logits (outputs, *old), and the seconds."""
    from segkit.inference.decode import decode
    from segkit.inference.sliding_window import Slab
    from segkit.preparing.preprocessing import Preparation
    from segkit.reading.geometry import reorientation_to
    from segkit.reading.volume import Grid

    in_synthesis = [0.0]
    planes = max(1, 2**25 // (outputs * old[1] * old[2]))

    def slabs() -> Iterator[Slab]:
        for start in range(0, old[0], planes):
            entered, stop = time.perf_counter(), min(start + planes, old[0])
            slab = Slab(0, start, stop, synthetic_logits(outputs, old, start, stop).astype(np.float32))
            in_synthesis[0] += time.perf_counter() - entered
            yield slab

    grid = Grid(target, np.eye(4))
    preparation = Preparation(
        grid, reorientation_to(grid, "IJK"), ((0, 0, 0), target), old, (1.0,) * 3, rounds_to_half=True
    )
    began = time.perf_counter()
    mask = decode(slabs(), preparation, "softmax", range(outputs))
    return mask, time.perf_counter() - began - in_synthesis[0]


def export_synthetic(outputs: int, old: Shape, target: Shape) -> tuple[np.ndarray, float]:
    """The same by nnU-Net's export, which needs all logits at once; run in its environment."""
    import torch
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    configuration = {
        "spacing": [1.0, 1.0, 1.0], "architecture": {},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
    }  # fmt: skip
    identity = {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager"}
    plans = PlansManager({"configurations": {"3d_fullres": configuration}, **identity})
    labels = plans.get_label_manager({"labels": {"background": 0, **{f"l{n}": n for n in range(1, outputs)}}})
    properties = {
        "spacing": [before / after for before, after in zip(old, target, strict=True)],
        "shape_after_cropping_and_before_resampling": target, "shape_before_cropping": target,
        "bbox_used_for_cropping": [[0, length] for length in target],
    }  # fmt: skip
    logits = torch.from_numpy(synthetic_logits(outputs, old, 0, old[0]))
    began = time.perf_counter()
    mask = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, plans.get_configuration("3d_fullres"), labels, properties
    )
    return np.asarray(mask), time.perf_counter() - began


def decode_row(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of painting one mask; with --nnunet also those of nnU-Net, in a process of its own."""
    paint = export_synthetic if options.what == "export" else decode_synthetic
    mask, seconds = paint(options.outputs, tuple(options.before), tuple(options.to))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"program": "nnunet" if options.what == "export" else "segkit", "outputs": options.outputs}
    row |= {"from": options.before, "to": options.to, "labels": int(np.unique(mask).size)}
    row |= {"seconds": round(seconds, 1), "peak_mb": round(peak_mb)}
    if options.mask is not None:
        np.save(options.mask, mask)
    if options.nnunet is not None and options.what == "decode":
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "mask.npy")
            sizes = ["--outputs", options.outputs, "--before", *options.before, "--to", *options.to]
            command = [options.nnunet.with_name("python"), __file__, "export", *sizes, "--mask", path]
            shown = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
            row["nnunet"] = {key: json.loads(shown)[key] for key in ("seconds", "peak_mb")}
            row["different_voxels"] = int(np.count_nonzero(np.load(path) != mask))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("commands", "network", "decode", "export"))
    parser.add_argument("folder", nargs="?", type=Path, help="the golden folders, or the folder of a case")
    parser.add_argument("--nnunet", type=Path, help="nnUNetv2_predict in its own environment")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dataset", default="Dataset401_Plain")
    parser.add_argument("--outputs", type=int, default=104)
    parser.add_argument("--before", type=int, nargs=3, default=(273, 273, 213))
    parser.add_argument("--to", type=int, nargs=3, default=(512, 512, 400))
    parser.add_argument("--mask", type=Path, help="where `decode` and `export` save the mask, .npy")
    options = parser.parse_args()
    if options.what in ("decode", "export"):
        rows = [decode_row(options)]
    elif options.folder is None or options.nnunet is None:
        parser.error("name the folder and --nnunet")
    elif options.what == "commands":
        (results,) = (options.folder.absolute() / options.dataset).glob("nnUNetTrainer__*__3d_fullres")
        scans = results.parent / "inputs"
        pairs = [(results, scans, mirrors) for mirrors in (True, False)]
        rows = [compare(*pair[:2], options.nnunet, mirrors=pair[2], backend=options.backend) for pair in pairs]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            results = write_standard_network(Path(scratch))
            rows = [compare(results, options.folder, options.nnunet, mirrors=False, backend=options.backend)]
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
