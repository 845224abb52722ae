"""Folders for the tests of the page: scans with references, masks with a manifest, scores, and a training run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from tests.helpers import save_nifti

REGIONS = ("WT", "TC", "ET")


class Parsed(HTMLParser):
    """Every element of a page with its attributes, and the text from its start to the next tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag):
        self.handle_starttag(f"/{tag}", [])  # what follows is not inside

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def labels_of(case: int) -> np.ndarray:
    """A cube of oedema with an enhancing core, the same in every case but for its place."""
    labels = np.zeros((16, 18, 14), np.uint8)
    labels[3 : 9 + case % 3, 4:11, 3:10] = 2
    labels[5:7, 6:9, 5:8] = 4
    return labels


def scores_of(dice: float) -> dict[str, dict[str, float | None]]:
    return {region: {"dice": dice, "hd95_mm": 10 * (1 - dice), "nsd": None} for region in REGIONS}


def write_data(folder: Path, ids: list[str]) -> None:
    for position, case_id in enumerate(ids):
        labels = labels_of(position)
        image = np.where(labels > 0, 300.0, 100.0) + np.arange(14)
        image[0] = image[:, 0] = image[..., 0] = 0
        own = folder / case_id
        own.mkdir(parents=True)
        for kind in ("t1", "t1ce", "t2", "flair"):
            save_nifti(own / f"{case_id}_{kind}.nii.gz", image.astype(np.float32))
        save_nifti(own / f"{case_id}_seg.nii.gz", labels)


def write_masks(folder: Path, ids: list[str], failed: dict[str, str] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "uncertainty").mkdir()
    records = []
    for position, case_id in enumerate(ids):
        labels = np.roll(labels_of(position), 1, axis=0)
        save_nifti(folder / f"{case_id}.nii.gz", labels)
        entropy = np.where(labels > 0, 0.5, 0.0).astype(np.float32)
        save_nifti(folder / "uncertainty" / f"{case_id}_entropy.nii.gz", entropy)
        stages = {"read": 0.5, "preprocess": 0.25, "predict": 2.0, "decode": 0.125, "write": 0.125}
        predicted = {"peak_rss_mb": 800.0, "seconds": 2.0}
        record = {"case": case_id, "status": "done", "error": None, "seconds": stages, "peak_rss_mb": 1000.0}
        records.append({**record, "label_scheme": "brats2017", "predicted": predicted})
    for case_id, reason in (failed or {}).items():
        records.append({"case": case_id, "status": "failed", "error": reason, "seconds": {}, "peak_rss_mb": 0.0})
    model = {"name": "/home/jane doe/models/glioma", "family": "revmbunet", "size": "base", "backend": "openvino"}
    write_json(folder / "manifest.json", {"cases": records, "model": model, "environment": {"python": "3.12"}})


def write_scores(folder: Path, dice: dict[str, float]) -> None:
    cases = [{"case": case_id, "regions": scores_of(value)} for case_id, value in dice.items()]
    mean = sum(dice.values()) / len(dice)
    entry = {"mean": mean, "median": mean, "n": len(dice), "ci95": [mean - 0.05, mean + 0.05]}
    summary = {region: {"dice": entry} for region in REGIONS}
    bins = {"confidence": [0.25, None, 0.75], "frequency": [0.2, None, 0.9], "ece": 0.125, "ace": 0.1, "brier": 0.0625}
    document = {
        "protocol": "legacy",
        "challenge": "gli",
        "label_scheme": {"name": "brats2017", "labels": {"NCR": 1, "ED": 2, "ET": 4}},
        "cases": cases,
        "summary": summary,
        "reliability": {"WT": {"whole": bins}},
        "errors": [],
    }
    write_json(folder / "scores.json", document)


def write_run(folder: Path, *, is_finished: bool = True, rows: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("# training on /srv/scans/private/gli\nlr: 0.01  # first rate\n")
    lines = []
    for step in range(1, rows + 1):
        row = {"step": step, "loss": 1 / step, "lr": 0.01}
        if step % 10 == 0:
            row |= {"score": 0.5 + step / 1000, "dice": {"WT": 0.6, "ET": None}}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    data = {"identity": "brats2021: gli", "licence": "CC BY 4.0", "cases": 8}
    network = {"family": "revmbunet", "size": "tiny"}
    write_json(folder / "model.json", {"task": "segmentation", "network": network, "training_data": data})
    if is_finished:
        cases = {"BraTS2021_00001": {"WT": 0.75, "ET": 0.5}}
        write_json(folder / "validation.json", {"cases": cases, "minutes": 2.5, "skipped": {}})
