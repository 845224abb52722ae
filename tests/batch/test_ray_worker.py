"""What an actor does on its node, called here without Ray, and backends on their way there."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segkit.batch.ray_executor import CaseActor, Orders, RayExecutor, Reply, Share, decisive_versions, marked
from segkit.errors import DataError, RequestError
from segkit.inference.backends import Backend, OnnxRuntimeBackend, OpenvinoBackend, TorchBackend
from segkit.reading.case import Case, ImageFile


@dataclass(frozen=True)
class Task:
    case: Case
    target: Path
    copy: Path

    def inputs(self) -> list[Path]:
        return [file.path for file in self.case.images.values()]

    def moved_to(self, folders: Sequence[Path]) -> Task:
        output, bank = folders
        return replace(self, target=output / self.target.name, copy=bank / "more" / self.copy.name)


class Copying:
    """Work that writes the name of the image to the target and to a file of the same name in another folder."""

    def __call__(self, task: Task) -> str:
        for path in (task.target, task.copy):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(task.case.images["t1"].path.name)
        return f"{task.case.id} done"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    image = tmp_path / "scans" / "a.nii.gz"
    image.parent.mkdir()
    image.touch()
    for name in ("out", "bank"):
        (tmp_path / name).mkdir()
    case = Case("a", "a", {"t1": ImageFile(image)})
    return Task(case, tmp_path / "out" / "a.txt", tmp_path / "bank" / "more" / "a.txt")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "out", tmp_path / "bank"


def opened(orders: Orders) -> CaseActor:
    actor = CaseActor()
    assert actor.open(orders) is None
    actor.work = Copying()  # classes of a test module cannot be unpickled by name
    return actor


NOTHING = pickle.dumps(None)


def test_with_the_output_folders_it_writes_there(task: Task, folders: tuple[Path, Path]) -> None:
    with marked(folders[0]) as mark, marked(folders[1]) as other:
        actor = opened(Orders(NOTHING, folders, (mark, other)))
    assert actor.run(task) == Reply("a done")
    assert [sorted(path.name for path in folder.rglob("*")) for folder in folders] == [["a.txt"], ["a.txt", "more"]]


@pytest.mark.parametrize("shared", [None, 0, 1])
def test_without_one_of_them_the_files_come_back(task: Task, folders: tuple[Path, Path], shared: int | None) -> None:
    marks = None
    if shared is not None:
        marks = (folders[0] / ".mark", folders[1] / ".mark")
        marks[shared].touch()
    actor = opened(Orders(NOTHING, folders, marks))
    reply = actor.run(task)
    assert not task.target.exists()
    assert not task.copy.exists()
    assert reply == Reply("a done", {task.target: b"a.nii.gz", task.copy: b"a.nii.gz"})
    reply.write()
    assert task.target.read_text() == task.copy.read_text() == "a.nii.gz"


def test_a_full_disk_here_is_an_error_of_the_file(task: Task) -> None:
    task.copy.parent.touch()  # a file where a folder should be
    with pytest.raises(DataError, match="cannot be written"):
        Reply(None, {task.copy: b""}).write()


def test_an_image_that_the_node_does_not_have_is_named(task: Task, folders: tuple[Path, Path]) -> None:
    actor = opened(Orders(NOTHING, folders, None))
    path = task.case.images["t1"].path
    path.unlink()
    assert actor.run(task) == Reply(None, unseen=path)


def test_what_keeps_a_node_from_taking_part(tmp_path: Path) -> None:
    orders = Orders(NOTHING, (tmp_path,), None)
    other = replace(orders, versions={**decisive_versions(), "numpy": "1.0", "not-installed-here": "3"})
    assert (
        CaseActor().open(other) == f"has numpy {np.__version__} instead of 1.0: install the same versions on every node"
    )
    broken = CaseActor().open(replace(orders, work=b"nothing that was pickled"))
    assert broken is not None
    assert broken.startswith("cannot open the model: ")
    alone = CaseActor().open(replace(orders, marks=(tmp_path / ".mark",), must_share=True))
    assert alone is not None
    assert alone.startswith(f"does not share the output folder {tmp_path}")


@pytest.mark.parametrize(
    ("share", "room"),
    [(Share(2), 4), (Share(3), 2), (Share(9), 0), (Share(1, gpus=1), 2), (Share(2, memory_gb=1), 3)],
)
def test_room_on_a_node_of_8_cores_2_gpus_and_3_gib(share: Share, room: int) -> None:
    assert share.room({"CPU": 8.0, "GPU": 2.0, "memory": 3.0 * 2**30}) == room


def test_backends_compute_elsewhere_as_they_do_here(tmp_path: Path, write_convolution: Any) -> None:
    window = np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16)).astype(np.float32)
    graphs = [write_convolution(tmp_path / f"{is_split}.onnx", is_split=is_split) for is_split in (False, True)]
    backends: list[Any] = [kind(path, 1) for kind in (OnnxRuntimeBackend, OpenvinoBackend) for path in graphs]
    backends.append(TorchBackend(torch.nn.Conv3d(1, 2, 3).eval()))
    assert (tmp_path / "True.onnx.data").exists()
    pickled = [pickle.dumps(backend) for backend in backends]
    for path in tmp_path.iterdir():
        path.unlink()
    for backend, content in zip(backends, pickled, strict=True):
        other: Backend = pickle.loads(content)
        assert (other.name, other.threads) == (backend.name, backend.threads)
        assert np.array_equal(other(window), backend(window))


def test_without_ray_it_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r'Ray is not installed. pip install "segkit\[ray\]"'):
        RayExecutor([tmp_path], Share(1))
