"""What describes data sets and runs over them: `dataset.json`, tables of BIDS, `manifest.json`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from fuzzing import seeds
from fuzzing.mutators.documents import mutated_json
from fuzzing.mutators.raw import mutated_bytes
from fuzzing.parser import Files, Parser

_TABLE_WORDS = (b"\t", b"\n", b'"', b"-1", b"99999", b"9" * 5000, b"\x00", b"nan")


@cache
def _volume() -> bytes:
    return seeds.packed(seeds.nifti())


def _volumes(*names: str) -> Callable[[], Files]:
    return lambda: {name: _volume() for name in names}


def _cohort(folder: Path, _: Path, layout: str | None = None) -> None:
    from segkit.reading.layouts.table import find_cases

    cohort = find_cases(folder, layout=layout)
    root = folder.resolve()
    for case in cohort.cases:
        for image in (*case.images.values(), *([case.label] if case.label else [])):
            assert image.path.resolve().is_relative_to(root), f"{image.path} lies outside the data set"
    for scheme in (cohort.scheme, *(case.scheme for case in cohort.cases)):
        assert scheme is None or all(0 < value < 256 for value in scheme.values.values())


def _table(folder: Path, path: Path) -> None:
    anat = folder / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for name in ("sub-01_T1w.nii.gz", "sub-01_dseg.nii.gz"):
        (anat / name).write_bytes(_volume())
    _cohort(folder, path, "bids")


def _manifest(folder: Path, _: Path) -> None:
    from segkit.batch.manifest import CaseRecord, Manifest
    from segkit.evaluation.pairing import pair_folders

    manifest = Manifest(folder, ["a", "c"], {}, "abc")
    manifest.was_made("a", "brats2017", ())
    manifest.was_cut_short("c")
    manifest.add(CaseRecord("c", "done"))
    pair_folders(folder, folder / "references", label_scheme="brats2017")


_DATASET = partial(Parser, changes={"": mutated_json}, read=_cohort, first_check="is not readable JSON")

PARSERS = (
    _DATASET(
        "dataset-json-msd",
        lambda: [{"dataset.json": seeds.as_json(seeds.DATASET_MSD)}],
        kept=_volumes(
            *(f"images{'Ts' if n == 'c' else 'Tr'}/{n}.nii.gz" for n in "abc"), *(f"labelsTr/{n}.nii.gz" for n in "ab")
        ),
    ),
    _DATASET(
        "dataset-json-nnunet",
        lambda: [{"dataset.json": seeds.as_json(seeds.DATASET_NNUNET)}],
        kept=_volumes(*(f"imagesTr/{n}_0000.nii.gz" for n in "ab"), *(f"labelsTr/{n}.nii.gz" for n in "ab")),
    ),
    Parser(
        "bids-table",
        lambda: [{"x_dseg.tsv": b"index\tname\n1\tedema\n2\ttumour\n"}],
        {"": partial(mutated_bytes, words=_TABLE_WORDS)},
        _table,
    ),
    Parser(
        "manifest",
        lambda: [{"manifest.json": seeds.as_json(seeds.MANIFEST)}],
        {"": mutated_json},
        _manifest,
        _volumes("a.nii.gz", "references/a.nii.gz", "references/b.nii.gz"),
    ),
)
