"""The resume state of a training: `last.ckpt`, and `previous.ckpt` before it.

Written atomically, also in a power cut. Checksums are verified before a state is used.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.checkpoint.run_folder import DAMAGED_NAME, LAST_NAME, PREVIOUS_NAME
from segkit.checkpoint.tensors import read_torch
from segkit.errors import CheckpointError
from segkit.reading.files import written_atomically

_log = logging.getLogger(__name__)


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
