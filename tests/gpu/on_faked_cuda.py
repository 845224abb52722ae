"""Training steps on fake CUDA tensors. `test_fake_cuda.py` runs this file where the stand-in for a driver is preloaded.

(a) A step stays on the device, in the asked precision, and the host never waits for it. (b) It takes as much memory as
planning expects, to 10 %.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from segkit.inference.backends import TorchBackend
from segkit.inference.on_device import painted
from segkit.inference.sliding_window import WindowPlan, plan_windows, predict_slabs
from segkit.inpainting.run import InpaintingTask, Restoration
from segkit.labels import Output, classes_scheme
from segkit.losses.dice_cross_entropy import SegmentationLoss
from segkit.losses.restoration import RestorationConfig
from segkit.models.blocks import SegmentationNetwork
from segkit.models.generator import build_discriminator
from segkit.models.table import MODELS, build_model
from segkit.preparing.augmentation import AugmentationConfig, training_transforms
from segkit.preparing.fingerprint import Fingerprint, Foreground
from segkit.preparing.memory import Computation, step_bytes
from segkit.preparing.patch_sampling import PatchDataset
from segkit.preparing.plan import PlanningRequest, plan_training
from segkit.preparing.preprocessing import Preparation, PreparedCase
from segkit.pretraining.contrastive import Contrast, ContrastiveConfig
from segkit.pretraining.masked import MaskedReconstruction
from segkit.reading.geometry import reorientation_to
from segkit.reading.volume import Grid
from segkit.runtime import Precision
from segkit.training.config import LoopConfig, OptimiserConfig
from segkit.training.distributed import Ranks
from segkit.training.loop import Trainer
from tests.gpu.faked_cuda import DEVICE, faked_cuda, to_cuda
from tests.smallest import SMALLEST

_OUTPUTS = [Output("a", 1, (1, 2)), Output("b", 2, (2,))]
_MODES: list[dict[str, object]] = [{"mode": "checkpoint"}, {"mode": "reversible"}, {"mode": "reversible", "chunks": 4}]
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
"""Operations whose result the host needs before it can go on."""

CASES: list[tuple[str, int, dict[str, object]]] = [
    *((family, dims, {}) for family, entry in MODELS.items() for dims in entry.dims),
    *(("revmbunet", 3, mode) for mode in _MODES),
]
PRECISIONS = [None, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session", autouse=True)
def mode() -> Iterator[FakeTensorMode]:
    """One mode for all tests: networks are built once, and operations on the same shapes are known."""
    with faked_cuda() as mode:
        yield mode


class Host(TorchDispatchMode):
    """What makes the host wait for the device, copies from it and to it, and the types that convolutions get."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.convolved_in: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sign = _sign(func)
        if sign is None:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if sign == "wait" and any(one.device.type == "cuda" for one in given):
            self.waits.append(str(func))
        if sign == "convolution":
            self.convolved_in |= {one.dtype for one in given[:2] if one.device.type == "cuda"}
        if sign == "copy" and given and given[-1].device != result.device:
            is_wait = given[-1].device.type == "cuda"
            (self.waits if is_wait else self.copies).append(f"{func}: {given[-1].device} to {result.device}")
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the method, which is slow


@functools.cache
def _sign(func: Callable[..., Any]) -> str | None:
    """What the host must look at: an operation that may be a wait or a copy, or a convolution."""
    name = str(func)
    if any(sign in name for sign in _WAITS):
        return "wait"
    if name.startswith("aten.conv"):
        return "convolution"
    return "copy" if "_to_copy" in name or "copy_" in name else None


