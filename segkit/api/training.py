"""`segkit.train`, and what it shares with `segkit.pretrain`: settings in layers, and several processes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segkit.api.arguments import AnyPath, CaseIds, nested_settings, parse_gigabytes, parse_minutes, read_case_ids
from segkit.errors import RequestError

if TYPE_CHECKING:
    import torch
    from monai.transforms import Compose

    from segkit.training.config import TrainConfig
    from segkit.training.task import ConfigT, Kind, Summary, TrainingRequest

Layer = tuple[str, Mapping[str, Any]]
"""Where settings come from, and the settings."""
Fold = int | Literal["all"]

_OF_MEMORY = ("mode", "chunks", "encoder_weights")
"""Arguments of a network that another training need not share."""

_log = logging.getLogger(__name__)


def train(
    data: AnyPath,
    run: AnyPath,
    /,
    *,
    preset: str | None = None,
    config: AnyPath | None = None,
    budget: str | float | None = None,
    memory: str | float | None = None,
    weights: AnyPath | None = None,
    fold: Fold | None = None,
    exclude: CaseIds | None = None,
    patients: AnyPath | None = None,
    split: AnyPath | None = None,
    layout: str | None = None,
    label_scheme: str | None = None,
    modalities: Mapping[str, str] | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
    transforms: Compose | None = None,
    **settings: Any,
) -> Summary:
    """Train a segmentation network on a data folder and write a run folder; returns its summary.

    `summary.scores["dice"]` has the mean validation Dice (0 to 1) of each output, `summary.skipped` the reasons of the
    cases left out. Settings come from the preset, then the YAML file `config`, then the arguments. `settings` are
    sections or dotted names: `training={"steps": 100}` and `**{"training.steps": 100}` are the same. `budget` is in
    minutes, or "30m"; `memory` in GiB, or "8G". `fold` is the fold that validates, by default 0, or "all" for
    cross-validation. `exclude` are case ids, or a text file of them; `patients` is a table of case and patient, for
    names without the patient, and `split` a file of folds, such as nnU-Net's splits_final.json. `on_progress`
    is called with the completed share, 0 to 1, and a message. `transforms` are MONAI transforms of patches,
    dictionaries of "image" and "label", after ours (instead of ours with `augmentation={"enabled": False}`); a resumed
    run needs them again.

    Raises:
        RequestError: data and arguments do not fit; ConfigError names every wrong setting. Nothing was written.
        DataError: no case can be used.
        TrainingError: the training diverged.
        InterruptedTrainingError: SIGTERM or Ctrl-C; train again with `resume=True`.

    Example:
        >>> summary = segkit.train("data", "run", budget="30m", optimiser={"lr": 1e-3})  # doctest: +SKIP
        >>> summary.scores["dice"]["WT"]  # doctest: +SKIP
        0.91
    """
    options = TrainingOptions(
        run=Path(run), preset=preset, config=config, settings=nested_settings(settings), budget=budget, memory=memory,
        weights=weights, exclude=exclude, layout=layout, modalities=modalities, device=device, resume=resume,
        overwrite=overwrite, allow_changes=allow_changes, on_progress=on_progress,
        transforms=transforms,
    )  # fmt: skip
    request, kind = segmentation_request(
        data, options, fold=fold, label_scheme=label_scheme, patients=patients, split=split
    )
    return run_training(request, kind, fold)


@dataclass(kw_only=True)
class TrainingOptions:
    """The arguments that `train` and `pretrain` share; see `train`.

    Raises:
        RequestError: there is no such device, or options contradict each other.
    """

    run: Path
    preset: str | None
    config: AnyPath | None
    settings: Mapping[str, Any]
    budget: str | float | None
    memory: str | float | None
    weights: AnyPath | None
    exclude: CaseIds | None
    layout: str | None
    modalities: Mapping[str, str] | None
    device: str
    resume: bool
    overwrite: bool
    allow_changes: bool
    on_progress: Callable[[float, str], None] | None = None
    transforms: Compose | None = None
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        from segkit.runtime import pick_device

        self.torch_device: torch.device = pick_device(self.device)
        if self.allow_changes and not self.resume:
            raise RequestError("--allow-changes is for resumed runs", remedy="Add --resume, or omit --allow-changes")

    def recorded_settings(self) -> Mapping[str, Any]:
        """The settings of the run that is resumed; empty for a new run.

        Raises:
            RequestError: there is no run to resume.
        """
        from segkit.config import read_yaml

        if not self.resume:
            return {}
        if not (self.run / "config.yaml").exists():
            raise RequestError("there is nothing to resume", where=self.run, remedy="Start it without --resume")
        return read_yaml(self.run / "config.yaml")

    def preset_layers(self, folder: str) -> list[Layer]:
        """The preset of a folder; of a resumed run only one that was named."""
        from segkit.config import preset_layers

        name = self.preset or (None if self.resume else preset_for(self.torch_device.type))
        return preset_layers(name, folder)

    def file_layers(self) -> list[Layer]:
        """The settings of the YAML file."""
        from segkit.config import read_yaml

        return [] if self.config is None else [(str(self.config), read_yaml(Path(self.config)))]

    def option_layers(self, of_data: Mapping[str, Any] | None = None, method: str | None = None) -> list[Layer]:
        """The settings by name, and the options that are settings too; `of_data` are further ones of the data."""
        sections = {
            "data": {
                "layout": self.layout,
                "modalities": self.modalities,
                "exclude": read_case_ids(self.exclude or None),
                **(of_data or {}),
            },
            "network": {"weights": None if self.weights is None else Path(self.weights).absolute()},
            "training": {
                "budget_minutes": None if self.budget is None else parse_minutes(self.budget),
                "python_transforms": self.transform_names(),
            },
        }
        given: dict[str, Any] = {
            section: {key: value for key, value in options.items() if value is not None}
            for section, options in sections.items()
        }
        return [("--set", self.settings), ("options", given | ({"method": method} if method else {}))]

    def transform_names(self) -> list[str] | None:
        """Names of the transforms from Python."""
        if self.transforms is None:
            return None
        from segkit.preparing.user_transforms import name_of, parts_of

        return [name_of(part) for part in parts_of(self.transforms)]

    def request(
        self, data: Sequence[AnyPath], kind: Kind[ConfigT, Any], presets: Sequence[Layer], layers: Sequence[Layer]
    ) -> TrainingRequest[ConfigT]:
        """The request: settings of the resumed run, then those of the presets, then those of the other layers.

        Raises:
            RequestError: a setting is not valid, or a resumed run is given other weights to begin with.
        """
        from segkit.config import build_config
        from segkit.training.task import TrainingRequest

        recorded = self.recorded_settings()
        network = recorded.get("network")
        origin = network.get("weights") if isinstance(network, Mapping) else None
        if self.resume and self.weights is not None and str(Path(self.weights).absolute()) != origin:
            raise RequestError(
                f"--weights {self.weights} differs from the run, which began with {origin or 'random weights'}",
                where=self.run,
                remedy="Omit --weights: a resumed run continues with its own weights",
            )
        layers = [(str(self.run / "config.yaml"), recorded), *suited_presets(presets, layers), *layers]
        return TrainingRequest(
            data=tuple(Path(folder) for folder in data),
            run=self.run,
            config=build_config(kind.config_type, layers),
            device=self.torch_device,
            memory_gb=parse_gigabytes(self.memory),
            started_s=self.started_s,
            resume=self.resume,
            overwrite=self.overwrite,
            allow_changes=self.allow_changes,
            on_progress=self.on_progress,
            transforms=self.transforms,
        )


def segmentation_request(
    data: AnyPath,
    options: TrainingOptions,
    *,
    fold: Fold | None = None,
    label_scheme: str | None = None,
    patients: AnyPath | None = None,
    split: AnyPath | None = None,
) -> tuple[TrainingRequest[TrainConfig], Kind[TrainConfig, Any]]:
    """The request of `train`, and its kind of training.

    Raises:
        RequestError: a file, an option or a setting cannot be used.
    """
    from segkit.config import PRESETS
    from segkit.training.segmentation import SegmentationKind

    files = {"patients": patients, "split": split}
    of_data: dict[str, Any] = {"label_scheme": label_scheme, "fold": None if fold == "all" else fold}
    of_data |= {name: None if path is None else Path(path).absolute() for name, path in files.items()}
    layers = [*options.file_layers(), *options.option_layers(of_data)]
    chosen = [layer["preprocessing"] for _, layer in layers if isinstance(layer.get("preprocessing"), Mapping)]
    is_prepared = any(settings.get("normalisation") for settings in chosen)
    layers, kind = [*_network_of(options.weights, is_prepared=is_prepared), *layers], SegmentationKind()
    return options.request([data], kind, options.preset_layers(PRESETS), layers), kind


def run_training(request: TrainingRequest[Any], kind: Kind[Any, Any], fold: Fold | None = None) -> Summary:
    """Train one fold or "all", together with the other processes that torchrun started. SIGTERM ends it as Ctrl-C does.

    Raises:
        InterruptedTrainingError: a signal ended it.
    """
    from segkit.training.distributed import joined_ranks
    from segkit.training.interruption import terminated_as_interrupted
    from segkit.training.run import cross_validate, train

    timeout_s = request.config.training.rank_timeout_s
    with joined_ranks(request.device, timeout_s) as ranks, terminated_as_interrupted():
        request = replace(request, ranks=ranks)
        return cross_validate(request) if fold == "all" else train(request, kind)


def suited_presets(presets: Sequence[Layer], layers: Sequence[Layer]) -> list[Layer]:
    """Presets for the network family that later layers choose.

    A size that the family does not have becomes the nearest one, and arguments that it does not have are left out; both
    are logged.
    """
    from segkit.config import merge

    chosen = (layer["network"] for _, layer in layers if isinstance(layer.get("network"), Mapping))
    network: dict[str, Any] = functools.reduce(merge, chosen, {})
    return [(name, {**layer, "network": _suited_network(layer, network)}) for name, layer in presets]


def _suited_network(preset: Mapping[str, Any], chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    if "family" not in chosen:
        return preset.get("network", {})  # type: ignore[no-any-return]
    from segkit.models.table import MODELS, configure, nearest_size

    network = dict(preset.get("network", {}))
    family, size = chosen.get("family"), network.get("size")
    if not isinstance(family, str) or family not in MODELS or family == network.get("family"):
        return network
    if size is not None and "size" not in chosen:
        network["size"] = nearest_size(family, size)
        if network["size"] != size:
            _log.warning("size %s does not exist for %s; using %s", size, family, network["size"])
    for name, value in network.pop("arguments", {}).items():
        try:
            configure(family, None, {name: value})
        except RequestError:
            _log.warning("network.arguments.%s=%s does not exist for %s; it is not used", name, value, family)
        else:
            network["arguments"] = {**network.get("arguments", {}), name: value}
    return network


def preset_for(device_type: str) -> str:
    """The default preset of a device ("cpu", "cuda", "mps")."""
    return "cpu" if device_type == "cpu" else "default"


def _network_of(weights: AnyPath | None, *, is_prepared: bool) -> list[Layer]:
    """The network of the folder `weights`, as a layer over the preset; none for files without a card.

    Arguments that depend on the memory (mode, chunks) are planned again. A MONAI bundle also gives preprocessing and
    overlap, results of nnU-Net preprocessing and patch; `is_prepared`: another layer chooses the normalisation.

    Raises:
        CheckpointError: there is no usable model.
        RequestError: segkit has no such preprocessing.
    """
    if weights is None or not Path(weights).is_dir():
        return []
    from segkit.checkpoint.run_folder import load_card, model_folders

    card = load_card(model_folders(Path(weights))[0])
    arguments = {name: value for name, value in card.network.arguments.items() if name not in _OF_MEMORY}
    settings: dict[str, Any] = {
        "network": {"family": card.network.family, "size": card.network.size, "arguments": arguments}
    }
    if card.bundle is not None:  # made elsewhere: planning would prepare the images otherwise
        left_out = ",".join(card.bundle.without_counterpart)
        if left_out and not is_prepared:
            raise RequestError(
                f"{left_out} of the bundle has no counterpart in the preprocessing of segkit",
                where=str(weights),
                remedy="Choose the nearest with --set preprocessing.normalisation=...",
            )
        settings |= {"preprocessing": card.preprocessing.model_dump(exclude_none=True), "overlap": card.overlap}
    if "nnunet" in card.versions:
        if card.preprocessing.normalisation is None and not is_prepared:
            raise RequestError(
                "the plans normalise in a way that the preprocessing of segkit has not",
                where=str(weights),
                remedy="Choose the nearest with --set preprocessing.normalisation=...",
            )
        settings["preprocessing"] = card.preprocessing.model_dump(exclude_none=True)
        settings["planning"] = {"patch_size": card.patch_size}
    return [(str(weights), settings)]
