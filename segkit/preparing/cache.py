"""A disk cache of prepared cases, read through memory maps.

Each case has a folder, named by the SHA-256 of everything that the result depends on: the bytes of its files and the
settings. A folder gets this name when it is complete, so an interrupted run resumes with the next case.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from segkit.errors import DataError
from segkit.labels import LabelScheme
from segkit.preparing.preprocessing import Preparation, PreparedCase, PreprocessingConfig, load_case, prepare
from segkit.process_memory import available_memory_gb
from segkit.reading.case import Case
from segkit.reading.files import read_grid
from segkit.runtime import available_cores, process_place
from segkit.shapes import LabelMap

_VERSION = 1  # part of every key: increase it when the result of preparing changes for the same settings

_MOST_FOREGROUND_VOXELS = 10_000


class PreparedStore:
    """Prepared cases below `folder`, of any settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry(
        self, case: Case, modalities: tuple[str, ...], scheme: LabelScheme | None, config: PreprocessingConfig
    ) -> Path:
        """The folder of the prepared case, which is made in one atomic step if it does not exist yet.

        Raises:
            DataError: the case cannot be loaded (see `load_case`), or the cache cannot be written.
        """
        folder = self.folder / _key(case, modalities, scheme, config)
        if (folder / "case.json").exists():
            return folder
        prepared = prepare(load_case(case, modalities, scheme), config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(prepared, folder, None if scheme is None else scheme.ignore)
        except OSError as error:
            found = f"cannot keep the prepared case {case.id} here: {error.strerror or error}"
            remedy = "Free some space, or choose another folder for the run"
            raise DataError(found, where=self.folder, remedy=remedy) from error
        return folder

    def entries(
        self,
        cases: Sequence[Case],
        modalities: tuple[str, ...],
        scheme: LabelScheme | None,
        config: PreprocessingConfig,
        *,
        memory_gb: float | None = None,
    ) -> tuple[dict[str, Path], dict[str, str]]:
        """Prepare cases, several at a time: their folders by id, and the errors of unusable cases by id.

        `memory_gb` is the memory in GiB that this process may use; by default the free memory.
        """

        def entry(case: Case) -> Path | DataError:
            try:
                return self.entry(case, modalities, scheme, config)
            except DataError as error:
                return error

        with ThreadPoolExecutor(cases_at_once(cases, modalities, memory_gb)) as pool:
            found = dict(zip((case.id for case in cases), pool.map(entry, cases), strict=True))
        folders = {case_id: folder for case_id, folder in found.items() if isinstance(folder, Path)}
        return folders, {case_id: str(error) for case_id, error in found.items() if isinstance(error, DataError)}


class StoredCases(Sequence[PreparedCase]):
    """Prepared cases that are opened on access.

    Open memory maps of a thousand cases would exceed the limit of file handles of a process, and a sequence of paths is
    cheap to send to the workers of a data loader.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)

    def __len__(self) -> int:
        return len(self.folders)

    @overload
    def __getitem__(self, index: int) -> PreparedCase: ...

    @overload
    def __getitem__(self, index: slice) -> StoredCases: ...

    def __getitem__(self, index: int | slice) -> PreparedCase | StoredCases:
        if isinstance(index, slice):
            return StoredCases(self.folders[index])
        return open_prepared(self.folders[index])


def cases_at_once(cases: Sequence[Case], modalities: Sequence[str], memory_gb: float | None) -> int:
    """How many cases are prepared at the same time: at most 8, limited by the cores and half the memory in GiB.

    Each takes memory as read, stacked and prepared, in float32; all are taken to have the size of the first.
    """
    if not cases:
        return 1
    image = next(iter(cases[0].images.values()))
    try:
        voxels = math.prod(read_grid(image.path).shape)
    except DataError:
        return 1
    case_gb = 4 * voxels * (2 * len(modalities) + 1) / 2**30
    sharing = process_place().local_size
    memory_gb = memory_gb or available_memory_gb() / sharing
    return max(1, min(available_cores() // sharing, 8, int(0.5 * memory_gb / case_gb)))


def open_prepared(folder: Path) -> PreparedCase:
    """The case in a folder that `PreparedStore.entry` made, its arrays memory-mapped and read-only.

    Raises:
        DataError: the entry is damaged.
    """
    try:
        document = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        image = np.load(folder / "image.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy", mmap_mode="r") if document["has_labels"] else None
        voxels = np.load(folder / "foreground.npy", mmap_mode="r")
        bounds = document["foreground"]
        foreground = {int(value): voxels[first:last] for value, (first, last) in bounds.items()}
        return PreparedCase(document["id"], image, labels, Preparation.from_json(document["preparation"]), foreground)
    except (OSError, ValueError, KeyError) as error:
        remedy = "Delete the folder and run again"
        raise DataError(f"this prepared case is damaged: {error}", where=folder, remedy=remedy) from error


def foreground_voxels(labels: LabelMap, seed: int, ignore: int | None = None) -> dict[int, NDArray[np.int64]]:
    """Flat C-order indices of voxels by label value, without 0: all, or a seeded sample of 10,000 per value.

    If some voxels are `ignore`, 0 stands for all others.
    """
    flat = labels.ravel()
    places = np.flatnonzero(flat)
    values = flat[places]
    generator = np.random.default_rng(seed)
    found = {int(value): places[values == value] for value in np.flatnonzero(np.bincount(values, minlength=256))}
    if ignore is not None and found.pop(ignore, None) is not None:
        found[0] = np.flatnonzero(flat != ignore)
    for value, mine in found.items():
        if len(mine) > _MOST_FOREGROUND_VOXELS:
            found[value] = np.sort(generator.choice(mine, _MOST_FOREGROUND_VOXELS, replace=False))
    return {value: mine for value, mine in found.items() if len(mine)}


def _write_atomically(prepared: PreparedCase, folder: Path, ignore: int | None) -> None:
    partial = folder.parent / f".partial-{secrets.token_hex(6)}"
    try:
        partial.mkdir()  # with the permissions of ordinary folders, unlike those of `tempfile`
        _write(prepared, partial, int(folder.name[:8], 16), ignore)
        partial.rename(folder)
    except OSError:
        if not (folder / "case.json").exists():  # else another process has written the same entry
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(prepared: PreparedCase, folder: Path, seed: int, ignore: int | None) -> None:
    np.save(folder / "image.npy", prepared.image)
    voxels: dict[int, NDArray[np.int64]] = {}
    if prepared.labels is not None:
        np.save(folder / "labels.npy", prepared.labels)
        voxels = foreground_voxels(prepared.labels, seed, ignore)
    bounds = np.cumsum([0, *(len(places) for places in voxels.values())]).tolist()
    np.save(folder / "foreground.npy", np.concatenate([np.empty(0, np.int64), *voxels.values()]))
    document = {
        "id": prepared.id,
        "has_labels": prepared.labels is not None,
        "foreground": {value: bounds[index : index + 2] for index, value in enumerate(voxels)},
        "preparation": prepared.preparation.to_json(),
    }
    (folder / "case.json").write_text(json.dumps(document), encoding="utf-8")


def _key(case: Case, modalities: tuple[str, ...], scheme: LabelScheme | None, config: PreprocessingConfig) -> str:
    files = {name: [_digest(file.path), file.channel] for name, file in case.images.items() if name in modalities}
    if scheme is not None and case.label is not None:
        files["label"] = [_digest(case.label.path), case.label.channel]
        files |= {f"label {value}": [_digest(path), None] for value, path in case.label.parts}
    settings: dict[str, Any] = {"version": _VERSION, "id": case.id, "files": files, "modalities": modalities}
    settings["config"] = config.model_dump(mode="json")
    for name, known in (("scheme", scheme), ("case_scheme", case.scheme)):
        settings[name] = None if known is None else [known.name, dict(known.values), known.regions]
        if known is not None and known.ignore is not None:
            settings[name].append(known.ignore)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 of a file, of all files of a DICOM folder, or of a header and the raw data beside it."""
    if path.is_dir():
        parts = sorted(part for part in path.iterdir() if part.is_file())
    elif path.suffix in {".mhd", ".nhdr"}:
        parts = sorted(path.parent.glob(f"{path.stem}.*"))
    else:
        parts = [path]
    digest = hashlib.sha256()
    try:
        for part in parts:
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        remedy = "Check that it exists and its permissions"
        raise DataError(f"cannot be read: {error.strerror or error}", where=path, remedy=remedy) from error
    return digest.hexdigest()
