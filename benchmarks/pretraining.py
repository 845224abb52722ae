"""What pre-training is worth with ten labelled cases: hippocampus, in 3D and slice by slice, and LVM-Med's ablation.

Run with `python benchmarks/pretraining.py DATA/Task04_Hippocampus OUT [3d 2d ablation] [--set key=value]`; about half
an hour on one core for each of the three. Each method learns for the same time from the 160 images that are not held
out, then ten labelled cases fine-tune its network with three seeds (the ablation: one), and so they do random weights.
Scores are those of the 40 held-out cases on their own grid. What is finished is not done again, so a run that was
interrupted is continued by the same command; without it, only the table is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "benchmarks/hippocampus_held_out.txt"
FINE_TUNING = ("training.steps=150", "training.steps_per_epoch=50", "planning.patch_size=[32,32,32]")
EVERY = 16
"""One case in so many of those not held out has a label: ten."""
METHODS = ("graph-matching", "masked", "contrastive", "inpainting")


@dataclass(frozen=True)
class Part:
    """One comparison: the encoder, its settings, and what is compared by name, each with settings of its own.

    Inpainting, which has no views, has settings in place of those of the other methods.
    """

    encoder: str
    settings: tuple[str, ...]
    inpainting: tuple[str, ...]
    arms: dict[str, tuple[str, ...] | None]
    seeds: tuple[int, ...]
    budget: str = "4m"


IN_3D = ("network.size=tiny", "views.size=32", "batch_size=16", "validation_groups=2")
HOLES = ("spares_marked=false", "holes.diameter_range=[5,14]", "validation_holes=16", "training.ema_decay=0")
HOLES_IN_3D = ("network.size=tiny", "patches.size=32", "batch_size=4", *HOLES)
HOLES_IN_2D = ("patches.size=64", "batch_size=32", *HOLES)
IN_2D = ("views.size=64", "batch_size=32", "validation_groups=4")
EACH_METHOD: dict[str, tuple[str, ...] | None] = {"random": None, **{name: (f"method={name}",) for name in METHODS}}
PARTS = {
    "3d": Part("revmbunet", IN_3D, HOLES_IN_3D, EACH_METHOD, seeds=(0, 1, 2)),
    "2d": Part("resnet18", IN_2D, HOLES_IN_2D, EACH_METHOD, seeds=(0, 1, 2)),
    "ablation": Part(
        "resnet18",
        IN_2D,
        (),
        {
            "full": (),
            "first order": ("graph_matching.solver.order=1",),
            "no noise": ("graph_matching.gradient.noise=none",),
            "no messages": ("graph_matching.layers=0",),
            "messages alone": ("graph_matching.residual=false",),
            "no local": ("graph_matching.global_share=1.0",),
        },
        seeds=(0,),
        budget="3m",
    ),
}


def main() -> None:
    """Do what is not done yet of the parts asked for, and print the tables of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--set", action="append", default=[], help="a setting of every pre-training run")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    held_out, unlabelled = write_lists(asked.data, asked.out)
    for name in asked.parts:
        part = PARTS[name]
        for arm, settings in part.arms.items():
            encoder = asked.out / name / arm.replace(" ", "-")
            if settings is not None and not (encoder / "validation.json").exists():
                pretrain(asked.data, encoder, part, (*settings, *asked.set))
            for seed in part.seeds:
                run = asked.out / name / f"{encoder.name}-{seed}"
                if not (run / "held_out.json").exists():
                    fine_tune(asked.data, run, part, encoder if settings is not None else None, seed, unlabelled)
                    score(asked.data, run, held_out)
    for name in PARTS:
        print_table(asked.out / name, PARTS[name])


def write_lists(data: Path, out: Path) -> tuple[Path, Path]:
    """The list of the held-out cases, and that of all but the ten with labels."""
    ids = sorted(path.name.removesuffix(".nii.gz") for path in (data / "imagesTr").glob("hippo*.nii.gz"))
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    held_out = {line for line in lines if line and not line.startswith("#")}
    labelled = [case_id for case_id in ids if case_id not in held_out][::EVERY]
    unlabelled = out / "unlabelled.txt"
    unlabelled.write_text("\n".join(case_id for case_id in ids if case_id not in labelled) + "\n", encoding="utf-8")
    return HELD_OUT, unlabelled


