"""Read and write tensor files: the only module that reads pickles, and it never runs code from them.

The only caller of `torch.load`, always with `weights_only=True`.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segkit.checkpoint.torch_check import MAKERS, is_zip, require_dense_memo, require_modest
from segkit.errors import CheckpointError
from segkit.reading.files import file_sha256, written_atomically

_INNER_KEYS = ("state_dict", "network_weights", "model_state_dict", "model")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
_NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""Types of weights and counts; torch cannot copy all others."""


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file by name, on the CPU.

    Weights may be below `state_dict`, `network_weights` (nnU-Net), `model_state_dict` or `model`; the prefixes of
    wrappers (`module.`, `_orig_mod.`) are dropped.

    Raises:
        CheckpointError: missing, damaged, without tensors, with other than plain ones, or with code.
    """
    if not path.is_file():
        raise CheckpointError("is not a file", where=path, expected="a .safetensors or torch weight file")
    if path.suffix == ".safetensors":
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot be read as safetensors ({error})", where=path) from error
        return _plain(tensors, path)
    return named_tensors(read_torch(path), path)


def named_tensors(document: object, where: Path) -> dict[str, Tensor]:
    """The weights in the contents of a torch file, by name without the prefixes of wrappers.

    Raises:
        CheckpointError: it holds no tensors by name, or other than plain ones.
    """
    outer = document if isinstance(document, Mapping) else {}
    inner = next((outer[key] for key in _INNER_KEYS if isinstance(outer.get(key), Mapping)), outer)
    tensors = {_WRAPPERS.sub("", str(name)): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        expected = f"a state dict, or one under {', '.join(_INNER_KEYS)}"
        raise CheckpointError("holds no tensors by name", where=where, expected=expected)
    return _plain(tensors, where)


def _plain(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NUMBERS:
            found = f"{name} is of {str(tensor.dtype).removeprefix('torch.')}"
            remedy = "Save it again in float32"
            raise CheckpointError(found, where=where, expected="numbers of a common type", remedy=remedy)
    return tensors


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically; returns the file's SHA-256.

    Tensors that share memory are written separately, so every name can be loaded alone.

    Raises:
        DataError: the file cannot be written.
    """
    with written_atomically(path) as partial:
        write_tensors(partial, weights)
        return file_sha256(partial)


def write_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, not atomically."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        # safetensors rejects shared memory, such as tied weights.
        tensors[name] = plain.clone() if address in storages else plain
        storages.add(address)
    path.touch()
    permissions = path.stat().st_mode  # safetensors would remove all but the owner's
    safetensors.torch.save_file(tensors, path)
    path.chmod(permissions)


def read_torch(path: Path, *, is_mapped: bool = False) -> Any:
    """The contents of a file of `torch.save`, tensors on the CPU, after its checksums are verified.

    With `is_mapped` tensors stay in the file, unread and unverified.

    Raises:
        CheckpointError: missing, damaged, or with code.
    """
    if not path.is_file():
        raise CheckpointError("is missing", where=path)
    try:
        require_modest(path)
        broken = None
        if is_zip(path) and not is_mapped:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # torch does not verify checksums
        if broken is None:
            makers: list[Any] = [(maker, f"{room}.{name}") for (room, name), maker in MAKERS.items()]
            with torch.serialization.safe_globals(makers), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
                mapped = is_mapped and is_zip(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, "Convert it to safetensors on the machine that wrote it") from error
    except Exception as error:  # torch and zipfile raise many kinds for damaged files
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})", where=path) from error
    raise CheckpointError(f"is damaged (wrong checksum of {broken})", where=path)


def read_plain_pickle(path: Path) -> Any:
    """The contents of a pickle of numbers, text, lists, mappings and numpy arrays, such as nnU-Net 1's plans.

    Raises:
        CheckpointError: missing, damaged, or with any other class or function, which is not loaded.
    """
    if not path.is_file():
        raise CheckpointError("is missing", where=path)
    try:
        stream = io.BytesIO(path.read_bytes())
        require_dense_memo(stream, path.stat().st_size)
        return _PlainUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise _refused(path, "Ask for the plans as JSON") from error
    except Exception as error:  # damaged pickles raise many kinds
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})", where=path) from error


class _PlainUnpickler(pickle.Unpickler):
    """Knows plain numpy values and ordered dictionaries only."""

    _known = {("collections", "OrderedDict"): OrderedDict, **MAKERS}  # noqa: RUF012  never changed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value") from None


def _refused(path: Path, remedy: str) -> CheckpointError:
    return CheckpointError(
        "is damaged, or carries code and not only weights; nothing in it was run",
        where=path,
        expected="a file of tensors and plain values",
        remedy=remedy,
    )