def autocast(precision: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if precision is None else torch.autocast("cuda", precision)


def network_of(family: str, dims: int, channels: int = 2, **arguments: Any) -> SegmentationNetwork:
    chosen: dict[str, Any] = {**SMALLEST[family], **arguments}
    return build_model(family, in_channels=channels, out_channels=channels, dims=dims, **chosen)


_BUILT: dict[str, nn.Module] = {}


def on_cuda(family: str, dims: int, **arguments: Any) -> nn.Module:
    """The network of `network_of` on the device, in training, without gradients; the same for the same arguments."""
    name = f"{family} {dims} {arguments}"
    network = _BUILT.get(name) or to_cuda(network_of(family, dims, **arguments)).train()
    network.zero_grad(set_to_none=True)
    return _BUILT.setdefault(name, network)


def require_on_device(loss: Tensor, network: nn.Module) -> None:
    assert (loss.device, loss.dtype) == (DEVICE, torch.float32)
    learning = [value for value in network.parameters() if value.requires_grad]
    assert all(value.grad is not None and value.grad.device == DEVICE for value in learning)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(("family", "dims", "arguments"), CASES, ids=str)
def test_a_step_stays_on_the_device_and_lets_the_host_run_ahead(
    family: str, dims: int, arguments: dict[str, object], precision: torch.dtype | None
) -> None:
    network = on_cuda(family, dims, **arguments)
    loss_function = to_cuda(SegmentationLoss("sigmoid", _OUTPUTS))
    shape = [max(16, 2 * side) for side in network.divisor]  # type: ignore[union-attr, arg-type]
    image = torch.empty(2, 2, *shape, device=DEVICE)
    labels = torch.zeros(2, *shape, device=DEVICE, dtype=torch.uint8)
    with Host() as host:
        with autocast(precision):
            loss = loss_function(network(image), labels)
        torch.autograd.backward(loss)
    require_on_device(loss, network)
    assert (host.waits, host.copies) == ([], [])
    assert host.convolved_in == {precision or torch.float32}, "forward, backward and what is computed again"


def masked(precision: torch.dtype | None) -> tuple[Tensor, nn.Module]:
    method = to_cuda(MaskedReconstruction(network_of("stunet", 3))).train()
    with autocast(precision):
        return method.loss({"first": torch.empty(2, 2, 64, 64, 64, device=DEVICE)}), method


def contrastive(precision: torch.dtype | None) -> tuple[Tensor, nn.Module]:
    method = to_cuda(Contrast(network_of("smp", 2), ContrastiveConfig(), in_channels=2, dims=2)).train()
    views = {name: torch.empty(4, 2, 64, 64, device=DEVICE) for name in ("first", "second")}
    with autocast(precision):
        return method.loss(views), method


def inpainting(precision: torch.dtype | None) -> tuple[Tensor, nn.Module]:
    image = torch.empty(2, 1, 32, 32, 32, device=DEVICE)
    hole = torch.zeros(2, 1, 32, 32, 32, device=DEVICE, dtype=torch.bool)
    network = network_of("inpainter", 3, channels=1, context="hole")
    model = to_cuda(Restoration(network, build_discriminator(1, 3, 8))).train()
    task = InpaintingTask(model, *(None,) * 3, RestorationConfig(), 2, adversarial_weight=0.1)  # type: ignore[arg-type]
    with autocast(precision):
        return task.loss({"x": torch.cat((image, hole), 1), "image": image, "hole": hole}), model


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("loss_of", [masked, contrastive, inpainting], ids=lambda one: one.__name__)
def test_a_step_without_labels_lets_the_host_run_ahead(
    loss_of: Callable[[torch.dtype | None], tuple[Tensor, nn.Module]], precision: torch.dtype | None
) -> None:
    """Random numbers come from the CPU, so that every device draws the same: copies to the device are allowed."""
    with Host() as host:
        loss, model = loss_of(precision)
        torch.autograd.backward(loss)
    require_on_device(loss, model)
    assert host.waits == []
    assert host.convolved_in == {precision or torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_clipping_the_optimiser_and_the_average_let_the_host_run_ahead(precision: Precision) -> None:
    """A whole step of the training loop, of two batches; the loss is not read, as on a GPU after the first step."""
    network = on_cuda("stunet", 3)
    shape = [max(16, 2 * side) for side in network.divisor]  # type: ignore[union-attr, arg-type]
    loss_function = to_cuda(SegmentationLoss("sigmoid", _OUTPUTS))
    batch = {
        "image": torch.empty(2, 2, *shape, device=DEVICE),
        "label": torch.zeros(2, *shape, device=DEVICE, dtype=torch.uint8),
    }
    task = SimpleNamespace(model=network, loss=lambda batch: loss_function(network(batch["image"]), batch["label"]))
    training = LoopConfig(steps=10, accumulate=2, precision=precision)
    with mock.patch.object(network, "to"), mock.patch.object(Trainer, "_mean_loss", return_value=0.0):
        trainer = Trainer(task, training, OptimiserConfig(), DEVICE, Ranks())  # type: ignore[arg-type]
        with Host() as host:
            trainer.step(itertools.repeat(batch), 1e-3)
    assert (host.waits, host.convolved_in) == ([], {_DTYPES[precision]})
    assert [loss.device for loss in trainer.late] == [DEVICE] * 2
    assert trainer.optimiser.defaults["fused"]


def test_patches_are_made_on_the_device_without_a_wait_of_the_host(mode: FakeTensorMode) -> None:
    """Every change, with its random numbers of the host; each as certain as it can be."""
    grid = Grid((40, 40, 40), np.eye(4))
    way = Preparation(grid, reorientation_to(grid, "IJK"), ((0,) * 3, grid.shape), grid.shape, (1.0,) * 3)
    case = PreparedCase("case", np.ones((2, 40, 40, 40), np.float32), np.ones((40, 40, 40), np.uint8), way)
    certain = dict.fromkeys([name for name in AugmentationConfig.model_fields if name.endswith("_probability")], 1.0)
    config = AugmentationConfig(mirror_axes=(0, 1, 2), modality_dropout=0.999, **certain)
    transforms = training_transforms(config, (16, 16, 16), foreground_fraction=0.0)
    patches = PatchDataset([case], transforms, seed=0, length=10, gives_boxes=True)
    with unset_fake_temporarily():
        boxes = [patches[index] for index in range(2)]
    boxes = tree_map_only(Tensor, mode.from_tensor, boxes)
    from_numpy, generator = torch.from_numpy, torch.Generator()  # one of a GPU needs a GPU
    with (
        mock.patch("torch.from_numpy", lambda array: mode.from_tensor(from_numpy(array))),
        mock.patch("torch.Generator", return_value=generator),
        Host() as host,
    ):
        batch = patches.patches_of(boxes, DEVICE)
    assert {key: (value.device, tuple(value.shape)) for key, value in batch.items()} == {
        "image": (DEVICE, (2, 2, 16, 16, 16)),
        "label": (DEVICE, (2, 16, 16, 16)),
    }
    assert host.waits == []


@contextmanager
def a_scan_on_the_device(
    mode: FakeTensorMode, outputs: int
) -> Iterator[tuple[Callable[[], tuple[Tensor, Tensor]], WindowPlan]]:
    """A function that computes a scan of 2 x 3 windows, resampled to a finer grid: labels, and if a logit is NaN."""
    shape, target = (32, 48, 64), (35, 53, 70)
    plan = plan_windows(shape, (32,) * 3, 0.5, axis=2)
    grid = Grid(target, np.eye(4))
    way = Preparation(grid, reorientation_to(grid, "IJK"), ((0,) * 3, target), shape, (1.0,) * 3)
    image, values = np.zeros((2, *shape), np.float32), np.arange(outputs, dtype=np.uint8)
    from_numpy = torch.from_numpy
    with ExitStack() as stack:
        stack.enter_context(mock.patch("segkit.inference.on_device.available_memory_gb", return_value=80.0))
        for name in ("reset_peak_memory_stats", "max_memory_allocated", "memory_allocated"):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=0))
        stack.enter_context(mock.patch("torch.from_numpy", lambda array: mode.from_tensor(from_numpy(array))))
        network = to_cuda(build_model("stunet", in_channels=2, out_channels=outputs, dims=3, **SMALLEST["stunet"]))
        backend = TorchBackend(network, DEVICE, precision="bf16")

        def compute() -> tuple[Tensor, Tensor]:
            return painted(predict_slabs(backend, image, plan), target, shape, "softmax", values, way)

        yield compute


