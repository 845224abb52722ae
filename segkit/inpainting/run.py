"""Training of a network that fills holes in scans, scored on holes in images of held-out patients."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segkit.checkpoint.card import Context, InpaintingCard, ModelCard
from segkit.checkpoint.model import save_model
from segkit.checkpoint.run_folder import WEIGHTS_NAME
from segkit.checkpoint.tensors import load_weights_file
from segkit.errors import RequestError
from segkit.inpainting.config import InpaintingConfig
from segkit.inpainting.dataset import HoleDataset, HoleRules
from segkit.losses.restoration import RestorationConfig, adversarial_terms, restoration_loss, ssim_map
from segkit.models.blocks import SegmentationNetwork
from segkit.models.generator import build_discriminator
from segkit.models.region_layers import RegionNormLearnable
from segkit.models.sample_processes import SampleProcesses
from segkit.preparing.holes import HoleMaker, tumour_components
from segkit.preparing.preprocessing import PreparedCase
from segkit.reading.case import Cohort
from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT, find_known
from segkit.reading.layouts.table import PLAIN_CLASSES, find_cases
from segkit.training.batches import ENDLESS, endless_batches
from segkit.training.config import NetworkConfig
from segkit.training.distributed import Ranks
from segkit.training.task import Batch, RunPlan, Score, SplitData, borrowed, build_card
from segkit.training.unlabelled import UnlabelledKind, choose_dims, find_split, require_same_modalities

_NETWORK = "network."  # prefix of the network's tensors in a `Restoration`
_PATCH = {2: 256, 3: 64}  # default voxels of a patch along each axis
_HELD_OUT_SEED = 2**31  # seed of the held-out holes, different from that of any training hole
_MOST_SHAPES = 200  # most shapes of lesions to draw holes from

_log = logging.getLogger(__name__)


class Restoration(nn.Module):
    """A network and, for adversarial training, a discriminator."""

    def __init__(self, network: nn.Module, discriminator: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.discriminator = discriminator
        self._processes = SampleProcesses()

    def forward(self, x: Tensor) -> Tensor:
        """The restored image (B, C, *spatial) of what `stack_inputs` gives; in training mode at full resolution."""
        found = self._processes(self.network, x)
        return found if isinstance(found, Tensor) else cast(Tensor, found[0])


@dataclass
class InpaintingTask:
    """A network, its training patches, and the held-out holes that choose its best weights."""

    model: nn.Module  # a `Restoration`
    card: ModelCard
    patches: HoleDataset
    held_out: HoleDataset
    restoration: RestorationConfig
    batch_size: int
    supervision: float = 0.0
    adversarial_weight: float = 0.0
    workers: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    images: Mapping[str, int] = field(default_factory=dict)  # number of training cases, by data folder
    method_name: str = "inpainting"
    _held_out: dict[int, Batch] = field(default_factory=dict, repr=False)

    def batches(self, start: int) -> Iterator[Batch]:
        """Endless batches from number `start` on, see `HoleDataset`."""
        device = next(self.model.parameters()).device
        return endless_batches(self.patches, self.batch_size, start, self.workers, self.ranks, device)

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch on the model's device."""
        found = self.model(batch["x"])
        loss = restoration_loss(found, batch["image"], batch["hole"], self.restoration)
        layers = (layer for layer in self.model.modules() if isinstance(layer, RegionNormLearnable))
        supervised = [layer for layer in layers if layer.learning == "supervised"]
        for layer in supervised:
            # Missing voxels whose content is unknown are holes for the layer, too.
            missing = batch["x"][:, batch["image"].shape[1] :][:, :1]
            loss = loss + self.supervision / len(supervised) * layer.supervise(missing)
        discriminator = cast(Restoration, self.model).discriminator
        if discriminator is not None:
            # One backward pass for both: the gradient of each term reaches its own network only.
            of_network, of_discriminator = adversarial_terms(discriminator, found, batch["image"])
            loss = loss + self.adversarial_weight * of_network + of_discriminator
        return loss

    def validate(self, weights: Mapping[str, Tensor]) -> Score:
        """SSIM in the holes of held-out patients; details are the measures."""
        measures = self.measure(weights)
        return Score(measures["ssim"], {"measures": measures})

    @torch.no_grad()
    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the voxels of all held-out holes, in units of the normalised image.

        "ssim", "mae" and "mse" of the network, and "mse_rough" of the first fill, which is its input.
        """
        with borrowed(self.model, weights):
            self.model.eval()
            of_each = self.ranks.map(self._sums_in_hole, range(len(self.held_out)))
        totals = {name: sum(sums[name] for sums in of_each) for name in of_each[0]}
        voxels = max(totals.pop("voxels"), 1.0)
        return {name: total / voxels for name, total in totals.items()}

    def _sums_in_hole(self, number: int) -> dict[str, float]:
        if number not in self._held_out:
            self._held_out[number] = {name: value[None] for name, value in self.held_out[number].items()}
        device, settings = next(self.model.parameters()).device, self.restoration
        x, image, hole = (self._held_out[number][name].to(device) for name in ("x", "image", "hole"))
        found = torch.where(hole, self.model(x).float(), image)
        error = (found - image).abs()
        window, data_range = settings.ssim_window, settings.data_range
        maps = {
            "ssim": ssim_map(found - settings.darkest, image - settings.darkest, window=window, data_range=data_range),
            "mae": error,
            "mse": error.square(),
            "mse_rough": (x[:, : image.shape[1]] - image).square(),
        }
        sums = {name: float((values.mean(1, keepdim=True) * hole.float()).sum()) for name, values in maps.items()}
        return {**sums, "voxels": float(hole.sum())}

    def save(self, run: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write model.safetensors, without a discriminator, and model.json."""
        kept = {name.removeprefix(_NETWORK): value for name, value in weights.items() if name.startswith(_NETWORK)}
        training = self.card.training_data.model_copy(update=dict(facts))
        save_model(run, kept, self.card.model_copy(update={"training_data": training}))

    def take_best(self, run: Path) -> None:
        """Load the network's weights that `save` wrote last."""
        cast(Restoration, self.model).network.load_state_dict(load_weights_file(run / WEIGHTS_NAME))


