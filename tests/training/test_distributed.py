"""Several processes: who is who, who holds up whom, and that together they do what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from segkit.checkpoint.tensors import load_state
from segkit.cli.train import spread_over
from segkit.errors import RequestError
from segkit.models.table import MODELS
from segkit.pretraining.methods import METHODS
from segkit.runtime import ProcessPlace, process_place
from segkit.training.batches import endless_batches
from segkit.training.distributed import Ranks
from segkit.training.heartbeat import Seen, Sign, find_fault
from segkit.training.interruption import Interruption

sys.path.insert(0, str(Path(__file__).parent))  # the script that the processes run has what the test runs alone
from together import TinyTask, small_unet, train

TOGETHER, STUCK = Path(__file__).with_name("together.py"), Path(__file__).with_name("stuck.py")
HAS_BATCH_STATISTICS = {"smp"}
"""Batch norm: on CPUs each process has its own."""


def start(*command: str | Path, processes: int = 2) -> list[subprocess.Popen[str]]:
    """So many processes of a script, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "PYTHONPATH": paths}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder in which two processes worked together, and what each of them found."""
    folder = tmp_path_factory.mktemp("together")
    started = start(TOGETHER, folder)
    told = [process.communicate(timeout=280) for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors for _, errors in told)
    return folder, [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def test_two_processes_have_the_gradients_and_losses_of_one_with_the_doubled_batch(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    rows: dict[str, Any] = {row["name"]: row for row in together[1][0]["gradients"]}
    assert set(MODELS) | {f"pre-training, {method}" for method in METHODS} < set(rows)
    exact = {name: row for name, row in rows.items() if name not in HAS_BATCH_STATISTICS}
    assert {name: row["without_gradient"] for name, row in rows.items()} == {name: [] for name in rows}
    for name, row in exact.items():
        found = row["float64"]
        assert found["losses"][0] > 0, name
        assert found["gradient"] < 1e-9, name
        assert found["loss"] < 1e-6, name  # AdamW makes steps of rounding where a gradient is all but zero
    assert rows["smp"]["float64"]["gradient"] > 1e-3  # or the exception has become one too many


def test_processes_talk(together: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (found["talk"] for found in together[1])
    assert first["exchanged"] == second["exchanged"] == [0, 10]
    assert first["mapped"] == second["mapped"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert first["from_first"] == second["from_first"] == "said by 0"
    assert (first["own"], second["own"]) == (0, 1)
    assert first["order"] == second["order"] == ["0", "1"]
    assert first["refused"] == ["RequestError", "here: no room", 2, False]
    assert second["refused"] == ["RemoteRankError", "here: no room", 2, True]


def test_runs_of_two_processes_equal_those_of_one_and_go_on_after_a_signal(
    together: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, told = together[0], together[1][0]["learn"]
    train(TinyTask(small_unet(), 2), tmp_path / "alone")
    expected = load_state(tmp_path / "alone")
    for name in ("plain", "parts"):
        run, cut = folder / name, folder / f"{name}-cut"
        found = load_state(run)
        assert list(found["model"]) == list(expected["model"])
        assert found["optimiser"]["state"].keys() == expected["optimiser"]["state"].keys()
        assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
        assert found["progress"]["best"] == pytest.approx(expected["progress"]["best"], abs=1e-3)
        # To end is agreed upon after a step of all; then nothing is missing and nothing is done twice.
        assert told[f"{name} stopped at"] == 4
        assert all("interrupted by" in sentence and "after step 4" in sentence for sentence in told[name])
        resumed = load_state(cut)
        for part in ("model", "average"):
            whole, again = (state[part] if part == "model" else state[part]["average"] for state in (found, resumed))
            assert all(torch.equal(whole[key], again[key]) for key in whole)
        assert losses(cut) == losses(run)
    plain, parts = (load_state(folder / name)["model"] for name in ("plain", "parts"))
    assert max(float((plain[key] - parts[key]).abs().max()) for key in plain) < 1e-3
    assert type(parts["conv_blocks_context.0.0.conv1.weight"]) is torch.Tensor
    with pytest.raises(RequestError, match="trained by 2 processes, now there are 1"):
        train(TinyTask(small_unet(), 2), folder / "plain", resume=True)
    train(TinyTask(small_unet(), 2), folder / "plain", resume=True, allow_changes=True, steps=7)
    assert load_state(folder / "plain")["progress"]["step"] == 7


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("asleep", "rank 1 has not got beyond step 2 for 6 s, last seen loading a batch"),
        pytest.param("killed", "rank 1 is gone; it was last seen", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_holds_up_the_others_is_named(how: str, sentence: str) -> None:
    first, second = start(STUCK, how)
    try:
        _, told = first.communicate(timeout=100)
        assert sentence in told
        assert first.returncode == 1
        assert second.wait(timeout=30) != 0
    finally:
        second.kill()
        second.communicate()


def seen(stage: str, step: int, *, beaten_s: float = 100.0, marked_s: float = 100.0, failure: str = "") -> Seen:
    return Seen(Sign(step=step, stage=stage, failure=failure), beaten_s, marked_s)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ([seen("computing", 7), seen("loading a batch", 7)], None),
        # The one behind gets on: the other waits for it, however long.
        ([seen("updating the weights", 7, marked_s=0), seen("in validation", 6)], None),
        ([seen("waiting", 7, marked_s=0), seen("preparing", 0, marked_s=0)], None),
        (
            [seen("computing", 7, marked_s=0), seen("loading a batch", 7, marked_s=0)],
            "rank 1 has not got beyond step 7 for 50 s, last seen loading a batch",
        ),
        (
            [seen("waiting", 8, marked_s=0), seen("in validation", 8, marked_s=0)],
            "rank 1 has not got beyond step 8 for 50 s, last seen in validation",
        ),
        (
            [seen("computing", 7, marked_s=0), seen("computing", 7, marked_s=0)],
            "rank 0 and rank 1 have not got beyond step 7 for 50 s, last seen computing",
        ),
        (
            [seen("waiting", 3), seen("preparing", 3, beaten_s=80)],
            "rank 1 is gone; it was last seen preparing at step 3",
        ),
        ([Seen(Sign(verdict="rank 2 is gone"), 0, 0), seen("computing", 3)], "rank 2 is gone"),
        ([seen("writing", 3, failure="no room"), seen("computing", 3)], "rank 0 failed at step 3: no room"),
    ],
)
def test_the_one_to_blame(ranks: list[Seen], sentence: str | None) -> None:
    assert find_fault(dict(enumerate(ranks)), now_s=100.0, timeout_s=50.0, silence_s=10.0) == sentence


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(index)}


@pytest.mark.parametrize("start_at", [0, 3])
def test_processes_share_the_batches_of_one(start_at: int) -> None:
    def first_batches(rank: int, size: int, batch_size: int) -> list[list[int]]:
        found = endless_batches(Numbers(), batch_size, start_at, 0, Ranks(rank, size))
        return [next(found)["number"].tolist() for _ in range(3)]

    alone = first_batches(0, 1, 6)
    assert alone[0] == list(range(6 * start_at, 6 * start_at + 6))
    parts = [first_batches(rank, 3, 2) for rank in range(3)]
    assert [list(chain(*of_step)) for of_step in zip(*parts, strict=True)] == alone


def test_torchrun_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_place() == ProcessPlace(rank=0, size=1, local_rank=0, local_size=1)
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert process_place() == ProcessPlace(rank=5, size=8, local_rank=1, local_size=4)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(RequestError, match=r"the rank of this process is unclear \(RANK=8 WORLD_SIZE=8"):
        process_place()
    monkeypatch.delenv("RANK")
    with pytest.raises(RequestError, match="Start processes with torchrun"):
        process_place()


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkit.runtime.devices", lambda: ("cpu",))
    with pytest.raises(RequestError, match="--gpus 2, but this machine has none"):
        spread_over(2, "auto")
    with pytest.raises(RequestError, match="--gpus 2 and --device cpu contradict each other"):
        spread_over(2, "cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="--gpus 2, but torchrun started 3 processes"):
        spread_over(2, "auto")


def test_a_signal_to_one_of_several_waits_until_all_agree(tmp_path: Path) -> None:
    asked = Interruption(is_shared=True)
    asked.note(15)
    assert (asked.stop, asked.stops_here) == (False, True)
    asked.state_is_kept(tmp_path, 3)  # nothing was agreed upon, so nothing ends
    assert asked.stops_here
    asked.agree(stop=True, keep=False)
    assert asked.unless_stopped(lambda: 1) is None
    with pytest.raises(Exception, match="interrupted by SIGTERM after step 4"):
        asked.state_is_kept(tmp_path, 4)
