"""Writing a bank of lesion-free copies, which `segkit train` lays real lesions over; `data.lesion_bank` reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segkit.errors import RequestError
from segkit.preparing.lesion_bank import BANK_NAME, Bank, BankedCase, read_bank
from segkit.reading.case import Case
from segkit.reading.files import written_atomically


class BankWriter:
    """A bank that grows case by case; `bank.json` always tells of cases that are there whole.

    `model` tells the model and the holes of the copies, which all of a bank have in common.

    Raises:
        RequestError: the folder holds a bank of another model, of other modalities, or with other holes.
    """

    def __init__(self, folder: Path, modalities: tuple[str, ...], model: Mapping[str, Any]) -> None:
        self.folder = folder
        self._bank = Bank(modalities=modalities, cases=(), model=dict(model))
        if not (folder / BANK_NAME).exists():
            return
        before = read_bank(folder)
        if (before.modalities, before.model) != (self._bank.modalities, self._bank.model):
            raise RequestError(
                "holds a bank that was made by another model or in another way",
                where=folder,
                remedy="Choose another folder for --bank",
            )
        self._bank = before

    def add(self, case: Case) -> None:
        """Name a case whose files are there, on disk at once.

        Raises:
            DataError: the folder cannot be written.
        """
        entry = BankedCase(case=case.id, patient=case.patient)
        if entry in self._bank.cases:
            return
        others = (one for one in self._bank.cases if one.case != case.id)
        # In an order of their own, for cases are finished in any.
        cases = tuple(sorted((*others, entry), key=lambda one: one.case))
        self._bank = self._bank.model_copy(update={"cases": cases})
        with written_atomically(self.folder / BANK_NAME) as temporary:
            text = json.dumps(self._bank.model_dump(), indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, so that it is there whole or not at all.

    Raises:
        DataError: the folder cannot be written.
    """
    with written_atomically(target) as temporary:
        shutil.copyfile(source, temporary)