class InpaintingKind(UnlabelledKind[InpaintingConfig, InpaintingTask]):
    """Training to fill holes in healthy tissue."""

    config_type = InpaintingConfig
    what = "inpainting of scans"

    def find(self, folder: Path, config: InpaintingConfig) -> SplitData:
        """The cases of a folder; voxels with any label of a reference are not healthy."""
        data = config.data
        scheme = data.label_scheme or PLAIN_CLASSES
        cohort = find_cases(folder, layout=data.layout, modalities=data.modalities, label_scheme=scheme)
        if cohort.layout == SYNTHESIS_LAYOUT:
            cohort = find_known(folder)
        if config.modalities is not None:
            cohort = _only(cohort, config.modalities)
        return find_split(folder, cohort, data, config.preprocessing, keeps_references=config.spares_marked)

    def settle(self, config: InpaintingConfig, data: Sequence[SplitData]) -> InpaintingConfig:
        """The settings with axes, patch and context of the network.

        Raises:
            RequestError: the folders or the settings of the network do not fit each other.
        """
        require_same_modalities(data, "Choose with modalities=[...]")
        if (normalisation := config.preprocessing.normalisation) != "scale-nonzero":
            expected = "scale-nonzero, because filled voxels are background or tissue by their intensity alone"
            found = f"preprocessing.normalisation {normalisation} mixes background with tissue"
            raise RequestError(found, expected=expected)
        are_volumes = all(split.cohort.dims == 3 for split in data)
        network = config.network
        dims = choose_dims(network, config.dims, data, "patches")
        if config.fill == "mirrored-detail" and not are_volumes:
            expected = "constant or biharmonic: only heads are taken for symmetric"
            raise RequestError("fill mirrored-detail needs volumes, and these are pictures", expected=expected)
        if network.arguments.get("learning") == "supervised" and _context_of(network) == "none":
            found = "network.arguments.learning=supervised needs the hole as an input, but the network has no context"
            raise RequestError(found, remedy="Set network.arguments.context to hole or mirror")
        if not are_volumes and network.arguments.get("context") == "mirror":
            # Symmetry of the two halves is assumed for heads only.
            network = network.model_copy(update={"arguments": {**network.arguments, "context": "hole"}})
        patches = config.patches
        updates: dict[str, Any] = {}
        if patches.size is None:
            updates["size"] = _PATCH[dims]
        if patches.mirror_axes is None:
            updates["mirror_axes"] = (0,) if are_volumes else (1,)
        return config.model_copy(
            update={"dims": dims, "network": network, "patches": patches.model_copy(update=updates)}
        )

    def card(self, plan: RunPlan[InpaintingConfig]) -> ModelCard:
        """The card, with the context of the network."""
        config, names = plan.config, plan.data[0].cohort.modalities
        context = _context_of(config.network)
        return build_card(
            plan,
            task="inpainting",
            dims=config.dims or 3,
            modalities=names,
            out_channels=len(names),
            identity=f"{config.method}: " + ", ".join(split.name for split in plan.data),
            inpainting=InpaintingCard(context=context, fill=config.fill),
        )

    def patch(self, config: InpaintingConfig) -> tuple[str, int | tuple[int, ...]]:
        """The size of the patches."""
        return "patches.size", config.patches.size or 0

    def build_task(
        self, plan: RunPlan[InpaintingConfig], card: ModelCard, network: SegmentationNetwork
    ) -> InpaintingTask:
        """The task with holes in the cases of all folders, and a discriminator if the settings have one."""
        config = plan.config
        training = [case for data in plan.data for case in data.prepared(data.training_ids)]
        held_out = [case for data in plan.data for case in data.prepared(data.validation_ids)]
        if not held_out:
            _log.warning("no patient can be held out: the measures do not generalise to other patients")
        shapes = lesion_shapes(training) if card.dims == 3 else ()
        _log.info("holes: %d shapes of lesions", len(shapes))
        rules = HoleRules(HoleMaker(config.holes, shapes), config.holes.margin_voxels, config.hidden_lesions)
        patches, adversarial = config.patches, config.adversarial
        changing = replace(rules, mirror_axes=patches.mirror_axes or (), gain=patches.gain, shift=patches.shift)
        discriminator = None
        if adversarial.weight > 0:
            discriminator = build_discriminator(len(card.modalities), card.dims, adversarial.width)
        size, context, fill = card.patch_size, card.context, card.fill
        return InpaintingTask(
            model=Restoration(network, discriminator),
            card=card,
            patches=HoleDataset(training, size, context, fill, changing, seed=config.training.seed, length=ENDLESS),
            held_out=HoleDataset(
                held_out or training, size, context, fill, rules, seed=_HELD_OUT_SEED, length=config.validation_holes
            ),
            restoration=config.loss,
            batch_size=config.batch_size,
            supervision=config.supervision,
            adversarial_weight=adversarial.weight,
            workers=config.training.workers,
            ranks=plan.request.ranks,
            images={data.name: len(data.training_ids) for data in plan.data},
        )


def _context_of(network: NetworkConfig) -> Context:
    context: Context = network.arguments.get("context", "hole" if network.family == "generator" else "none")
    return context


def _only(cohort: Cohort, modalities: tuple[str, ...]) -> Cohort:
    lacking = [name for name in modalities if name not in cohort.modalities]
    if lacking:
        expected = f"modalities among {', '.join(cohort.modalities)}"
        raise RequestError(f"has no modality {', '.join(lacking)}", where=cohort.root, expected=expected)
    cases = tuple(
        replace(case, images={name: case.images[name] for name in modalities if name in case.images})
        for case in cohort.cases
    )
    return replace(cohort, modalities=modalities, cases=cases)


def lesion_shapes(cases: Sequence[PreparedCase]) -> list[NDArray[np.bool_]]:
    """Cropped shapes of the lesions of the cases, at most 200, for holes of the same shape."""
    shapes: list[NDArray[np.bool_]] = []
    for case in cases:
        if case.labels is None or len(shapes) >= _MOST_SHAPES:
            continue
        lesion = np.asarray(case.labels) > 0
        brain = np.asarray(case.image != 0).any(0) | lesion
        shapes += [component.mask for component in tumour_components(lesion, brain)]
    return shapes[:_MOST_SHAPES]
