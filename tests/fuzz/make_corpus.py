"""Writes tests/fuzz/corpus: one small file for each attack that is known and each defect that was found.

`python tests/fuzz/make_corpus.py` makes it anew, `corpus/<parser>/<what-it-is>--<name it is read under>`.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import seeds
from fuzzing.mutators.pictures import png_chunk
from fuzzing.worker import CANARY

CORPUS = Path(__file__).resolve().parent / "corpus"


class Burglar:
    """Pickles to a call that makes the folder which tells that code was run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (CANARY,)


class ByName:
    """Pickles to whatever call it is given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def overwritten(data: bytes, place: int, *numbers: bytes) -> bytes:
    """Bytes with others written over them."""
    inserted = b"".join(numbers)
    return data[:place] + inserted + data[place + len(inserted) :]


def nifti_entries() -> dict[str, bytes]:
    """Headers of NIfTI-1 (nifti1.h): dim at byte 40, pixdim at 76, vox_offset 108, slope 112, codes 252, srow 280."""
    honest, shorts, floats = seeds.nifti(), struct.Struct("<8h"), struct.Struct("<4f")
    sform = overwritten(honest, 252, struct.pack("<2h", 0, 1))
    huge = overwritten(seeds.nifti(version=2), 16, struct.pack("<4q", 3, 10**4, 10**4, 10**4))
    return {
        "claims-1e12-voxels--x.nii": overwritten(honest, 40, shorts.pack(3, 30000, 30000, 1200, 1, 1, 1, 1)),
        "claims-1e12-voxels--x.nii.gz": seeds.packed(huge),
        "claims-more-than-64-bits--x.nii": overwritten(huge, 16, struct.pack("<4q", 3, 2**62, 2**62, 2**62)),
        "dim-of-0--x.nii": overwritten(honest, 40, shorts.pack(3, 4, 0, 2, 1, 1, 1, 1)),
        "dim-negative--x.nii": overwritten(honest, 40, shorts.pack(3, -4, 3, 2, 1, 1, 1, 1)),
        "seven-axes--x.nii": overwritten(honest, 40, shorts.pack(7, 2, 2, 2, 3, 1, 1, 1)),
        "slope-infinite--x.nii": overwritten(honest, 112, struct.pack("<2f", float("inf"), 0)),
        "slope-nan-intercept-infinite--x.nii": overwritten(honest, 112, struct.pack("<2f", 1, float("-inf"))),
        "spacing-negative--x.nii": overwritten(overwritten(honest, 252, bytes(4)), 76, floats.pack(1, -1, -1, -1)),
        "spacing-nan--x.nii": overwritten(overwritten(honest, 252, bytes(4)), 76, floats.pack(1, *3 * [float("nan")])),
        "affine-infinite--x.nii": overwritten(sform, 280, floats.pack(float("inf"), 0, 0, 0)),
        "affine-of-zeros--x.nii": overwritten(sform, 280, bytes(48)),
        "voxels-begin-at-1e12--x.nii.gz": seeds.packed(overwritten(honest, 108, struct.pack("<f", 1e12))),
        "voxels-begin-at-nan--x.nii": overwritten(honest, 108, struct.pack("<f", float("nan"))),
        "voxels-begin-before-0--x.nii": overwritten(honest, 108, struct.pack("<f", -352)),
        "extension-of-size-0--x.nii": overwritten(seeds.nifti(has_extension=True), 352, bytes(8)),
        "extension-of-2-gigabytes--x.nii": overwritten(
            seeds.nifti(has_extension=True), 352, struct.pack("<2i", 2**31 - 1, 6)
        ),
        "bomb-behind-the-voxels--x.nii.gz": gzip.compress(honest + bytes(100 * 2**20), mtime=0),
        "second-stream-of-garbage--x.nii.gz": seeds.packed(honest) + b"garbage",
        "type-of-colours--x.nii": overwritten(honest, 70, struct.pack("<2h", 128, 24)),
    }


def image_entries() -> dict[str, dict[str, bytes]]:
    """Other volumes and pictures."""
    nrrd, meta = seeds.itk(".nrrd", is_compressed=False), seeds.itk(".mha", is_compressed=False)
    size = struct.pack(">2I", 10**6, 10**6) + b"\x08\x00\x00\x00\x00"
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({CANARY}) (w) file\n"
    return {
        "mgh": {"claims-1e12-voxels--x.mgh": overwritten(seeds.mgh(), 4, struct.pack(">4i", 10**4, 10**4, 10**4, 1))},
        "nrrd": {
            "claims-1e12-voxels--x.nrrd": nrrd.replace(b"sizes: 2 3 4", b"sizes: 10000 10000 10000"),
            "points-to-another-file--x.nrrd": nrrd.replace(b"\n\n", b"\ndata file: /etc/passwd\n\n", 1),
            "points-to-another-file-2--x.nrrd": nrrd.replace(b"\n\n", b"\r\nDatafile: ../x\r\n\r\n", 1),
            "spacing-nan--x.nrrd": nrrd.replace(b"(1,0,0)", b"(nan,0,0)"),
            "spacing-of-0--x.nrrd": nrrd.replace(b"(1,0,0)", b"(0,0,0)"),
            "size-negative--x.nrrd": nrrd.replace(b"sizes: 2", b"sizes: -2"),
            "is-a-metaimage--x.nrrd": meta,
        },
        "metaimage": {
            "claims-1e12-voxels--x.mha": meta.replace(b"DimSize = 2 3 4", b"DimSize = 10000 10000 10000"),
            "points-to-another-file--x.mha": meta.replace(b"LOCAL", b"/etc/passwd"),
            "points-to-a-list--x.mhd": meta.replace(b"LOCAL", b"LIST\n/etc/passwd"),
            "points-out-of-its-folder--x.mhd": meta.replace(b"LOCAL", b"../../x.raw"),
            "hundred-axes--x.mha": meta.replace(b"NDims = 3", b"NDims = 100"),
            "65536-channels--x.mha": meta.replace(b"NDims = 3", b"NDims = 3\nElementNumberOfChannels = 65536"),
            "spacing-nan--x.mha": meta.replace(b"ElementSpacing = 1", b"ElementSpacing = nan"),
        },
        "photograph": {"claims-8e7-pixels--x.gif": overwritten(seeds.picture(".gif"), 6, b"\xff\xff\xff\x04")},
        "picture": {
            "claims-1e12-pixels--x.png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size) + png_chunk(b"IEND", b""),
            "is-a-program-in-postscript--x.png": postscript.encode(),
        },
    }


def dicom_entries() -> dict[str, dict[str, bytes]]:
    """Elements that claim more than the file has; GDCM made room for them."""
    honest, frames = seeds.dicom_slice(), seeds.dicom_frames()
    pixels = honest.index(b"\xe0\x7f\x10\x00")
    big = struct.pack("<2H2s2xI", 0x0029, 0x0010, b"OB", 0xFFFFFFF0)
    deep = b"".join(
        struct.pack("<2H2s2xI", 0x0029, 0x0010, b"SQ", 0xFFFFFFFF) + struct.pack("<2HI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        for _ in range(2000)
    )
    series = {
        "element-of-4-gigabytes--0.dcm": honest[:pixels] + big + honest[pixels:],
        "garbage-behind-the-pixels--0.dcm": honest + bytes(64) + big,
        "second-pixels-of-4-gigabytes--0.dcm": honest + struct.pack("<2H2s2xI", 0x7FE0, 0x0010, b"OW", 0xFFFFFFF0),
        "sequences-2000-deep--0.dcm": honest[:pixels] + deep + honest[pixels:],
        "65535-x-65535-pixels--0.dcm": honest.replace(b"\x04\x00", b"\xff\xff").replace(b"\x03\x00", b"\xff\xff"),
    }
    return {
        "dicom-series": series,
        "dicom-seg": {"element-of-4-gigabytes--0.dcm": series["element-of-4-gigabytes--0.dcm"]},
        "dicom-frames": {
            "item-outside-a-sequence--x.dcm": frames + struct.pack("<2HI", 0xFFFE, 0xE000, 0xFFFFFFF0),
            "million-frames--x.dcm": frames.replace(b"IS\x02\x005 ", b"IS\x08\x0010000000"),
        },
    }


def yaml_entries() -> dict[str, bytes]:
    """Documents that grow, and that make objects."""
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    merged = ["a0: &a0 {x: 1, y: 2}"]
    merged += [f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return {
        "billion-laughs--config.yaml": "\n".join(lists).encode(),
        "billion-laughs-by-merging--config.yaml": "\n".join(merged).encode(),
        "contains-itself--config.yaml": b"data: &a {x: *a}",
        "makes-an-object--config.yaml": f"data: !!python/object/apply:os.mkdir ['{CANARY}']".encode(),
        "names-a-function--config.yaml": b"data: !!python/name:os.system",
        "nested-100000-deep--config.yaml": b"[" * 100_000,
        "key-twice--config.yaml": b"data: {fold: 0, fold: 1}",
        "number-of-5000-digits--config.yaml": b"data: {fold: " + b"9" * 5000 + b"}",
        "date-that-is-none--config.yaml": b"data: {fold: 2001-99-99}",
        "tag-that-fails--config.yaml": b"data: {fold: !!timestamp x}",
        "tag-that-fails-2--config.yaml": b"data: {fold: !!bool x}",
        "learning-rate-nan--config.yaml": b"optimiser: {lr: .nan}",
        "keys-that-are-none--config.yaml": b"data: {[a]: 1, {b: c}: 2}",
    }


def changed(document: Any, *path: str | int, to: Any) -> bytes:
    """A document with another value at a place."""
    document = json.loads(json.dumps(document))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = to
    return json.dumps(document).encode()


def json_entries() -> dict[str, dict[str, bytes]]:
    """Documents of data sets, runs and models."""
    msd, nnunet, card = seeds.DATASET_MSD, seeds.DATASET_NNUNET, seeds.CARD
    entries: dict[str, dict[str, bytes]] = {
        "dataset-json-msd": {
            "nested-100000-deep--dataset.json": b"[" * 10**5,
            "key-twice--dataset.json": b'{"modality": {"0": "T1"}, "modality": {"0": "T2"}}',
            "image-outside--dataset.json": changed(msd, "training", 0, "image", to="../../../etc/passwd"),
            "image-absolute--dataset.json": changed(msd, "training", 0, "image", to="/etc/passwd"),
            "image-with-nul--dataset.json": changed(msd, "training", 0, "image", to="a\0b"),
            "image-of-long-name--dataset.json": changed(msd, "training", 0, "image", to="\u00e9" * 300),
            "image-of-half-a-letter--dataset.json": changed(msd, "training", 0, "image", to="\ud800"),
            "label-outside--dataset.json": changed(msd, "training", 0, "label", to="../x.nii.gz"),
            "label-value-infinite--dataset.json": b'{"modality": {"0": "T1"}, "labels": {"a": Infinity, "b": NaN}}',
            "label-value-300--dataset.json": changed(msd, "labels", to={"a": 300}),
            "label-name-with-escape--dataset.json": changed(msd, "labels", "1", to="\x1b[31mred\n"),
            "channel-of-wrong-type--dataset.json": changed(msd, "modality", to=["FLAIR"]),
        },
        "dataset-json-nnunet": {
            "case-id-outside--dataset.json": changed(nnunet, "dataset", to={"../x": nnunet["dataset"]["a"]}),
            "case-id-with-newline--dataset.json": changed(nnunet, "dataset", to={"a\nb": nnunet["dataset"]["a"]}),
            "image-outside--dataset.json": changed(nnunet, "dataset", "a", "images", to=["../../etc/passwd"]),
            "image-absolute--dataset.json": changed(nnunet, "dataset", "a", "images", to=["/etc/passwd"]),
            "label-outside--dataset.json": changed(nnunet, "dataset", "a", "label", to="../x.nii.gz"),
            "entry-is-text--dataset.json": changed(nnunet, "dataset", "a", to="text"),
            "image-is-a-list--dataset.json": changed(nnunet, "dataset", "a", "images", to=[["x"]]),
            "images-are-a-number--dataset.json": changed(nnunet, "dataset", "a", "images", to=7),
            "region-with-background--dataset.json": changed(nnunet, "labels", "whole", to=[0, 1, 2]),
            "region-without-values--dataset.json": changed(nnunet, "labels", "core", to=[]),
        },
        "bids-table": {
            "name-missing--x_dseg.tsv": b"index\tname\n1\n",
            "value-300--x_dseg.tsv": b"index\tname\n300\ta\n",
        },
        "manifest": {
            "scheme-is-an-object--manifest.json": changed(seeds.MANIFEST, "cases", 0, "label_scheme", to={}),
            "remaining-are-objects--manifest.json": changed(seeds.MANIFEST, "remaining", to=[{}]),
            "cases-are-a-number--manifest.json": changed(seeds.MANIFEST, "cases", to=5),
            "nested-100000-deep--manifest.json": b"[" * 10**5,
        },
        "model-card": {
            "nested-100000-deep--model.json": b"[" * 10**5,
            "digest-is-a-path--model.json": changed(card, "sha256", to="../../../../tmp/x"),
            "output-is-a-path--model.json": changed(card, "outputs", 1, "name", to="../../x\n"),
            "graph-elsewhere--model.json": changed(card, "export", "graphs", 0, "file", to="../../etc/passwd"),
            "weights-of-graph-elsewhere--model.json": changed(card, "export", "graphs", 0, "sha256", to={"../x": ""}),
            "patch-of-1e12--model.json": changed(card, "patch_size", to=[10**4, 10**4, 10**4]),
            "patch-of-0--model.json": changed(card, "patch_size", to=[0, 8, 8]),
            "divisor-of-0--model.json": changed(card, "divisor", to=[0, 2, 2]),
            "overlap-of-1--model.json": changed(card, "overlap", to=1.0),
            "spacing-nan--model.json": changed(card, "spacing_mm", to=[float("nan")] * 3),
            "width-of-1e9--model.json": changed(card, "network", "arguments", to={"widths": [10**9, 10**9]}),
            "wide-but-thin-weights--model.json": changed(card, "network", "arguments", to={"widths": [4096, 8192]}),
            "label-300--model.json": changed(card, "outputs", 1, "label", to=300),
            "label-without-a-name--model.json": changed(card, "outputs", 1, "label", to=7),
        },
        "nnunet-result": {
            "inherits-from-itself--plans.json": changed(
                seeds.PLANS_JSON, "configurations", "3d_bigger", "inherits_from", to="3d_bigger"
            ),
            "strides-missing--plans.json": changed(
                seeds.PLANS_JSON, "configurations", "3d_fullres", "use_mask_for_norm", to=[]
            ),
            "nested-100000-deep--plans.json": b"[" * 10**5,
        },
    }
    return entries


def pickle_entries() -> dict[str, dict[str, bytes]]:
    """Weights that carry code, or numpy values that would make addresses of their bytes."""
    dtype = np.dtype("O")
    forged = ByName(np.ndarray, (1,), dtype, b"AAAAAAAA")
    state = {"state_dict": OrderedDict(w=np.ones(2)), "extra": Burglar()}
    plans = pickle.loads(seeds.plans_pickle())
    objects = np.array([Burglar(), None], dtype=object)
    one = torch.ones(1)
    wide: dict[str, object] = {
        "one-number-as-1e12--x.pth": {"w": one.expand(10**6, 10**6)},
        "one-number-as-1e9-gone-through--x.pth": {"w": one, "extra": ByName(OrderedDict, one.expand(10**9, 1))},
        "tensor-without-numbers--x.pth": {"w": one, "extra": torch.empty(10**6, 10**6, device="meta")},
        "tensor-of-complex-numbers--x.pth": {"w": torch.ones(2, dtype=torch.complex64)},
    }
    parts = {"archive/data.pkl": b"\x80\x02}.", "archive/version": b"3", "archive/data/0": bytes(30 * 2**20)}
    return {
        "torch-zip": {
            **{name: seeds.torch_file(document) for name, document in wide.items()},
            "two-directories--x.pth": two_directories(
                *(seeds.torch_file({"state_dict": {"w": torch.full((2,), number)}}) for number in (1.0, 2.0))
            ),
            "code-beside-the-weights--x.pth": seeds.torch_file(state),
            "code-in-an-array-of-objects--x.pth": seeds.torch_file({"state_dict": {}, "extra": objects}),
            "array-over-forged-addresses--x.pth": seeds.torch_file({"state_dict": {}, "extra": forged}),
            "parts-are-packed--x.pth": seeds.zipped(parts),
        },
        "torch-legacy": {
            **{
                name.replace(".pth", ".ckpt"): seeds.torch_file(document, is_zip=False)
                for name, document in wide.items()
            },
            "code-beside-the-weights--x.ckpt": seeds.torch_file(state, is_zip=False),
            "code-in-a-plain-pickle--x.ckpt": pickle.dumps(Burglar()),
            "array-over-forged-addresses--x.ckpt": pickle.dumps({"w": forged}),
        },
        "plans-pickle": {
            "code--x.model.pkl": pickle.dumps({"plans": Burglar(), "name": "x"}),
            "code-in-an-array-of-objects--x.model.pkl": pickle.dumps({"plans": objects}),
            "array-over-forged-addresses--x.model.pkl": pickle.dumps(
                {**plans, "plans": {**plans["plans"], "all_classes": forged}}
            ),
            "array-of-1e12--x.model.pkl": pickle.dumps({"plans": ByName(np.ndarray, (10**12,), np.dtype("u1"))}),
            "value-number-2-billion--x.model.pkl": b"\x80\x02}r\xff\xff\xff\x0f.",
            "contains-itself--x.model.pkl": pickle.dumps(_circle()),
        },
        "safetensors": {
            "header-of-1e18-bytes--x.safetensors": struct.pack("<Q", 10**18) + b"{}",
            "tensor-of-1e12--x.safetensors": _safetensors(
                '{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'
            ),
            "nested-100000-deep--x.safetensors": _safetensors("[" * 10**5),
            "numbers-of-4-bits--x.safetensors": _safetensors('{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'),
        },
    }


def _circle() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["plans"] = circle
    return circle


def _safetensors(header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + bytes(4)


def two_directories(shown: bytes, hidden: bytes) -> bytes:
    """Two torch files of one size as one zip file, of which Python's reader finds the first and torch's the second."""
    tail = hidden.index(b"PK\x06\x06")
    length, start = struct.unpack("<2I", hidden[-10:-2])
    return hidden[:tail] + shown[:tail] + b"PK\x05\x06" + hidden[-18:-10] + struct.pack("<2IH", length, start, 0)


def archive_entries() -> dict[str, dict[str, bytes]]:
    """Names that lead out, links, devices, bombs."""
    outside = {
        "parent": "../evil.nii",
        "absolute": "/tmp/evil.nii",
        "drive": "C:\\evil.nii",
        "backslash": "..\\evil.nii",
    }
    tapes = {f"name-{what}--x.tar": seeds.taped({name: b"x"}) for what, name in outside.items()}
    kinds = {"symlink": b"2", "hard-link": b"1", "fifo": b"6", "device": b"3"}
    for what, kind in kinds.items():
        tapes[f"{what}--x.tar"] = seeds.taped({"p/x.nii": b""}, type=kind, linkname="/etc/passwd")
    return {
        "zip": {f"name-{what}--x.zip": seeds.zipped({name: b"x"}) for what, name in outside.items()}
        | {
            "symlink--x.zip": seeds.zipped({"x.nii": b"/etc/passwd"}, 0o120777),
            "names-differ-in-case--x.zip": seeds.zipped({"P/x.nii": b"1", "p/X.nii": b"2"}),
            "bomb--x.zip": seeds.zipped({f"{n}.nii": bytes(2**20) for n in range(11)}),
        },
        "tar": tapes | {"bomb--x.tgz": gzip.compress(seeds.taped({"x.nii": bytes(11 * 2**20)}), mtime=0)},
    }


def onnx_entries() -> dict[str, bytes]:
    """Weights elsewhere, weights that are not there, and what OpenVINO takes for granted."""
    import onnx

    def graph(change: Callable[[Any], object]) -> bytes:
        model = onnx.load_from_string(seeds.onnx_graph())
        change(model)
        data: bytes = model.SerializeToString()
        return data

    def make_smaller(model: Any) -> None:
        model.graph.node[0].output[0] = "wide"
        model.graph.node.append(onnx.helper.make_node("MaxPool", ["wide"], ["logits"], kernel_shape=[3, 3, 3]))

    labels = [{"name": "background", "label": 0}, {"name": "edema", "label": 2}]
    return {
        "opset-of-2-billion--model.onnx": graph(lambda model: setattr(model.opset_import[0], "version", 2**31)),
        "goes-in-circles--model.onnx": graph(lambda model: setattr(model.graph.node[0], "op_type", "Loop")),
        "convolution-without-weights--model.onnx": graph(lambda model: model.graph.node[0].input.pop()),
        "logits-of-6-x-6-x-6--model.onnx": graph(make_smaller),
        "label-without-a-name--model.json": changed(seeds.GRAPH_CARD, "outputs", to=labels),
        "weights-outside--model.onnx": seeds.onnx_graph("../../etc/passwd"),
        "weights-absolute--model.onnx": seeds.onnx_graph("/etc/passwd"),
        "weights-in-an-unlisted-file--model.onnx": seeds.onnx_graph("other.data"),
        "claims-1e12-weights--model.onnx": seeds.onnx_graph("model.onnx", (10**6, 10**6, 1, 1, 1)),
        "is-text--model.onnx": b"no graph at all",
    }


def main() -> None:
    """Write all entries, in place of those that are there."""
    everything = {
        "nifti": nifti_entries(),
        "config": yaml_entries(),
        "override": {"nested-5000-deep--set.txt": b"data.fold=" + b"[" * 5000, "date--set.txt": b"a=2001-99-99"},
        "onnx-onnxruntime": onnx_entries(),
        "onnx-openvino": onnx_entries(),
        **image_entries(),
        **dicom_entries(),
        **json_entries(),
        **pickle_entries(),
        **archive_entries(),
    }
    shutil.rmtree(CORPUS, ignore_errors=True)
    for parser, entries in everything.items():
        (CORPUS / parser).mkdir(parents=True)
        for name, content in entries.items():
            (CORPUS / parser / name).write_bytes(content)


if __name__ == "__main__":
    main()
