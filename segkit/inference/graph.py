"""Write a network as an ONNX file: windows to logits.

Torch's exporter writes group norm as instance norm between two reshapes, for which OpenVINO converts the whole map from
channels-last to channels-first and back: half of the time of a network with such norms. Here it becomes sums over the
axes of a window and arithmetic per channel, which keep the layout.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkit.errors import CheckpointError, RequestError
from segkit.reading.files import written_atomically

if TYPE_CHECKING:
    from torch import Tensor, nn

INPUT, OUTPUT = "image", "logits"
"""Names of the graph's input (B, C, *window) and output (B, K, *window), both float32, B free."""

LARGEST_FILE_BYTES = 1_900_000_000
"""Larger weights are written to a separate file: the format is limited to 2 GiB."""

OPSET = 20
_EXPORTERS = ("onnx", "onnxscript")

_log = logging.getLogger(__name__)


def write_graph(
    network: nn.Module, path: Path, channels: int, window: Sequence[int], *, external_data: bool | None = None
) -> None:
    """Write a network in evaluation mode for windows (B, channels, *window); of a list of logits, the first.

    The file is written atomically. With `external_data` the weights are in `<name>.data` beside it; None decides by
    their size. The network's training mode is restored.

    Raises:
        RequestError: onnx or onnxscript is not installed.
        CheckpointError: the network cannot be written as a graph.
        DataError: the folder cannot be written to.
    """
    require_onnx()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    is_split = size > LARGEST_FILE_BYTES if external_data is None else external_data
    with written_atomically(path) as temporary:
        folder = temporary.with_suffix(".parts")
        folder.mkdir()
        try:
            draft = folder / path.name
            _export(network, draft, channels, window, is_split=is_split)
            for part in sorted(set(folder.iterdir()) - {draft}):
                part.replace(path.with_name(part.name))
            draft.replace(temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def graph_files(path: Path) -> list[Path]:
    """The files of a graph: the ONNX file and, if there is one, its file of weights."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.is_file() else [path]


def missing_exporters() -> list[str]:
    """The packages that writing graphs needs and that are not installed."""
    return [name for name in _EXPORTERS if importlib.util.find_spec(name) is None]


def require_onnx(otherwise: str = "") -> None:
    """RequestError if graphs cannot be written here; `otherwise` ends its remedy."""
    if missing := missing_exporters():
        found = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        expected = "what turns a network into an ONNX file"
        raise RequestError(found, expected=expected, remedy=f"pip install 'segkit[onnx]'{otherwise}")


def _export(network: nn.Module, path: Path, channels: int, window: Sequence[int], *, is_split: bool) -> None:
    """Write the graph, with the older exporter if the newer one fails."""
    import torch

    # A batch size of 1 would become fixed.
    device = next(itertools.chain(network.parameters(), network.buffers())).device
    image = torch.zeros(2, channels, *window, device=device)
    with torch.no_grad(), evaluating(network), _without_layouts():
        try:
            with quiet():
                _by_capture(network, image, path, is_split=is_split)
        except Exception as error:
            reason = _first_line(error)
        else:
            return
        _log.info("the exporter failed (%s); trying the older one, which traces", reason)
        for part in path.parent.iterdir():
            part.unlink()
        try:
            with quiet():
                _by_tracing(network, image, path, is_split=is_split)
        except Exception as error:
            raise CheckpointError(
                f"the network cannot be written as a graph: {reason}; with the older exporter: {_first_line(error)}",
                expected="one of the networks of `segkit models`",
            ) from error


def _by_capture(network: nn.Module, image: Tensor, path: Path, *, is_split: bool) -> None:
    import torch
    from onnx_ir.passes.common import LiftConstantsToInitializersPass
    from onnxscript import optimizer

    program: Any = torch.onnx.export(
        network,
        (image,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.aten.group_norm.default: _group_norm},
        # Optimising takes half of the time, and the runtimes do it again.
        optimize=False,
        verbose=False,
    )
    optimizer.fold_constants(program.model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of code, with paths
        # The exporter gives convolutions without a bias one of zeros, in 3D of a shape that OpenVINO rejects.
        if node.op_type == "Conv" and not (node.inputs[2] is None or node.inputs[2].const_value.numpy().any()):
            node.resize_inputs(2)
    optimizer.remove_unused_nodes(program.model)
    program.save(path, external_data=is_split)


def _by_tracing(network: nn.Module, image: Tensor, path: Path, *, is_split: bool) -> None:
    import onnx
    import torch

    folder = path.parent / "traced"  # weights beyond 2 GiB are written as one file each
    folder.mkdir()
    torch.onnx.export(
        network,
        (image,),
        folder / path.name,
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        dynamo=False,
        dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        verbose=False,
    )
    model = onnx.load(folder / path.name)
    shutil.rmtree(folder)
    onnx.save_model(model, path, save_as_external_data=is_split, location=f"{path.name}.data", size_threshold=0)


def _group_norm(x: Any, num_groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enabled: bool = True) -> Any:
    """Group norm of (B, C, *window) in ONNX operators, with scale and shift (C,).

    Moments are computed axis by axis: both runtimes add sequentially in float32, so a sum over 64 x 64 nearly equal
    voxels, such as background, keeps four digits, and sums over 64 keep seven. Means and a sum alternate, because
    OpenVINO fuses consecutive means. The variance is the mean square minus the squared mean, which saves a pass over
    the map; its relative error is 1e-7 (mean / deviation)^2.
    """
    from onnxscript import opset20 as op

    channels, *window = (int(size) for size in x.shape[1:])
    ones = [1] * len(window)
    is_grouped = num_groups < channels
    grouped = [num_groups, channels // num_groups] if is_grouped else [channels, *ones]
    first, middle, last = (op.Constant(value_ints=[axis]) for axis in (2, len(window), len(window) + 1))

    def mean_of(per_row: Any) -> Any:
        per_plane = op.Mul(op.ReduceSum(per_row, middle), op.Constant(value_float=1 / window[-2]))
        per_channel = op.ReduceMean(per_plane, first) if len(window) == 3 else per_plane
        if not is_grouped:
            return per_channel  # (B, C, 1 ...)
        return op.ReduceMean(op.Reshape(per_channel, op.Constant(value_ints=[0, *grouped])), first)  # (B, groups, 1)

    mean = mean_of(op.ReduceMean(x, last))
    length = op.ReduceL2(x, last)
    square = mean_of(op.Mul(op.Mul(length, length), op.Constant(value_float=1 / window[-1])))
    variance = op.Max(op.Sub(square, op.Mul(mean, mean)), op.Constant(value_float=0.0))
    rate = op.Reciprocal(op.Sqrt(op.Add(variance, op.Constant(value_float=eps))))
    per_channel = op.Constant(value_ints=[1, *grouped])
    scale = op.Mul(rate, op.Reshape(weight, per_channel))
    shift = op.Sub(op.Reshape(bias, per_channel), op.Mul(mean, scale))
    if is_grouped:
        like_map = op.Constant(value_ints=[0, channels, *ones])
        scale, shift = op.Reshape(scale, like_map), op.Reshape(shift, like_map)
    return op.Add(op.Mul(x, scale), shift)


def _without_layouts() -> AbstractContextManager[object]:
    """Skip changes of memory layout, and pass numbers of groups as integers, which tracing needs."""
    import torch
    from torch import Tensor
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class WithoutLayouts(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is Tensor.contiguous and kwargs:
                return args[0]
            if func in (functional.group_norm, torch.group_norm):
                args = (args[0], int(args[1]), *args[2:])
            return func(*args, **kwargs)

    return WithoutLayouts()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode and one tensor of logits within the block."""
    was_training = network.training
    hook = network.register_forward_hook(lambda _, __, out: out[0] if isinstance(out, list | tuple) else out)
    network.eval()
    try:
        yield
    finally:
        hook.remove()
        network.train(was_training)


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Silence warnings, output, and logs up to `level`."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    root = error.__cause__ or error
    return f"{type(root).__name__}: {str(root).strip().splitlines()[0] if str(root).strip() else ''}"[:200]
