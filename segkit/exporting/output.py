"""The folder of an export: written beside its place under a hidden name, which it gets when all checks have passed."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segkit.checkpoint.run_folder import load_card, model_folders
from segkit.errors import CheckpointError, RequestError

BUNDLE_CONFIG, BUNDLE_NETWORK = Path("configs", "inference.json"), Path("models", "model.ts")
"""Files of a MONAI bundle."""


@contextmanager
def new_folder(output: Path, model: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write an export to, which replaces `output` at the end of the block; after an error it is removed.

    Raises:
        RequestError: `output` is in use: it is not empty, or with `overwrite` holds something else than an export.
    """
    _require_free(output, model, overwrite=overwrite)
    staging = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise RequestError(f"cannot be written to ({error.strerror})", where=staging.parent) from error
        yield staging
        _put_in_place(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _require_free(output: Path, model: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is not empty; with `overwrite` only one that is not an export."""
    if output.resolve() in (model.resolve(), *model.resolve().parents):
        raise RequestError("is the model's own folder", where=output, remedy="Name another folder with -o")
    if not output.exists():
        return
    if not output.is_dir():
        raise RequestError("is a file", where=output, expected="a folder, or a name that is free")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise RequestError("is not empty", where=output, remedy="Name another folder, or replace it with --overwrite")
    try:
        is_export = all(load_card(folder).export is not None for folder in model_folders(output))
    except CheckpointError:
        is_export = (output / BUNDLE_CONFIG).is_file() and (output / BUNDLE_NETWORK).is_file()
    if not is_export:
        raise RequestError("holds something else than an export", where=output, remedy="Name another folder")


def _put_in_place(staging: Path, output: Path) -> None:
    """Rename the finished folder to `output`, then remove the previous one."""
    old = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        if output.exists():
            output.rename(old)
        staging.rename(output)
    except OSError as error:
        if old.exists() and not output.exists():
            old.rename(output)
        raise RequestError(f"cannot be replaced ({error.strerror})", where=output) from error
    shutil.rmtree(old, ignore_errors=True)
