"""Every situation through check, infer and evaluate, and through a short training where its row says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import segkit
from segkit.labels import SCHEMES, classes_scheme
from segkit.models.table import MODELS
from segkit.reading.layouts.table import find_cases
from tests.step_models import STEPS, write_steps_run
from tests.zoo.build import Expected, Situation
from tests.zoo.files import FILES
from tests.zoo.layouts import LAYOUTS

ZOO: tuple[Situation, ...] = LAYOUTS + FILES

Models = Callable[[Expected], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """One model for all situations with the same channels and classes, whose masks are 1 where a voxel is not 0."""
    patch = pytest.MonkeyPatch()
    patch.setitem(MODELS, "steps", STEPS)

    @cache
    def write(channels: str, classes: str, dims: int) -> Path:
        names = classes.split() or ["label_1"]
        scheme = classes_scheme("classes", {name: value for value, name in enumerate(names, start=1)})
        scheme = SCHEMES["brats2017"] if names == ["NCR", "ED", "ET"] else scheme
        folder = tmp_path_factory.mktemp("model") / "run"
        return write_steps_run(folder, tuple(channels.split()), scheme, dims=dims)

    yield lambda expected: write(expected.channels, expected.classes, 2 if expected.layout == "folder2d" else 3)
    patch.undo()


@pytest.mark.parametrize(("build", "expected"), ZOO, ids=[build.__name__ for build, _ in ZOO])
def test_zoo(build: Callable[[Path], object], expected: Expected, models: Models, tmp_path: Path) -> None:
    data, masks = tmp_path / "data", tmp_path / "masks"
    build(data)
    cohort = find_cases(data)
    found = segkit.check(data, estimate=False)
    assert (
        Expected(
            cases=len(cohort.cases),
            patients=len({case.patient for case in cohort.cases}),
            references=sum(case.label is not None for case in cohort.cases),
            channels=" ".join(cohort.modalities),
            classes=" ".join(cohort.scheme.values) if cohort.scheme else "",
            layout=cohort.layout,
            check=int(not found.is_usable),
            left_out=sum(len(problem.left_out) for problem in found.problems),
            done=expected.done,
            trains=expected.trains,
            is_scored=expected.is_scored,
        )
        == expected
    ), found.all_problems()
    manifest = segkit.infer(models(expected), data, masks, device="cpu", backend="torch", workers=0)
    done = expected.cases if expected.done is None else expected.done
    assert manifest["summary"]["done"] == done, manifest["cases"]
    assert len(manifest["left_out"]) == expected.left_out
    references = {path for case in cohort.cases if case.label for path in case.label.paths()}
    assert manifest["files"]["references"] == len(references)
    assert len([path for path in masks.iterdir() if path.suffix in (".gz", ".png")]) == done
    if expected.references and expected.is_scored:
        scores = segkit.evaluate(masks, data)
        assert (len(scores.cases), scores.errors) == (min(expected.references, done), {})
    if expected.trains:
        short = {"steps": 2, "steps_per_epoch": 1, "live_page": False, "workers": 0}
        small = {"patch_size": (16,) * cohort.dims, "batch_size": 1}
        network = {"arguments": {"widths": [8, 12]}} if cohort.dims == 3 else {"family": "r2unet"}
        summary = segkit.train(
            data, tmp_path / "run", preset="tiny", device="cpu", training=short, planning=small, network=network
        )
        assert set(summary.scores["dice"]) == set(expected.classes.split())
