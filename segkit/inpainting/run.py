"""Training of a network that fills holes in scans, measured on scans of held-out patients."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.checkpoint.card import InpaintingCard, ModelCard
from segkit.errors import RequestError
from segkit.inpainting.config import InpaintingConfig
from segkit.inpainting.dataset import HoleDataset, HoleRules
from segkit.inpainting.task import InpaintingTask, Restoration
from segkit.models.blocks import SegmentationNetwork
from segkit.models.generator import build_discriminator
from segkit.preparing.holes import HoleMaker, tumour_components
from segkit.preparing.preprocessing import PreparedCase
from segkit.reading.case import Cohort
from segkit.reading.layouts.brats import SYNTHESIS_LAYOUT, find_known
from segkit.reading.layouts.table import PLAIN_CLASSES, find_cases
from segkit.training.batches import ENDLESS
from segkit.training.task import RunPlan, SplitData, build_card
from segkit.training.unlabelled import UnlabelledKind, choose_dims, find_split, require_same_modalities

_log = logging.getLogger(__name__)

_PATCH = {2: 256, 3: 64}
"""Default voxels of a patch along each axis."""
_HELD_OUT_SEED = 2**31
"""Seed of the held-out holes, different from that of any training hole."""
_MOST_SHAPES = 200
"""Most shapes of lesions to draw holes from."""


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
        if config.preprocessing.normalisation != "scale-nonzero":
            raise RequestError(
                f"preprocessing.normalisation {config.preprocessing.normalisation} mixes background with tissue",
                expected="scale-nonzero, because filled voxels are background or tissue by their intensity alone",
            )
        are_volumes = all(split.cohort.dims == 3 for split in data)
        network = config.network
        dims = choose_dims(network, config.dims, data, "patches")
        if network.arguments.get("learning") == "supervised" and network.arguments.get("context", "none") == "none":
            raise RequestError(
                "network.arguments.learning=supervised needs the hole as an input, but the network has no context",
                remedy="Set network.arguments.context to hole or mirror",
            )
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
        usual = "hole" if config.network.family == "generator" else "none"
        context = config.network.arguments.get("context", usual)
        return build_card(
            plan,
            task="inpainting",
            dims=config.dims or 3,
            modalities=names,
            out_channels=len(names),
            identity=f"{config.method}: " + ", ".join(split.name for split in plan.data),
            inpainting=InpaintingCard().model_copy(update={"context": context}),
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
        size, context = card.patch_size, card.context
        return InpaintingTask(
            model=Restoration(network, discriminator),
            card=card,
            patches=HoleDataset(training, size, context, changing, seed=config.training.seed, length=ENDLESS),
            held_out=HoleDataset(
                held_out or training, size, context, rules, seed=_HELD_OUT_SEED, length=config.validation_holes
            ),
            restoration=config.loss,
            batch_size=config.batch_size,
            supervision=config.supervision,
            adversarial_weight=adversarial.weight,
            workers=config.training.workers,
            ranks=plan.request.ranks,
            images={data.name: len(data.training_ids) for data in plan.data},
        )


def _only(cohort: Cohort, modalities: tuple[str, ...]) -> Cohort:
    """The cohort with these modalities only.

    Raises:
        RequestError: it does not have them.
    """
    lacking = [name for name in modalities if name not in cohort.modalities]
    if lacking:
        raise RequestError(
            f"has no modality {', '.join(lacking)}",
            where=cohort.root,
            expected=f"modalities among {', '.join(cohort.modalities)}",
        )
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
