"""Train, segment and score from Python, on phantoms: `python examples/from_python.py OUT`, seconds on two cores."""

import sys
from pathlib import Path

import nibabel as nib

import segkit
from segkit.phantoms.layouts import write_phantoms


def main(folder: Path) -> None:
    write_phantoms(folder / "data", range(4), convention="brats2021", size=24)
    write_phantoms(folder / "new", range(4, 6), convention="brats2021", size=24)
    print(segkit.check(folder / "data", estimate=False).next_command)

    short = {"training.steps": 4, "training.steps_per_epoch": 2, "data.folds": 2}  # a real training needs thousands
    network = {"arguments": {"widths": [8, 12]}}
    summary = segkit.train(folder / "data", folder / "run", preset="tiny", network=network, **short)
    print("validation Dice:", summary.scores["dice"])

    predictor = segkit.Predictor.load(summary.run)
    (folder / "masks").mkdir()
    for case in segkit.find_cases(folder / "new").cases:
        scans = {name: nib.load(image.path) for name, image in case.images.items()}
        arrays = {name: scan.get_fdata() for name, scan in scans.items()}  # paths are accepted as well
        prediction = predictor(arrays, affine=scans["t1c"].affine)
        prediction.save(folder / "masks" / f"{case.id}.nii.gz")

    scores = segkit.evaluate(folder / "masks", folder / "new", folder / "scores")
    print("Dice of new cases:", {region: values["dice"]["mean"] for region, values in scores.summary.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
