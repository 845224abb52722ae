"""Files of weights and pickled plans."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing import seeds
from fuzzing.mutators.pickles import mutated_pickle
from fuzzing.mutators.tensors import mutated_safetensors, mutated_torch_legacy, mutated_torch_zip
from fuzzing.parser import Files, Parser

PICKLE_CHECKS = (
    r"carries code|zip archive|directory of its parts|wrong checksum|parts are packed|is damaged \("
    r"(Unicode|EOF|Key|Index|Overflow|OS|BadZip|error|TypeError: '|TypeError: argument list"
    r"|ValueError: (at position|pickle exhausted|expected|not enough data))"
)
"""Those of the archive, of the pickle's opcodes and of its names, before anything is made of them."""


@cache
def _network() -> Any:
    import segkit

    return segkit.build_model("r2unet", in_channels=1, out_channels=2, widths=[2, 4])


def _into_a_network(_: Path, path: Path) -> None:
    """Read weights, and load what fits of them into a network."""
    from segkit.checkpoint.model import read_source
    from segkit.checkpoint.transfer import TransferOptions, transfer

    source = read_source(path)
    for tensor in source.tensors.values():
        tensor.float().sum()
    transfer(_network(), source, TransferOptions(is_strict=False))


def _plans(_: Path, path: Path) -> None:
    from segkit.checkpoint.nnunet import read_results

    repr(read_results(path.with_suffix(""), {}))


def _torch_files(name: str, *, is_zip: bool) -> list[Files]:
    import torch

    state = dict(_network().state_dict())
    scores = {"scores": [np.float64(0.5), np.float32(1), np.int64(3)], "table": np.arange(6.0).reshape(2, 3)}
    six = torch.arange(6.0)  # comes first, as the mutators take it for granted
    documents = (
        {"six": six, "model": state, "epoch": 3, **scores},
        {"six": six, **{f"module.{key}": value for key, value in state.items()}},
    )
    return [{name: seeds.torch_file(document, is_zip=is_zip)} for document in documents]


def _safetensors() -> list[Files]:
    import safetensors.torch

    state = safetensors.torch.save(dict(_network().state_dict()))
    return [{"x.safetensors": content} for content in (seeds.safetensors_file(), state)]


PARSERS = (
    Parser(
        "safetensors",
        _safetensors,
        {"": mutated_safetensors},
        _into_a_network,
        first_check="invalid header length|header too|invalid UTF-8|invalid JSON",
    ),
    Parser(
        "torch-zip",
        lambda: _torch_files("x.pth", is_zip=True),
        {"": mutated_torch_zip},
        _into_a_network,
        first_check=PICKLE_CHECKS,
    ),
    Parser(
        "torch-legacy",
        lambda: _torch_files("x.ckpt", is_zip=False),
        {"": mutated_torch_legacy},
        _into_a_network,
        first_check=PICKLE_CHECKS,
    ),
    Parser(
        "plans-pickle",
        lambda: [{"x.model.pkl": seeds.plans_pickle()}],
        {"": mutated_pickle},
        _plans,
        first_check=PICKLE_CHECKS,
    ),
)
