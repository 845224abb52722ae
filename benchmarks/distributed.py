"""Several processes against one: gradients, loss curves, time and memory, on the CPUs of this machine.

    python benchmarks/distributed.py gradients     # each network and method: two processes, one with the doubled batch
    python benchmarks/distributed.py time          # seconds of a step on two samples, of two threads and of two
                                                   # processes, beside 0, 1, 2 busy processes
    python benchmarks/distributed.py sharded       # a step of STU-Net L whole, and in parts of two processes; 12 GB
    python benchmarks/distributed.py sharded-h     # H in parts, one step without the moments of AdamW; 20 GB

docs/distributed.md has the tables that came out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from segkit.inpainting.run import InpaintingTask, Restoration
from segkit.labels import Output
from segkit.losses.dice_cross_entropy import LossConfig, SegmentationLoss
from segkit.losses.restoration import RestorationConfig
from segkit.models.generator import build_discriminator
from segkit.models.sample_processes import SampleProcesses
from segkit.models.table import MODELS, build_model
from segkit.pretraining.contrastive import Contrast, ContrastiveConfig
from segkit.pretraining.graph_matching import GraphMatching, GraphMatchingConfig
from segkit.pretraining.masked import MaskedReconstruction
from segkit.process_memory import current_rss_mb, keep_freed_memory, peak_rss_mb
from segkit.runtime import autocast, pick_precision
from segkit.training.config import OptimiserConfig
from segkit.training.distributed import Ranks, joined_ranks
from segkit.training.optim import build_optimiser
from segkit.training.sharding import Shards, data_parallel, whole

CPU = torch.device("cpu")
SMALLEST: dict[str, dict[str, object]] = {
    "revmbunet": {"size": "tiny", "widths": (8, 12, 16)},
    "r2unet": {"size": "tiny", "widths": (8, 12, 16)},
    "runet": {"size": "tiny", "widths": (8, 12, 16)},
    "plainunet": {"size": "tiny", "widths": (8, 12, 16)},
    "resencunet": {"size": "tiny", "widths": (8, 12, 16)},
    "monai": {"network_def": {"_target_": "SegResNet", "blocks_down": [1, 1], "blocks_up": [1]}},
    "stunet": {"size": "S", "width": 4},
    "smp": {"size": "unet-small", "encoder_depth": 3, "decoder_channels": (32, 16, 16)},
    "inpainter": {"size": "tiny", "widths": (8, 12, 16)},
    "generator": {"size": "tiny", "width": 8},
    "vit": {
        **{"size": "tiny", "width": 24, "depth": 2, "heads": 2, "window": 2, "global_blocks": (1,)},
        **{"image_size": 64, "neck": 16, "decoder_widths": (16, 16, 16, 16)},
    },
}
"""Arguments that make each family small."""

HAS_BATCH_STATISTICS = {"smp": "batch norm sees the images of its own process; on GPUs it is SyncBatchNorm"}
"""Families that cannot give the same numbers, and why."""

_STEPS, _PACED_STEPS = 3, 10
_IGNORE = 9


class Trained:
    """What `data_parallel` and `Shards` need of a task: a model, and its loss of a batch."""

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor], *, in_parts: bool = False
    ) -> None:
        self.model = model
        self.in_parts = in_parts
        self._loss = loss

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._loss(self.model, batch)

    def twin(self) -> Trained:
        return Trained(copy.deepcopy(self.model), self._loss, in_parts=self.in_parts)


def subjects() -> Iterator[tuple[str, Trained, Mapping[str, Tensor]]]:
    """Name, task, and a batch of two (graph matching: two groups) for two processes to share."""
    outputs = (Output("WT", 1, (1, 2)), Output("TC", 2, (2,)))
    for family in MODELS:
        model = build_model(family, in_channels=2, out_channels=2, dims=2, **SMALLEST[family])
        loss = SegmentationLoss("sigmoid", outputs, LossConfig())
        image = torch.randn(2, 2, *(2 * step for step in model.divisor))
        batch = {"image": image, "label": torch.randint(0, 3, (2, *image.shape[2:])).byte()}
        batch["label"][1] = 0  # which batch Dice and the mean of two Dice see differently
        yield family, Trained(model, partial(_painting_loss, loss)), batch
        if hasattr(model, "units"):
            yield f"{family}, in parts", Trained(model, partial(_painting_loss, loss), in_parts=True).twin(), batch
    for mode in ("checkpoint", "reversible"):
        model = build_model("revmbunet", in_channels=2, out_channels=2, dims=2, mode=mode, **SMALLEST["revmbunet"])
        loss = SegmentationLoss("softmax", outputs, LossConfig())
        batch = {"image": torch.randn(2, 2, 16, 16), "label": torch.randint(0, 3, (2, 16, 16)).byte()}
        yield f"revmbunet, {mode}", Trained(model, partial(_painting_loss, loss)), batch
    label = torch.randint(0, 3, (2, 16, 16)).byte()
    label[0, :, :12] = _IGNORE  # one process has a quarter of its voxels, the other one all
    for activation, names in (("sigmoid", ("WT", "TC")), ("softmax", ("background", "TC"))):
        pair = tuple(Output(name, value, (value,)) for value, name in enumerate(names, start=activation == "sigmoid"))
        model = build_model("revmbunet", in_channels=2, out_channels=2, dims=2, **SMALLEST["revmbunet"])
        task = Trained(model, partial(_painting_loss, SegmentationLoss(activation, pair, ignore=_IGNORE)))
        yield f"revmbunet, {activation}, ignored voxels", task, {"image": torch.randn(2, 2, 16, 16), "label": label}
    yield from _methods()
    yield "inpainting with a discriminator", *_inpainting()


def _painting_loss(
    loss: SegmentationLoss, model: nn.Module, batch: Mapping[str, Tensor], processes: SampleProcesses | None = None
) -> Tensor:
    return loss(processes(model, batch["image"]) if processes else model(batch["image"]), batch["label"])


def _methods() -> Iterator[tuple[str, Trained, Mapping[str, Tensor]]]:
    def network() -> nn.Module:
        return build_model("revmbunet", in_channels=2, out_channels=2, dims=2, **SMALLEST["revmbunet"])

    nodes = 4
    views = {name: torch.randn(2 * nodes, 2, 16, 16) for name in ("first", "second")}
    frames = torch.cat((torch.eye(2), torch.rand(2, 1)), 1).expand(2 * nodes, -1, -1)
    batch = {**views, "first_frame": frames, "second_frame": frames}
    graphs = GraphMatchingConfig(nodes=nodes, edges=2, width=16)
    for name, method in (
        ("masked", MaskedReconstruction(network())),
        ("contrastive", Contrast(network(), ContrastiveConfig(), 2, 2)),
        ("graph-matching", GraphMatching(network(), graphs, 2, 2)),
    ):
        yield f"pre-training, {name}", Trained(method, lambda model, batch: model.loss(batch)), batch


def _inpainting() -> tuple[Trained, Mapping[str, Tensor]]:
    network = build_model("inpainter", in_channels=2, out_channels=2, dims=2, context="hole", **SMALLEST["inpainter"])
    discriminator = build_discriminator(2, 2, 8)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        task = InpaintingTask(
            *(model, None, None, None),  # type: ignore[arg-type]  no card and no data: only the loss is asked for
            RestorationConfig(),
            batch_size=1,
            adversarial_weight=0.1,
        )
        return task.loss(batch)

    image, hole = torch.rand(2, 2, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    hole[0, :, 4:8, 4:8] = True
    hole[1, :, 8:20, 8:24] = True  # of another size: the mean over all hole voxels is not the mean of two means
    x = torch.cat((image.masked_fill(hole, 0), hole.float()), 1)
    return Trained(Restoration(network, discriminator), loss), {"x": x, "image": image, "hole": hole}


def gradients(ranks: Ranks, precisions: Sequence[torch.dtype] = (torch.float32, torch.float64)) -> list[dict[str, Any]]:
    """Half of every batch in each of two processes; in the first, beside it, a model that has the whole of it."""
    rows = []
    torch.manual_seed(0)
    for name, task, batch in subjects():
        row: dict[str, Any] = {"name": name}
        for precision in precisions:
            task.model.to(precision)
            alone = task.twin()
            both = {key: value.to(precision) if value.is_floating_point() else value for key, value in batch.items()}
            mine = {key: value.chunk(ranks.size)[ranks.rank] for key, value in both.items()}
            again = task.twin()
            with _without_rounding(is_wanted=precision == torch.float64):
                spread = Shards(again, CPU, ranks).loss if again.in_parts else data_parallel(again, ranks)  # type: ignore[arg-type]
                curve, found = _learn(partial(spread, mine), again.model, ranks.rank)
            curve = [total / ranks.size for total in ranks.sum(*curve)]
            if ranks.is_first:
                with _without_rounding(is_wanted=precision == torch.float64):
                    expected_curve, expected = _learn(partial(alone.loss, both), alone.model, ranks.rank)
                learning = {key for key, parameter in alone.model.named_parameters() if parameter.requires_grad}
                row[str(precision)[6:]] = {
                    "gradient": _difference(found, expected),
                    "loss": max(abs(one - other) for one, other in zip(curve, expected_curve, strict=True)),
                    "losses": curve,
                }
                row["without_gradient"] = sorted(learning - set(expected))
        rows.append(row)
    return rows


def _without_rounding(*, is_wanted: bool) -> AbstractContextManager[object]:
    """Let losses, which are computed in float32 whatever the network, stay in float64: what differs then is meant."""
    return mock.patch.object(Tensor, "float", Tensor.double) if is_wanted else nullcontext()


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference over the largest gradient."""
    largest = max(value.abs().max() for value in expected.values())
    return float(max((found[name] - expected[name]).abs().max() for name in expected) / largest)


