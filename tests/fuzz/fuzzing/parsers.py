"""Every parser of segkit that reads what others made: honest seeds, how they are changed, and what reads them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from fuzzing import mutators, seeds

Change = Callable[[bytes, random.Random], bytes]
Files = Mapping[str, bytes]
"""Name -> contents of the files of one input; the first is the one that is changed."""


@dataclass(frozen=True)
class Parser:
    """`seeds` gives honest inputs, `changes` how their first file is changed (by the end of its name, "" for any).

    `read` is called with the folder that holds the files and the first of them; it may raise a SegkitError and nothing
    else.
    """

    name: str
    seeds: Callable[[], list[Files]]
    changes: Mapping[str, Change]
    read: Callable[[Path, Path], object]
    kept: Callable[[], Files] = field(default=dict)
    """Further files that lie beside every input and are not changed."""

    def change(self, name: str, data: bytes, rng: random.Random) -> bytes:
        """The file changed."""
        suffix = next(suffix for suffix in self.changes if name.endswith(suffix))
        return self.changes[suffix](data, rng)


def _bytes(*words: bytes) -> Change:
    return partial(mutators.mutated_bytes, words=words)


def _header(length: int) -> Change:
    def change(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutators.mutated_bytes(data, rng)
        return mutators.mutated_header(data, rng, min(length, len(data)))

    return change


def _gzip(change: Change) -> Change:
    return partial(mutators.mutated_gzip, change=change)


def _volume(_: Path, path: Path) -> None:
    from segkit.data.files import count_channels, read_grid, read_labels, read_volume
    from segkit.errors import DataError

    grid = read_grid(path)
    channels = count_channels(path)
    volume = read_volume(path, channels - 1 if channels > 1 else None)
    assert volume.array.shape == grid.shape
    assert all(length > 0 for length in grid.spacing_mm)
    assert len(grid.orientation) in (0, 3)
    with suppress(DataError):  # an image need not be a label map
        read_labels(path, 0 if channels > 1 else None)


def _copy_of_volume(folder: Path, path: Path) -> None:
    import numpy as np

    from segkit.data.files import read_grid, rewrite_image, suffix_of

    _volume(folder, path)
    grid = read_grid(path)
    where = np.zeros(grid.shape, bool)
    where.flat[0] = True
    rewrite_image(folder / f"copy{suffix_of(path)}", path, where, np.array([3.0]), 0)


def _series(folder: Path, _: Path) -> None:
    from segkit.data.dicom import frames_of, holds_frames, is_dicom_file
    from segkit.data.files import read_volume

    for path in folder.iterdir():
        if is_dicom_file(path):
            holds_frames(path)
    frames_of(folder)
    read_volume(folder)


def _frames(folder: Path, path: Path) -> None:
    from segkit.data.dicom import frames_of, holds_frames

    holds_frames(path)
    _volume(folder, path)
    frames_of(path)


def _seg(folder: Path, _: Path) -> None:
    import numpy as np

    from segkit.data.dicom_seg import write_dicom_seg
    from segkit.data.files import read_grid

    series = folder / "series"
    series.mkdir()
    for path in list(folder.glob("*.dcm")):
        path.rename(series / path.name)
    labels = np.zeros(read_grid(series).shape, np.uint8)
    labels.flat[0] = 1
    write_dicom_seg(folder / "mask.dcm", labels, series, {"edema": 1})


def _config(_: Path, path: Path) -> None:
    from segkit.config.loading import annotated_yaml, build_config, read_yaml
    from segkit.training.config import TrainConfig

    document = read_yaml(path)
    config = build_config(TrainConfig, [(str(path), document)])
    annotated_yaml(config)


def _override(_: Path, path: Path) -> None:
    from segkit.config.loading import build_config, parse_overrides
    from segkit.training.config import TrainConfig

    settings = path.read_text(encoding="utf-8", errors="replace").split("\n")
    build_config(TrainConfig, [("--set", parse_overrides(settings))])


def _cohort(folder: Path, _: Path, layout: str | None = None) -> None:
    from segkit.data.layouts.table import find_cases

    cohort = find_cases(folder, layout=layout)
    root = folder.resolve()
    for case in cohort.cases:
        for image in (*case.images.values(), *([case.label] if case.label else [])):
            assert image.path.resolve().is_relative_to(root), f"{image.path} lies outside the data set"
    for scheme in (cohort.scheme, *(case.scheme for case in cohort.cases)):
        assert scheme is None or all(0 < value < 256 for value in scheme.values.values())


def _manifest(folder: Path, _: Path) -> None:
    from segkit.inference.manifest import CaseRecord, Manifest
    from segkit.report.pairing import pair_folders

    manifest = Manifest(folder, ["a", "c"], {}, "abc")
    manifest.was_made("a", "brats2017", ())
    manifest.was_cut_short("c")
    manifest.add(CaseRecord("c", "done"))
    pair_folders(folder, folder / "references", label_scheme="brats2017")


def _card(folder: Path, path: Path) -> None:
    from segkit.checkpoint import load_card, load_model

    card = load_card(folder)
    card.preprocessing()
    if card.task == "segmentation":
        card.output_list()
    card.to_json()
    document = json.loads(path.read_bytes())
    document["sha256"] = _digest(folder / "model.safetensors")
    path.write_bytes(seeds.as_json(document))
    load_model(folder)


def _archive(folder: Path, path: Path) -> None:
    from segkit.data.archives import unpacked

    into = folder / "into"
    into.mkdir()
    unpacked(path, into, most_bytes=10**7)


def _weights(_: Path, path: Path) -> None:
    from segkit.checkpoint import read_source

    source = read_source(path)
    for tensor in source.tensors.values():
        tensor.float().sum()


def _plans(_: Path, path: Path) -> None:
    from segkit.checkpoint.nnunet_plans import read_plan

    plan = read_plan(path.with_suffix(""), {})
    repr(plan)


def _result(folder: Path, _: Path) -> None:
    from segkit.checkpoint import load_card, load_model

    result = folder / "result"
    (result / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (folder / name).replace(result / name)
    shutil.copyfile(folder / "checkpoint_final.pth", result / "fold_0" / "checkpoint_final.pth")
    load_card(result)
    load_model(result)


def _graph(folder: Path, path: Path, backend: str) -> None:
    import numpy as np

    from segkit.checkpoint.card import ModelCard
    from segkit.inference.opening import open_backend

    document = json.loads(json.dumps(seeds.CARD))
    document["network"]["out_channels"] = 2
    document["export"]["graphs"][0]["sha256"] = {path.name: _digest(path)}
    card = ModelCard.model_validate(document)
    opened = open_backend(folder, card, "cpu", backend, (8, 8, 8))
    opened(np.zeros((1, 1, 8, 8, 8), np.float32))


def _tsv(folder: Path, path: Path) -> None:
    anat = folder / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for name in ("sub-01_T1w.nii.gz", "sub-01_dseg.nii.gz"):
        (anat / name).write_bytes(_plain_volume())
    _cohort(folder, path, "bids")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tape() -> bytes:
    return seeds.taped({"p/a.nii": b"one", "p/b.nii": bytes(2000)})


@cache
def _plain_volume() -> bytes:
    return seeds.packed(seeds.nifti())


def _volumes(*names: str) -> Callable[[], Files]:
    return lambda: {name: _plain_volume() for name in names}


def _cards_weights() -> Files:
    import safetensors.torch

    from segkit.checkpoint.card import ModelCard
    from segkit.checkpoint.model import build_network

    network = build_network(ModelCard.model_validate(seeds.CARD))
    return {"model.safetensors": safetensors.torch.save(dict(network.state_dict()))}


def _result_seeds() -> list[Files]:
    import torch

    import segkit

    strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    network = segkit.build_model("stunet", in_channels=1, out_channels=3, width=1, depth=1, strides=strides)
    document = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": "3d_bigger", "plans": {}, "dataset_json": {}},
        "trainer_name": "STUNetTrainer_small",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    assert isinstance(network, torch.nn.Module)
    labels = {"background": 0, "left": 1, "right": 2}
    dataset = {"channel_names": {"0": "FLAIR"}, "labels": labels, "numTraining": 5, "licence": "CC0"}
    files = {
        "plans.json": seeds.as_json(seeds.PLANS_JSON),
        "dataset.json": seeds.as_json(dataset),
        "checkpoint_final.pth": seeds.torch_file(document),
    }
    return [{first: files[first], **files} for first in files]


def _images(*suffixes_and_modes: tuple[str, str]) -> list[Files]:
    return [{f"x{suffix}": seeds.picture(suffix, mode)} for suffix, mode in suffixes_and_modes]


_NIFTI_SEEDS = [
    lambda: seeds.nifti(),
    lambda: seeds.nifti(">f4"),
    lambda: seeds.nifti("<f8", 2),
    lambda: seeds.nifti("|u1", channels=2),
    lambda: seeds.nifti(has_extension=True),
]
_NRRD_WORDS = (
    *(b"sizes: ", b"type: ", b"encoding: gzip\n", b"encoding: raw\n", b"dimension: ", b"1000000000000", b"-1", b"nan"),
    *(b"space directions: ", b"(1,0,0)", b"none", b"data file: /etc/passwd\n", b"data file: LIST\n", b"endian: big\n"),
    *(b"line skip: ", b"byte skip: -1\n", b"kinds: vector domain domain\n", b"block size: 1000000000\n"),
)
_META_WORDS = (
    *(b"NDims = ", b"DimSize = ", b"1000000000 1000000000 1", b"-1", b"nan", b"ElementType = MET_", b"DOUBLE", b"\n"),
    *(b"ElementDataFile = /etc/passwd\n", b"ElementDataFile = LIST\n", b"ElementDataFile = LOCAL\n", b"17", b"= \n"),
    *(b"CompressedData = True\n", b"CompressedDataSize = 99999999999\n", b"ElementNumberOfChannels = 65536\n"),
    *(b"HeaderSize = -1\n", b"HeaderSize = 999999999\n", b"TransformMatrix = 0 0 0 0 0 0 0 0 0\n", b"BinaryData = "),
)
_YAML_WORDS = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system ['true']\n",
        b"!!python/name:os.system",
        b"? ",
        b"- ",
    ),
    *(
        b"{",
        b"[",
        b"]",
        b"}",
        b": ",
        b"\n  ",
        b"!!binary x",
        b"!!timestamp x",
        b"!!int x",
        b"!!set {a, b}",
        b"2001-99-99",
    ),
    *(b"9" * 5000, b".inf", b".nan", b"1:99:99", b"'", b'"', b"| \n", b"%YAML 9.9\n---\n", b"---\n", b"\t", b"\x00"),
)
_JSON_WORDS = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 500,
    b'"\\ud800"',
    b"\\u0000",
    b"null",
)
_PICKLE_WORDS = (
    *(
        b"cos\nsystem\n",
        b"\x8c\x02os\x8c\x06system\x93",
        b"cposix\nsystem\n",
        b"cbuiltins\neval\n",
        b"R",
        b"b",
        b"\x81",
    ),
    *(
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\nscalar\n",
        b"(K\x01K\x01t",
        b"X\x01\x00\x00\x00O",
    ),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"c_codecs\nencode\n", b"N", b")", b"}", b"]", b"h\x00", b"q\x00", b"."),
)
_NAME_WORDS = (b"../", b"/", b"..\\", b"C:", b"\x00", b"\n", b"con", b".", b"~", b"\xff")


_JSON: Change = partial(mutators.mutated_json, words=_JSON_WORDS)
_PICKLE_IN_ZIP: Change = partial(mutators.mutated_zip_member, suffix=".pkl", words=_PICKLE_WORDS)

PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        Parser(
            "nifti",
            lambda: (
                [{"x.nii": make()} for make in _NIFTI_SEEDS]
                + [{"x.nii.gz": seeds.packed(make())} for make in _NIFTI_SEEDS]
            ),
            {".gz": _gzip(_header(560)), "": _header(560)},
            _copy_of_volume,
        ),
        Parser(
            "mgh",
            lambda: [{"x.mgh": seeds.mgh()}, {"x.mgz": seeds.packed(seeds.mgh())}],
            {".mgz": _gzip(_header(290)), "": _header(290)},
            _volume,
        ),
        Parser(
            "nrrd",
            lambda: [{"x.nrrd": seeds.itk(".nrrd", is_compressed=packed)} for packed in (False, True)],
            {"": _bytes(*_NRRD_WORDS)},
            _volume,
        ),
        Parser(
            "metaimage",
            lambda: (
                [{"x.mha": seeds.itk(".mha", is_compressed=packed)} for packed in (False, True)]
                + [{"x.mhd": seeds.itk(".mhd", is_compressed=False), "seed.raw": bytes(48)}]
            ),
            {"": _bytes(*_META_WORDS)},
            _volume,
        ),
        Parser(
            "picture",
            lambda: _images((".png", "L"), (".png", "P"), (".png", "RGB"), (".png", "RGBA"), (".png", "1")),
            {"": mutators.mutated_png},
            _volume,
        ),
        Parser(
            "photograph",
            lambda: _images((".jpg", "L"), (".jpg", "RGB"), (".tif", "L"), (".bmp", "RGB"), (".gif", "P")),
            {"": _bytes()},
            _volume,
        ),
        Parser(
            "dicom-series",
            lambda: [{f"{n}.dcm": seeds.dicom_slice(n) for n in range(5)}],
            {"": _bytes()},
            _series,
        ),
        Parser("dicom-frames", lambda: [{"x.dcm": seeds.dicom_frames()}], {"": _bytes()}, _frames),
        Parser("dicom-seg", lambda: [{f"{n}.dcm": seeds.dicom_slice(n) for n in range(5)}], {"": _bytes()}, _seg),
        Parser("config", lambda: [{"config.yaml": seeds.CONFIG.encode()}], {"": _bytes(*_YAML_WORDS)}, _config),
        Parser(
            "override",
            lambda: [{"set.txt": b"data.fold=1\ndata.modalities={t1c: _t1ce}"}],
            {"": _bytes(*_YAML_WORDS, b"=", b".")},
            _override,
        ),
        Parser(
            "dataset-json-msd",
            lambda: [{"dataset.json": seeds.as_json(seeds.DATASET_MSD)}],
            {"": _JSON},
            _cohort,
            _volumes(
                *(f"images{'Ts' if n == 'c' else 'Tr'}/{n}.nii.gz" for n in "abc"),
                *(f"labelsTr/{n}.nii.gz" for n in "ab"),
            ),
        ),
        Parser(
            "dataset-json-nnunet",
            lambda: [{"dataset.json": seeds.as_json(seeds.DATASET_NNUNET)}],
            {"": _JSON},
            _cohort,
            _volumes(*(f"imagesTr/{n}_0000.nii.gz" for n in "ab"), *(f"labelsTr/{n}.nii.gz" for n in "ab")),
        ),
        Parser(
            "bids-table",
            lambda: [{"x_dseg.tsv": b"index\tname\n1\tedema\n2\ttumour\n"}],
            {"": _bytes(b"\t", b"\n", b'"', b"-1", b"99999", b"9" * 5000, b"\x00", b"nan")},
            _tsv,
        ),
        Parser(
            "manifest",
            lambda: [{"manifest.json": seeds.as_json(seeds.MANIFEST)}],
            {"": _JSON},
            _manifest,
            _volumes("a.nii.gz", "references/a.nii.gz", "references/b.nii.gz"),
        ),
        Parser(
            "model-card",
            lambda: [{"model.json": seeds.as_json(seeds.CARD)}],
            {"": _JSON},
            _card,
            _cards_weights,
        ),
        Parser(
            "zip",
            lambda: [{"x.zip": seeds.zipped({"p/a.nii": b"one", "p/b.nii": bytes(2000), "c.nii": b"x"}, 0o100644)}],
            {"": partial(mutators.mutated_zip_member, suffix=".nii", words=_NAME_WORDS)},
            _archive,
        ),
        Parser(
            "tar",
            lambda: [{"x.tar": _tape()}, {"x.tar.gz": seeds.packed(_tape())}],
            {".gz": _gzip(_header(1600)), "": _header(1600)},
            _archive,
        ),
        Parser(
            "safetensors",
            lambda: [{"x.safetensors": seeds.safetensors_file()}],
            {
                "": _bytes(
                    b'"dtype":"F8_E8M0"', b'"dtype":"BF16"', b"[1000000000000]", b"[0]", b"[-1]", b'"__metadata__"'
                )
            },
            _weights,
        ),
        Parser(
            "torch-zip",
            lambda: [{"x.pth": seeds.torch_file()}],
            {"": _PICKLE_IN_ZIP},
            _weights,
        ),
        Parser(
            "torch-legacy",
            lambda: [{"x.ckpt": seeds.torch_file(is_zip=False)}],
            {"": _bytes(*_PICKLE_WORDS)},
            _weights,
        ),
        Parser(
            "plans-pickle",
            lambda: [{"x.model.pkl": seeds.plans_pickle()}],
            {"": _bytes(*_PICKLE_WORDS)},
            _plans,
        ),
        Parser(
            "nnunet-result",
            _result_seeds,
            {
                ".json": _JSON,
                "": _PICKLE_IN_ZIP,
            },
            _result,
        ),
        *(
            Parser(
                f"onnx-{backend}",
                lambda: [{"model.onnx": seeds.onnx_graph()}],
                {"": _bytes(b"location", b"../../etc/passwd", b"Loop", b"If")},
                partial(_graph, backend=backend),
            )
            for backend in ("onnxruntime", "openvino")
        ),
    )
}
