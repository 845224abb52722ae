"""Every entry of the corpus is refused or read, and so are a few hundred fresh inputs of each parser.

A defect is: an error that is no sentence, a crash, more than 5 seconds of processor time, more than half a gigabyte, a
file written outside the folder, code that was run. `python tests/fuzz/run.py` looks for more of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from fuzzing.parsers import PARSERS
from fuzzing.runner import Tally, run_jobs
from fuzzing.worker import CORPUS

_CORPUS = Path(__file__).resolve().parent / "corpus"
_INPUTS = 60
_NEEDED = {
    "dicom-frames": "pydicom",
    "dicom-series": "pydicom",
    "dicom-seg": "highdicom",
    "onnx-onnxruntime": "onnxruntime",
    "onnx-openvino": "openvino",
}
_OUTSIDE = ("image-absolute", "image-outside", "label-outside")
_NO_PATHS = ("image-with-nul", "image-of-long-name", "image-of-half-a-letter")
_OF_WRONG_TYPES = ("entry-is-text", "image-is-a-list", "images-are-a-number")
_READ_ALL_THE_SAME = {
    "nifti/extension-of-2-gigabytes--x.nii": "extensions are not read",
    "nifti/extension-of-size-0--x.nii": "extensions are not read",
    "nifti/seven-axes--x.nii": "all but three have length 1",
    "nifti/slope-infinite--x.nii": "a slope that is no number stands for none, as nibabel writes it",
    "nifti/spacing-negative--x.nii": "the sign is that of an axis",
    "zip/names-differ-in-case--x.zip": "these are two files",
    **dict.fromkeys(
        (f"manifest/{name}--manifest.json" for name in ("cases-are-a-number", "remaining-are-objects")),
        "what is no manifest is written anew",
    ),
    "manifest/nested-100000-deep--manifest.json": "what is no manifest is written anew",
    "manifest/scheme-is-an-object--manifest.json": "it names no scheme",
    **dict.fromkeys(
        (
            *(f"dataset-json-msd/{name}--dataset.json" for name in ("image-absolute", "image-outside", *_NO_PATHS)),
            *(
                f"dataset-json-nnunet/{name}--dataset.json"
                for name in ("image-absolute", "image-outside", "entry-is-text")
            ),
            *(f"dataset-json-nnunet/{name}--dataset.json" for name in ("image-is-a-list", "images-are-a-number")),
            *(f"dataset-json-{kind}/label-outside--dataset.json" for kind in ("msd", "nnunet")),
        ),
        "the entry is left out with a complaint, and the others are read",
    ),
}
"""Entries that are not refused as a whole, and why."""


def installed() -> list[str]:
    return [name for name in PARSERS if importlib.util.find_spec(_NEEDED.get(name, "numpy"))]


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    """Of each parser by its name, and of the entries of its corpus by `corpus <name>`."""
    jobs: list[list[Any]] = []
    for name in installed():
        jobs.append([name, 12345, 0, _INPUTS])
        if (_CORPUS / name).is_dir():
            jobs.append([CORPUS + name, None, [str(path) for path in entries(name)]])
    return run_jobs(jobs)


def entries(parser: str) -> list[Path]:
    return sorted((_CORPUS / parser).iterdir())


@pytest.mark.parametrize("parser", PARSERS)
def test_hostile_inputs_are_read_or_refused(parser: str, tallies: dict[str, Tally]) -> None:
    if parser not in tallies:
        pytest.skip(f"{_NEEDED[parser]} is not installed")
    tally = tallies[parser]
    assert not tally.defects
    assert tally.inputs == _INPUTS
    assert tally.accepted > 0, "not even the honest inputs are read"


@pytest.mark.parametrize("parser", [name for name, parser in PARSERS.items() if parser.first_check])
def test_most_inputs_get_beyond_the_first_check(parser: str, tallies: dict[str, Tally]) -> None:
    if parser not in tallies:
        pytest.skip(f"{_NEEDED[parser]} is not installed")
    assert tallies[parser].share_beyond(PARSERS[parser].first_check) > 0.5


@pytest.mark.parametrize("parser", sorted(path.name for path in _CORPUS.iterdir()))
def test_known_attacks_are_refused(parser: str, tallies: dict[str, Tally]) -> None:
    if parser not in tallies:
        pytest.skip(f"{_NEEDED[parser]} is not installed")
    names = [f"{parser}/{path.name}" for path in entries(parser)]
    outcomes = {names[number]: outcome for number, outcome in tallies[CORPUS + parser].outcomes.items()}
    assert list(outcomes) == names
    accepted = {name for name, (outcome, _) in outcomes.items() if outcome == "accepted"}
    assert accepted == {name for name in _READ_ALL_THE_SAME if name.startswith(f"{parser}/")}
    assert not tallies[CORPUS + parser].defects


def test_the_corpus_is_what_its_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import make_corpus

    monkeypatch.setattr(make_corpus, "CORPUS", tmp_path / "corpus")
    make_corpus.main()
    written = sorted(path.relative_to(tmp_path / "corpus") for path in (tmp_path / "corpus").rglob("*--*"))
    assert written == sorted(path.relative_to(_CORPUS) for path in _CORPUS.rglob("*--*"))
