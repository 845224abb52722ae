"""Zip, tar and gzip."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any


def zipped(members: Mapping[str, bytes], mode: int = 0) -> bytes:
    """A zip file; `mode` is the kind and the permissions that Unix programs note."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def taped(members: Mapping[str, bytes], mode: str = "w", **changes: Any) -> bytes:
    """A tar file, with changes to the entry of each member."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tape:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tape.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def packed(data: bytes) -> bytes:
    """A gzip stream, the same at every time of day."""
    return gzip.compress(data, mtime=0)
