"""Tensors in files: the one place that reads what others have pickled, and it never runs any of it.

The only caller of `torch.load`, always with `weights_only=True`. Everything is written to a temporary file first and
moved into place, so a killed process leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

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
"""What weights and counts are kept in; of other types torch knows the name, and cannot copy all of them."""


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name, on the CPU: safetensors, or a torch file read without running its code.

    Of files that hold more than weights (nnU-Net's `state_dict` and `network_weights`, plain trainers' `model`) the
    weights are taken; prefixes that wrappers add (`module.`, `_orig_mod.`) are dropped.

    Raises:
        CheckpointError: missing, damaged, holds no tensors or other than plain ones, or could only be read by running
            code from it.
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
    """The weights in what a torch file holds, by the names that they have without wrappers.

    Raises:
        CheckpointError: it holds no tensors by name, or other than plain ones.
    """
    for key in _INNER_KEYS:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
            break
    if not isinstance(document, Mapping):
        document = {}
    tensors = {_WRAPPERS.sub("", str(name)): value for name, value in document.items() if isinstance(value, Tensor)}
    if not tensors:
        expected = f"a state dict, or one under {', '.join(_INNER_KEYS)}"
        raise CheckpointError("holds no tensors by name", where=where, expected=expected)
    return _plain(tensors, where)


def _plain(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors, all of them of types that networks are kept in."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NUMBERS:
            raise CheckpointError(
                f"{name} is of {str(tensor.dtype).removeprefix('torch.')}",
                where=where,
                expected="numbers of a common type",
                remedy="Save it again in float32",
            )
    return tensors


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically; gives back the file's SHA-256.

    Tensors that share memory are written once each, so every name can be loaded on its own.

    Raises:
        DataError: the file cannot be written.
    """
    with written_atomically(path) as partial:
        write_tensors(partial, weights)
        return file_sha256(partial)


def write_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors to a file that nobody reads yet."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        if address in storages:  # safetensors refuses tensors that share memory, such as tied weights
            plain = plain.clone()
        storages.add(address)
        tensors[name] = plain
    path.touch()
    permissions = path.stat().st_mode  # those of ordinary files; safetensors takes all but the owner's away
    safetensors.torch.save_file(tensors, path)
    path.chmod(permissions)


def read_torch(path: Path, *, is_mapped: bool = False) -> Any:
    """What `torch.save` wrote, tensors on the CPU, after its checksums were verified; never runs its code.

    `is_mapped` is for a look at what stands beside the tensors: they stay in the file, unread and unverified.

    Raises:
        CheckpointError: missing, damaged, or could only be read by running code from it.
    """
    if not path.is_file():
        raise CheckpointError("is missing", where=path)
    try:
        require_modest(path)
        broken = None if is_mapped else _broken_part(path)
        if broken is None:
            makers: list[Any] = [(maker, f"{room}.{name}") for (room, name), maker in MAKERS.items()]
            with torch.serialization.safe_globals(makers), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, ahead of the refusal itself
                mapped = is_mapped and is_zip(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, "Convert it to safetensors where it was made") from error
    except Exception as error:  # reading damaged files, torch and zipfile raise whatever they stumble over
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})", where=path) from error
    raise CheckpointError(f"is damaged (wrong checksum of {broken})", where=path)


def read_plain_pickle(path: Path) -> Any:
    """What a pickle holds, where that is nothing but numbers, text, lists, mappings and numpy arrays; runs no code.

    nnU-Net 1 keeps its plans this way. Every other class or function that the file names is refused unseen.

    Raises:
        CheckpointError: missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError("is missing", where=path)
    try:
        stream = io.BytesIO(path.read_bytes())
        require_dense_memo(stream, path.stat().st_size)
        return _PlainUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise _refused(path, "Ask for the plans as JSON") from error
    except Exception as error:  # damaged pickles fail in every way there is
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})", where=path) from error


class _PlainUnpickler(pickle.Unpickler):
    """Knows the makers of plain numpy values and ordered dictionaries, and nothing else."""

    _known = {("collections", "OrderedDict"): OrderedDict, **MAKERS}  # noqa: RUF012  never changed

    def find_class(self, module: str, name: str) -> Any:
        """The maker of that name, where it is known to make plain values only."""
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


def _broken_part(path: Path) -> str | None:
    """The first part whose checksum is wrong: torch does not look, and would load a flipped bit as a weight."""
    if not is_zip(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
