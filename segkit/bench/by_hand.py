"""The same network run by hand with nibabel and MONAI's sliding windows, as a reference for `segkit bench speed`.

    python -m segkit.bench.by_hand RUN CASE_DIR OUT.nii.gz

Eager torch in float32 in one process, for models trained at the case's own spacing with normalisation zscore-nonzero.
Prints one JSON line: wall seconds of each stage, seconds altogether, windows.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

_CLOCK = time.perf_counter
_NAMES = {"t1n": {"t1n", "t1"}, "t1c": {"t1c", "t1ce", "t1gd"}, "t2w": {"t2w", "t2"}, "t2f": {"t2f", "flair"}}


def main(run: Path, case: Path, out: Path) -> dict[str, Any]:
    """Segment a case; returns seconds by stage, in total, and the number of windows."""
    start = mark = _CLOCK()
    import nibabel as nib
    import numpy as np
    import torch
    from monai.inferers import sliding_window_inference
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    from segkit.checkpoint.model import load_model

    seconds: dict[str, float] = {}

    def note(stage: str) -> None:
        nonlocal mark
        seconds[stage], mark = round(_CLOCK() - mark, 3), _CLOCK()

    note("import")
    card = json.loads((run / "model.json").read_text(encoding="utf-8"))
    network = load_model(run)
    note("load")
    files = [nib.load(_file_of(case, modality)) for modality in card["modalities"]]
    affine = files[0].affine
    there, back = io_orientation(affine), axcodes2ornt(card["orientation"])
    turned = [apply_orientation(file.get_fdata(dtype=np.float32), ornt_transform(there, back)) for file in files]
    image = np.stack(turned)
    note("read")
    for plane in image:
        inside = plane != 0
        plane[inside] = (plane[inside] - plane[inside].mean()) / (plane[inside].std() + 1e-8)
    box = tuple(slice(int(hits.min()), int(hits.max()) + 1) for hits in np.nonzero((image != 0).any(0)))
    cropped = torch.from_numpy(np.ascontiguousarray(image[(slice(None), *box)]))[None]
    note("preprocess")
    count = 0

    def window(patch: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(patch)
        result: torch.Tensor = network(patch)
        return result

    with torch.inference_mode():
        logits = sliding_window_inference(cropped, card["patch_size"], 1, window, card["overlap"], "gaussian")[0]
    note("predict")
    labels = np.zeros(image.shape[1:], np.uint8)
    best = logits.argmax(0)
    for position, output in enumerate(card["outputs"]):
        painted = logits[position] > 0 if card["activation"] == "sigmoid" else best == position
        labels[box][painted.numpy()] = output["label"]
    mask = apply_orientation(labels, ornt_transform(back, there)).astype(np.uint8)
    nib.save(nib.Nifti1Image(mask, affine), out)
    note("decode and write")
    return {"seconds": seconds, "wall": round(_CLOCK() - start, 3), "windows": count}


def _file_of(case: Path, modality: str) -> Path:
    known = _NAMES.get(modality, {modality})
    found = [
        path
        for path in sorted(case.glob("*.nii*"))
        if path.name.split(".")[0].lower().replace("-", "_").rpartition("_")[2] in known
    ]
    if len(found) != 1:
        raise SystemExit(f"{case}: {len(found)} files for modality {modality}; expected one of a BraTS case folder")
    return found[0]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*map(Path, sys.argv[1:4]))) + "\n")