def test_a_scan_is_blended_and_painted_without_a_wait_of_the_host(mode: FakeTensorMode) -> None:
    counts = []
    for outputs in (3, 26):
        with a_scan_on_the_device(mode, outputs) as compute, Host() as host:
            labels, is_nan = compute()
        assert (labels.device, labels.dtype, tuple(labels.shape)) == (DEVICE, torch.uint8, (35, 53, 70))
        assert is_nan.device == DEVICE
        assert host.waits == []
        assert host.convolved_in == {torch.bfloat16}
        counts.append(len(host.copies))
    assert counts[0] == counts[1] == 3 + 3 + 3 * 9, "images of 3 rows; two weights and values; 9 of a resampled slab"


class Alive(TorchDispatchMode):
    """The most bytes of storages that existed at the same time, of those that operations made."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._given = {one.untyped_storage()._cdata for one in network.state_dict(keep_vars=True).values()}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        self._made = {key: value for key, value in self._made.items() if not value[0].expired()}
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def bytes_of_a_step(network: nn.Module, shape: tuple[int, ...], precision: torch.dtype | None) -> int:
    """Counted as the training computes it; with the image and the labels of the batch."""
    loss_function = to_cuda(SegmentationLoss("sigmoid", _OUTPUTS))
    image = torch.empty(shape, device=DEVICE)
    labels = torch.zeros(shape[:1] + shape[2:], device=DEVICE, dtype=torch.uint8)
    with Alive(network) as alive:
        with autocast(precision):
            loss = loss_function(network(image), labels)
        torch.autograd.backward(loss)
    return alive.peak + image.nbytes + labels.nbytes


MEMORY_CASES: list[tuple[str, int, dict[str, object]]] = [
    *(("revmbunet", 3, {"size": "tiny", "widths": (16, 32, 64), **mode}) for mode in ({"mode": "plain"}, *_MODES)),
    ("stunet", 3, {"width": 16}),
    ("r2unet", 3, {"widths": (16, 32, 64)}),
    ("resencunet", 3, {}),
    ("inpainter", 3, {}),
    ("smp", 2, {}),
]
_NAMES: dict[torch.dtype | None, Precision] = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_DTYPES: dict[Precision, torch.dtype] = {name: dtype or torch.float32 for dtype, name in _NAMES.items()}


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "dims", "arguments"), MEMORY_CASES, ids=str)
def test_planning_expects_the_memory_that_cuda_takes(
    family: str, dims: int, arguments: dict[str, object], precision: torch.dtype | None
) -> None:
    network = on_cuda(family, dims, **arguments)
    sides = [max(64, 2 * side) for side in network.divisor]  # type: ignore[union-attr, arg-type]
    shape = (2, 2, *sides)
    taken = bytes_of_a_step(network, shape, precision)

    def loss(*given: Any) -> Tensor:
        return SegmentationLoss("sigmoid", _OUTPUTS)(*given)  # type: ignore[no-any-return]

    on_device = Computation(DEVICE, _NAMES[precision])
    planned = step_bytes(lambda: network_of(family, dims, **arguments), shape, loss, on_device)
    assert planned == pytest.approx(taken, rel=0.1)


def test_bytes_of_a_stack_of_convolutions_by_hand() -> None:
    """Convolutions 1 -> 4 -> 2 with a ReLU between them, in bf16, the mean of the output as loss; N voxels.

    At the widest moment the gradient passes the ReLU: image 4 N and labels N, image in bf16 2 N, output of the ReLU
    8 N, its gradient 8 N, and that of its input 8 N.
    """

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv3d(4, 2, 1, bias=False))

    planned = step_bytes(build, (1, 1, 32, 32, 32), lambda y, _: y.mean(), Computation(DEVICE, "bf16"))
    assert planned == pytest.approx(31 * 32**3, rel=0.001)


@pytest.mark.parametrize(("classes", "memory_gb"), [(104, 24.0), (26, 11.0)])
def test_scans_of_many_classes_are_planned_on_a_gpu(classes: int, memory_gb: float) -> None:
    """A GPU holds a window of logits, not those of a whole scan of 512 x 512 x 600 voxels: 64 GB of 104 classes."""
    shape = (512, 512, 600)
    scans = Fingerprint(
        cases=10,
        dims=3,
        modalities=("ct",),
        shapes=(shape,),
        cropped_shapes=(shape,),
        spacings_mm=((1.0, 1.0, 1.0),),
        zero_fraction=0.0,
        is_ct=True,
        foreground=Foreground(low=-50, high=200, mean=60, std=30),
        seconds_per_case=1.0,
    )
    scheme = classes_scheme("organs", {f"organ {number}": number for number in range(1, classes + 1)})
    plan = plan_training(scans, scheme, PlanningRequest("stunet", "S"), memory_gb, DEVICE)
    assert plan.patch_size == (128, 128, 128)
    assert plan.memory_gb < memory_gb
