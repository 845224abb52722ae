"""Weight files, and the resume state of a training: `last.ckpt`, and `previous.ckpt` before it.

The only module that reads pickles, and the only caller of `torch.load`, always with `weights_only=True`: no code from a
file is run. Files are written atomically, the state also in a power cut; checksums are verified before it is used.
"""

import io
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segkit.checkpoint.run_folder import DAMAGED_NAME, LAST_NAME, PREVIOUS_NAME
from segkit.checkpoint.torch_check import MAKERS, is_zip, require_dense_memo, require_modest
from segkit.errors import CheckpointError
from segkit.reading.files import written_atomically

_log = logging.getLogger(__name__)

_INNER_KEYS = ("state_dict", "network_weights", "model_state_dict", "model")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
_SECOND_NAMES = re.compile(r"^decoder\.encoder\.|\.all_modules\.")
"""Names under which nnU-Net's files hold the same weights again."""
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
    tensors = {name: value for name, value in tensors.items() if not _SECOND_NAMES.search(name)}
    if not tensors:
        expected = f"a state dict, or one under {', '.join(_INNER_KEYS)}"
        raise CheckpointError("holds no tensors by name", where=where, expected=expected)
    return _plain(tensors, where)


def _plain(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NUMBERS:
            found, expected = f"{name} is of {str(tensor.dtype).removeprefix('torch.')}", "numbers of a common type"
            raise CheckpointError(found, where=where, expected=expected, remedy="Save it again in float32")
    return tensors


def write_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, not atomically; those that share memory separately, to be loaded alone."""
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
        if is_zip(path) and not is_mapped:
            with zipfile.ZipFile(path) as archive:
                _require_intact(archive, path)
        makers: list[Any] = [(maker, f"{room}.{name}") for (room, name), maker in MAKERS.items()]
        with torch.serialization.safe_globals(makers), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped and is_zip(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, "Convert it to safetensors on the machine that wrote it") from error
    except Exception as error:  # torch and zipfile raise many kinds for damaged files
        raise CheckpointError(f"is damaged ({type(error).__name__}: {error})", where=path) from error


def _require_intact(archive: zipfile.ZipFile, path: Path) -> None:
    if broken := archive.testzip():  # torch does not verify checksums
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
    found = "is damaged, or carries code and not only weights; nothing in it was run"
    return CheckpointError(found, where=path, expected="a file of tensors and plain values", remedy=remedy)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the resume state as `last.ckpt`; the last one becomes `previous.ckpt`.

    Raises:
        TypeError: the state holds other than tensors, numbers, strings, lists and dicts.
        DataError: the folder cannot be written.
    """
    _check_plain(state, "state")
    last = folder / LAST_NAME
    with written_atomically(last) as partial:
        torch.save(dict(state), partial)
        if last.exists():
            last.replace(folder / PREVIOUS_NAME)
    # Write the new names to the disk; where a folder cannot be opened (Windows), the system does so.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_state(folder: Path) -> dict[str, Any]:
    """The resume state, tensors on the CPU: `last.ckpt`, or `previous.ckpt` if that is damaged.

    A damaged `last.ckpt` is renamed to `damaged.ckpt`, so that the next save does not replace the intact one with it.

    Raises:
        CheckpointError: both are missing or damaged.
    """
    reasons = []
    for name in (LAST_NAME, PREVIOUS_NAME):
        try:
            state = read_torch(folder / name)
        except CheckpointError as error:
            reasons.append(f"{name} {error.found}")
            continue
        if not isinstance(state, dict):
            reasons.append(f"{name} is not a resume state")
            continue
        if reasons:
            _log.warning("%s: %s; resuming from %s", folder, reasons[0], name)
            with suppress(OSError):
                (folder / LAST_NAME).replace(folder / DAMAGED_NAME)
        return state
    found = f"no resume state can be used: {'; '.join(reasons)}"
    raise CheckpointError(found, where=folder, remedy="Start a new training")


def _check_plain(value: object, name: str) -> None:
    if isinstance(value, Mapping) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"key {key!r} of {name}")
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):  # type: ignore[arg-type]
            _check_plain(item, f"{name}[{position}]")
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{name} is {type(value).__name__}: a state holds tensors, numbers, strings, lists and dicts")
