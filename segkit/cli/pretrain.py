"""`segkit pretrain`: from folders of unlabelled images to an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import segkit.api.pretraining as api
from segkit.api.training import TrainingOptions
from segkit.cli.options import JsonOption, print_stdout, print_table, verb
from segkit.cli.train import SHARED, GpusOption, TrainingScreen

if TYPE_CHECKING:
    from segkit.training.task import Summary

FoldersArgument = Annotated[
    list[Path], typer.Argument(help="Folders with images, in any layout; references are ignored.")
]
MethodOption = Annotated[
    str | None, typer.Option(help="graph-matching (default), masked, contrastive or inpainting.", show_default=False)
]
EncoderOption = Annotated[
    str | None, typer.Option(help="Network: a family (revmbunet, stunet, inpainter ...) or an smp encoder (resnet50)")
]


@verb(api.pretrain, data=FoldersArgument, method=MethodOption, encoder=EncoderOption, **SHARED)
def pretrain(
    data: list[Path],
    run: Path,
    method: str | None,
    encoder: str | None,
    gpus: GpusOption = None,
    json: JsonOption = False,
    quiet: bool = False,
    **shared: Any,
) -> None:
    """Train an encoder on images without labels, for `segkit train --weights RUN`.

    Networks for images (smp, vit) are trained on pictures or slices of volumes, the others on crops of volumes. One
    patient in five is held out to measure the encoder. --method inpainting trains a network to fill holes, for
    `segkit inpaint -m RUN`.
    """
    screen = TrainingScreen.open(gpus, shared["device"], as_json=json, quiet=quiet)
    request, kind = api.pretraining_request(data, TrainingOptions(run=run, **shared), method=method, encoder=encoder)
    screen.run(request, kind, _show, "segkit", "pretrain", *data, "-o", run, "--resume")


def _show(summary: Summary) -> None:
    before, after = summary.scores["before"], summary.scores["after"]
    rows = [(name, f"{before.get(name, float('nan')):.3f}", f"{value:.3f}") for name, value in after.items()]
    print_table("Held-out images", ("measure", "before", "after"), rows)
    if summary.scores["method"] == "inpainting":
        print_stdout(f"Network: {summary.run}  ->  segkit inpaint -m {summary.run} -i SCANS -o OUT")
    print_stdout(f"Encoder: {summary.run}  ->  segkit train DATA -o RUN --weights {summary.run}")