def _learn(loss: Callable[[], Tensor], model: nn.Module, rank: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a few steps, and the gradients of the first."""
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17 + rank)  # the first draws as a single process does, others have streams of their own
        for _ in range(_STEPS):
            found = loss()
            torch.autograd.backward(found)
            first = first or {name: whole(p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(found.detach()))
    return losses, first


def in_parts(ranks: Ranks, size_name: str, steps: int, *, has_moments: bool = True) -> list[dict[str, Any]]:
    """Training steps of a STU-Net on 64 x 64 x 64 voxels, in parts if there are several processes.

    AdamW keeps two moments of every weight; without them it is plain gradient descent.
    """
    torch.manual_seed(0)
    is_shared = ranks.size > 1
    with torch.device("meta") if not ranks.is_first else nullcontext():
        network = build_model("stunet", in_channels=4, out_channels=3, size=size_name, mode="checkpoint")
    loss = SegmentationLoss("sigmoid", (Output("WT", 1, (1, 2, 3)), Output("TC", 2, (2, 3)), Output("ET", 3, (3,))))
    task = Trained(network, partial(_painting_loss, loss))
    step = Shards(task, CPU, ranks).loss if is_shared else data_parallel(task, ranks)  # type: ignore[arg-type]
    built_mb = peak_rss_mb()
    descent = partial(torch.optim.SGD, task.model.parameters(), lr=1e-3)
    optimiser = build_optimiser(task.model, OptimiserConfig()) if has_moments else descent()
    network.train()
    generator = torch.Generator().manual_seed(ranks.rank)
    labels = torch.randint(0, 4, (1, 64, 64, 64), generator=generator).byte()
    image = torch.randn(1, 4, 64, 64, 64, generator=generator)
    losses, seconds = [], 0.0
    for _ in range(steps):
        began = time.monotonic()
        found = step({"image": image, "label": labels})
        torch.autograd.backward(found)
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds = time.monotonic() - began
        losses += [total / ranks.size for total in ranks.sum(float(found.detach()))]
    return ranks.exchange(
        {
            "name": f"STU-Net-{size_name}",
            "processes": ranks.size,
            "built_mb": built_mb,
            "peak_mb": peak_rss_mb(),
            "now_mb": current_rss_mb(),
            "seconds": seconds,
            "losses": losses,
        }
    )


def pace(ranks: Ranks, *, has_sample_processes: bool = False) -> list[dict[str, Any]]:
    """Seconds of a step of `--preset cpu` on two samples, which all processes share, by the network alone.

    Patch and precision are those of the preset: 64 x 64 x 64 voxels, bf16 where the processor has it.
    """
    torch.manual_seed(0)
    network = build_model("revmbunet", in_channels=4, out_channels=3, size="small").train()
    loss = SegmentationLoss("sigmoid", (Output("WT", 1, (1, 2, 3)), Output("TC", 2, (2, 3)), Output("ET", 3, (3,))))
    keep_freed_memory(CPU)  # as a training does
    processes = SampleProcesses() if has_sample_processes else None
    task = Trained(network, partial(_painting_loss, loss, processes=processes))
    step = data_parallel(task, ranks)  # type: ignore[arg-type]
    optimiser = build_optimiser(network, OptimiserConfig())
    shape = (2 // ranks.size, 64, 64, 64)
    batch = {"image": torch.randn(shape[0], 4, *shape[1:]), "label": torch.randint(0, 4, shape).byte()}
    times = []
    for _ in range(_PACED_STEPS):
        ranks.sum(0.0)
        began = time.monotonic()
        with autocast(CPU, pick_precision("auto", CPU)):
            loss_of_batch = step(batch)
        torch.autograd.backward(loss_of_batch)
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.monotonic() - began)
    return [{"processes": ranks.size, "seconds": sorted(times)[len(times) // 2]}]


MEASUREMENTS: dict[str, Callable[[Ranks], list[dict[str, Any]]]] = {
    "gradients": gradients,
    "time": pace,
    "time-samples": partial(pace, has_sample_processes=True),
    "sharded": partial(in_parts, size_name="L", steps=2),
    "sharded-h": partial(in_parts, size_name="H", steps=1, has_moments=False),
}
"""What a process does for each."""


def start(measurement: str, processes: int, threads: int = 1, **variables: str) -> list[dict[str, Any]]:
    """The rows of a measurement that as many processes of this script make together, with environment variables."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, measurement, "--as-process"],
            env={**os.environ, **shared, **variables, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{measurement}: exit codes {[process.returncode for process in started]}")
    rows: list[dict[str, Any]] = json.loads(answers[0])
    return rows


def print_gradients() -> None:
    print("| trained | gradient, float64 | loss, float64 | gradient, float32 | loss, float32 | |")
    print("|---|---|---|---|---|---|")
    for row in start("gradients", 2):
        found = [f"{row[precision][what]:.0e}" for precision in ("float64", "float32") for what in ("gradient", "loss")]
        print(f"| {row['name']} | {' | '.join(found)} | {HAS_BATCH_STATISTICS.get(row['name'], '')} |")


def print_time() -> None:
    spinning, sleeping = {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "passive"}  # the first is libgomp's default
    ways = {
        "two threads share every operation, and spin": ("time", 1, spinning),
        "two threads share every operation, and sleep": ("time", 1, sleeping),
        "a process for each sample": ("time-samples", 1, sleeping),
        "two ranks": ("time", 2, sleeping),
    }
    print("| busy processes | two samples | seconds of a step |\n|---|---|---|")
    for count in range(3):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            for name, (measurement, processes, waiting) in ways.items():
                (row,) = start(measurement, processes, 2 // processes, **waiting)
                print(f"| {count} | {name} | {row['seconds']:.2f} |", flush=True)
        finally:
            for process in busy:
                process.kill()


def print_sharded(measurement: str, numbers: tuple[int, ...]) -> None:
    print("| | processes | built, MB | peak, MB | in the end, MB | seconds of a step | losses |")
    print("|---|---|---|---|---|---|---|")
    for processes in numbers:
        for row in start(measurement, processes, threads=2 // processes):
            megabytes = " | ".join(f"{row[name]:.0f}" for name in ("built_mb", "peak_mb", "now_mb"))
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            print(f"| {row['name']} | {row['processes']} | {megabytes} | {row['seconds']:.0f} | {losses} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=list(MEASUREMENTS))
    parser.add_argument("--as-process", action="store_true", help="be one of the processes that are measured")
    arguments = parser.parse_args()
    if arguments.as_process:
        with joined_ranks(CPU, 3600) as ranks:
            print(json.dumps(MEASUREMENTS[arguments.measurement](ranks)))
    elif arguments.measurement == "gradients":
        print_gradients()
    elif arguments.measurement == "time":
        print_time()
    else:
        print_sharded(arguments.measurement, (1, 2) if arguments.measurement == "sharded" else (2,))


if __name__ == "__main__":
    main()
