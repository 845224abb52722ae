"""A training on several GPUs of this machine: the same command, started once for each of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from segkit.errors import RequestError

GpusOption = Annotated[
    int | None, typer.Option("--gpus", help="GPUs of this machine to train on together; torchrun starts more.", min=1)
]


def spread_over(gpus: int | None, device: str | None) -> None:
    """Start this command once for each GPU and end with it, unless it was started so already.

    Raises:
        RequestError: the machine has fewer, or another number was started.
        typer.Exit: all of them have ended.
    """
    from segkit.runtime import may_have_gpu, process_place

    if gpus is None:
        return
    size = process_place().size
    if size > 1:
        if size != gpus:
            raise RequestError(f"--gpus {gpus}, but torchrun started {size} processes", remedy="Leave out --gpus")
        return
    if device is not None and device != "cuda":
        raise RequestError(f"--gpus {gpus} and --device {device} contradict each other", remedy="Leave out one of them")
    found = 0
    if may_have_gpu():
        import torch

        found = torch.cuda.device_count()
    if found < gpus:
        raise RequestError(
            f"--gpus {gpus}, but this machine has {found or 'none'}",
            remedy="Ask for fewer, or train on CPUs with torchrun --nproc-per-node=N -m segkit train ... -d cpu",
        )
    if gpus > 1:
        raise typer.Exit(start_processes(gpus, sys.argv[1:]))


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m segkit` so many times side by side, as torchrun does: the exit code of the first to fail."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={count}", "-m", "segkit", *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