def pretrain(data: Path, run: Path, part: Part, settings: tuple[str, ...]) -> None:
    """Train an encoder on the images that are not held out."""
    options = ["--preset", "cpu", "--encoder", part.encoder, "--exclude", str(HELD_OUT), "--budget", part.budget]
    common = part.settings
    if "method=inpainting" in settings:
        options, common = [*options, "--method", "inpainting"], part.inpainting
    segkit("pretrain", str(data), "-o", str(run), *options, "--overwrite", *sets((*common, *settings)))


def fine_tune(data: Path, run: Path, part: Part, encoder: Path | None, seed: int, unlabelled: Path) -> None:
    """Train the whole network on the labelled cases."""
    if encoder is not None:
        start = ["--weights", str(encoder)]
    elif part.encoder == "revmbunet":
        start = sets(("network.size=tiny",))
    else:
        network = ("network.family=smp", "network.size=unet", f"network.arguments.encoder={part.encoder}")
        start = sets(network)
    options = ["--preset", "tiny", "--exclude", str(unlabelled), "--overwrite", *start]
    segkit("train", str(data), "-o", str(run), *options, *sets((*FINE_TUNING, f"training.seed={seed}")))


def score(data: Path, run: Path, held_out: Path) -> None:
    """Segment the held-out cases and keep the mean Dice of both parts of the hippocampus."""
    masks = run / "masks"
    segkit("infer", "-m", str(run), "-i", str(data), "-o", str(masks), "--cases", str(held_out), "--overwrite")
    found = segkit("evaluate", "-p", str(masks), "-r", str(data / "labelsTr"), "--json", "-q")
    summary = json.loads(found)["summary"]
    dice = {region: metrics["dice"]["mean"] for region, metrics in summary.items()}
    document = {"dice": dice, "mean": statistics.mean(dice.values())}
    (run / "held_out.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def segkit(*arguments: str) -> str:
    """What a command prints to standard output; its log is shown."""
    command = [sys.executable, "-m", "segkit", *arguments]
    print("$ segkit", *arguments, file=sys.stderr, flush=True)
    if arguments[0] in ("train", "pretrain", "infer"):
        command += ["-d", "cpu"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def sets(settings: tuple[str, ...]) -> list[str]:
    """`--set` before each."""
    return [part for setting in settings for part in ("--set", setting)]


def print_table(folder: Path, part: Part) -> None:
    """One line for each arm that is finished: Dice of the held-out cases, and what pre-training measured."""
    rows = []
    for arm in part.arms:
        runs = [folder / f"{arm.replace(' ', '-')}-{seed}" / "held_out.json" for seed in part.seeds]
        scores = [json.loads(path.read_text(encoding="utf-8"))["mean"] for path in runs if path.exists()]
        if not scores:
            continue
        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
        each = " ".join(f"{value:.3f}" for value in scores)
        rows.append(f"| {arm} | {statistics.mean(scores):.3f}{spread} | {each} | {measured(folder, arm)} |")
    if rows:
        print(f"\n### {folder.name}\n\n| begins with | Dice | each seed | held-out images, before and after |")
        print("|---|---|---|---|", *rows, sep="\n")


def measured(folder: Path, arm: str) -> str:
    """The most informative measures of a pre-training run."""
    path = folder / arm.replace(" ", "-") / "validation.json"
    if not path.exists():
        return ""
    summary = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in ("matching", "explained", "encoder_retrieval", "ssim") if name in summary["after"]]
    shown = [f"{name} {summary['before'][name]:.2f} → {summary['after'][name]:.2f}" for name in names]
    return f"{', '.join(shown)}; {summary['steps']} steps"


if __name__ == "__main__":
    main()
