"""What test_distributed.py asks of several processes: `python together.py FOLDER`, started as torchrun would."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.checkpoint.tensors import load_state
from segkit.errors import RequestError, SegkitError
from segkit.labels import Output
from segkit.losses.dice_cross_entropy import SegmentationLoss
from segkit.models.table import build_model
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.distributed import Ranks, joined_ranks
from segkit.training.interruption import InterruptedTrainingError
from segkit.training.loop import fit
from segkit.training.task import Score, borrowed

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
SHORT = {"steps": 6, "steps_per_epoch": 3, "ema_decay": 0.5, "accumulate": 2, "precision": "fp32"}


class TinyTask:
    """A small network on random patches: items are decided by their number, and shared as `endless_batches` does."""

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        ranks: Ranks | None = None,
        before_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.ranks = ranks or Ranks()
        self.before_step = before_step
        self._loss = SegmentationLoss("softmax", (Output("background", 0, (0,)), Output("one", 1, (1,))))
        self.saved: dict[str, Tensor] = {}

    def batches(self, start: int) -> Iterator[Mapping[str, Tensor]]:
        while True:
            first = (start * self.ranks.size + self.ranks.rank) * self.batch_size
            items = [torch.Generator().manual_seed(number) for number in range(first, first + self.batch_size)]
            image = torch.stack([torch.randn(1, 16, 16, generator=item) for item in items])
            self.before_step(start)
            yield {"image": image, "label": (image[:, 0] > 0.5).byte()}
            start += 1

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._loss(self.model(batch["image"]), batch["label"])

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        with borrowed(self.model, weights), torch.no_grad():
            self.model.eval()
            scores = self.ranks.map(self._score, range(3))
        return Score(sum(scores))

    def _score(self, number: int) -> float:
        image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(10_000 + number))
        return float(self.model(image).mean())

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.saved = {name: value.detach().clone() for name, value in weights.items()}


def small_unet() -> nn.Module:
    torch.manual_seed(3)
    strides = ((2, 2), (2, 2), (1, 1), (1, 1), (1, 1))
    return build_model("stunet", in_channels=1, out_channels=2, dims=2, size="S", width=2, strides=strides)


def train(task: TinyTask, run: Path, *, resume: bool = False, allow_changes: bool = False, **settings: Any) -> str:
    """Train for six steps, validated after three; the sentence of an interruption, or nothing."""
    (run / "figures").mkdir(parents=True, exist_ok=True)
    training = LoopConfig(**{**SHORT, **settings})
    try:
        fit(
            task,
            run,
            training,
            OptimiserConfig(lr=1e-3),
            device=CPU,
            ranks=task.ranks,
            resume=resume,
            allow_changes=allow_changes,
        )
    except InterruptedTrainingError as error:
        return str(error)
    return ""


def talk(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Everything that travels between processes."""
    log = folder / "order.txt"

    def note() -> int:
        with log.open("a") as file:
            file.write(f"{ranks.rank}\n")
        return ranks.rank

    def refuse() -> int:
        raise RequestError("no room", where="here")

    found: dict[str, Any] = {
        "exchanged": ranks.exchange(10 * ranks.rank),
        "mapped": ranks.map(lambda item: (item, ranks.rank), range(5)),
        "from_first": ranks.from_first(lambda: f"said by {ranks.rank}"),
        "own": ranks.first_before_others(note),
    }
    try:
        ranks.from_first(refuse)
    except SegkitError as error:
        found["refused"] = [type(error).__name__, str(error), error.exit_code, error.is_reported]
    found["order"] = ranks.exchange(None) and log.read_text().split()
    return found


def learn(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Runs of two processes, whole and in parts, cut off by a signal to one of them and gone on with."""
    found: dict[str, Any] = {}

    def stop_second(step: int) -> None:
        if step == 6 and ranks.rank == 1:  # two batches a step: while the fourth step begins
            os.kill(os.getpid(), signal.SIGTERM)

    for name, settings in (("plain", {}), ("parts", {"sharding": "full"})):
        cut, run = folder / f"{name}-cut", folder / name
        train(TinyTask(small_unet(), 1, ranks), run, **settings)
        found[name] = ranks.exchange(train(TinyTask(small_unet(), 1, ranks, stop_second), cut, **settings))
        found[f"{name} stopped at"] = load_state(cut)["progress"]["step"]
        found[f"{name} resumed"] = train(TinyTask(small_unet(), 1, ranks), cut, resume=True, **settings)
    return found


def all_that_goes_well(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """In one start of the processes, for each costs seconds."""
    sys.path.insert(0, str(BENCHMARKS))
    import distributed  # benchmarks/distributed.py, which measures the same for people

    return {
        "gradients": distributed.gradients(ranks, [torch.float64]),
        "talk": talk(folder, ranks),
        "learn": learn(folder, ranks),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined_ranks(CPU, 60) as ranks:
        (folder / f"{ranks.rank}.json").write_text(json.dumps(all_that_goes_well(folder, ranks)))
