"""Files that were made to attack: each is refused, nothing in them is run, nothing lands outside its folder."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import seeds

from segkit.checkpoint.model import read_source
from segkit.checkpoint.nnunet import read_results
from segkit.checkpoint.run_folder import load_card
from segkit.checkpoint.tensors import load_state, load_weights_file, read_plain_pickle, read_torch
from segkit.errors import CheckpointError, DataError, RequestError, SegkitError
from segkit.reading.archives import unpacked
from segkit.reading.files import read_volume
from segkit.reading.layouts.table import find_cases


class Burglar:
    """Pickles to `function(*arguments)`, by default one that makes a folder."""

    def __init__(self, trace: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.call = function, (str(trace),)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What code in a file would make."""
    return tmp_path / "canary"


FORMS: dict[str, Callable[[Path], Any]] = {
    "a call": Burglar,
    "a system call": lambda trace: Burglar(Path(f"mkdir {trace}"), os.system),
    "a process": lambda trace: Burglar(Path(f"mkdir {trace}"), subprocess.getoutput),
    "an expression": lambda trace: Burglar(Path(f"__import__('os').mkdir('{trace}')"), eval),
    "an array of objects": lambda trace: np.array([Burglar(trace), None], dtype=object),
    "a key of a mapping": lambda trace: {Burglar(trace).call[1]: [({"deep": Burglar(trace)},)]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.pth", load_weights_file),
        ("x.pth", read_source),
        ("x.model", read_torch),
        ("last.ckpt", lambda path: load_state(path.parent)),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_not_run(
    tmp_path: Path, canary: Path, form: str, name: str, read: Callable[[Path], object], is_zip: bool
) -> None:
    document = {"state_dict": OrderedDict(w=torch.ones(2)), "optimizer": {"extra": FORMS[form](canary)}}
    torch.save(document, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="carries code"):
        read(tmp_path / name)
    assert not canary.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert canary.exists(), "the file would not have attacked anyone"


@pytest.mark.parametrize("form", FORMS)
def test_code_in_plans_is_not_run(tmp_path: Path, canary: Path, form: str) -> None:
    path = tmp_path / "x.model.pkl"
    path.write_bytes(pickle.dumps({"plans": {"all_classes": FORMS[form](canary)}, "name": "STUNetTrainer", "init": ()}))
    with pytest.raises(CheckpointError, match="carries code"):
        read_plain_pickle(path)
    with pytest.raises(CheckpointError, match="carries code"):
        read_results(tmp_path / "x.model", {})
    assert not canary.exists()


def test_a_package_of_torch_is_refused(tmp_path: Path, canary: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as packed:
        packed.writestr("x/.data/python_version", "3.11")
        packed.writestr("x/model/model.pkl", pickle.dumps(Burglar(canary)))
        packed.writestr("x/evil.py", f"import os; os.mkdir({str(canary)!r})")
    with pytest.raises(CheckpointError, match=r"is damaged|carries code"):
        load_weights_file(tmp_path / "x.pth")
    assert not canary.exists()


class Forged:
    """Pickles to an array of objects over bytes: numpy would take them for addresses."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")


def test_bytes_do_not_become_addresses(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Forged()}, tmp_path / "x.pth")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Forged()))
    with pytest.raises(CheckpointError):
        read_torch(tmp_path / "x.pth")
    with pytest.raises(CheckpointError):
        read_plain_pickle(tmp_path / "x.pkl")


def test_plain_numbers_of_numpy_are_read(tmp_path: Path) -> None:
    document = {
        "numbers": [np.float32(0.5), np.int64(-3), np.bool_(True), np.float64(2.5)],
        "little": np.arange(6, dtype="<f4").reshape(2, 3),
        "big": np.arange(6, dtype=">i2").reshape(2, 3, order="F"),
    }
    torch.save(document, tmp_path / "x.pth")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(document))
    for read in (read_torch(tmp_path / "x.pth"), read_plain_pickle(tmp_path / "x.pkl")):
        assert read["numbers"] == document["numbers"]
        assert read["little"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert read["big"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_packed_torch_file_is_not_unpacked(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2**20)}, stream)
    with zipfile.ZipFile(stream) as honest, zipfile.ZipFile(tmp_path / "x.pth", "w") as bomb:
        for info in honest.infolist():
            bomb.writestr(info.filename, honest.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="its parts are packed and unpack to 4194"):
        load_weights_file(tmp_path / "x.pth")


def test_a_stream_that_unpacks_to_more_than_its_header_says_is_left(tmp_path: Path) -> None:
    honest = seeds.nifti()
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(honest + bytes(200 * 2**20), 1))
    with pytest.raises(DataError, match="after its voxels the file unpacks to more than"):
        read_volume(tmp_path / "x.nii.gz")
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(honest + bytes(2**20), 1))
    assert read_volume(tmp_path / "y.nii.gz").array.shape == seeds.SHAPE


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_files_are_not_made_into_pictures(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "secret").write_bytes(b"S" * 48)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"x{suffix}"
    path.write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nencoding: raw\nendian: little\ndata file: ../secret\n\n"
        if suffix == ".nrrd"
        else "NDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\nElementDataFile = ../secret\n"
    )
    with pytest.raises(DataError, match="says that the voxels lie in"):
        read_volume(path)


def write_scan(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(seeds.packed(seeds.nifti()))
    return path


@pytest.mark.parametrize("way", ["../../private/a_0000.nii.gz", "{private}/a_0000.nii.gz"])
def test_a_data_set_cannot_name_files_elsewhere(tmp_path: Path, way: str) -> None:
    write_scan(tmp_path / "private" / "a_0000.nii.gz")
    write_scan(tmp_path / "data" / "set" / "imagesTr" / "b_0000.nii.gz")
    way = way.format(private=tmp_path / "private")
    entry = {"images": ["imagesTr/b_0000.nii.gz"]}
    listed = {"a": {"images": [way]}, "b": entry, "../c": entry, "d\ne": entry}
    document = {**seeds.DATASET_NNUNET, "dataset": listed}
    (tmp_path / "data" / "set" / "dataset.json").write_text(json.dumps(document))
    cohort = find_cases(tmp_path / "data" / "set")
    assert [case.id for case in cohort.cases] == ["b"]
    complaints = [problem.found for problem in cohort.problems if "names no image inside the data set" in problem.found]
    assert len(complaints) == 3


def test_links_of_the_owner_are_followed(tmp_path: Path) -> None:
    write_scan(tmp_path / "disk" / "b_0000.nii.gz")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "imagesTr").symlink_to(tmp_path / "disk")
    listed = {"b": {"images": ["imagesTr/b_0000.nii.gz"]}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({**seeds.DATASET_NNUNET, "dataset": listed}))
    cohort = find_cases(tmp_path / "set")
    assert read_volume(cohort.cases[0].images["t2f"].path).array.shape == seeds.SHAPE


def test_an_archive_of_an_archive_is_not_unpacked_in_turn(tmp_path: Path) -> None:
    inner = seeds.zipped({f"{number}.nii": bytes(2**20) for number in range(10)})
    (tmp_path / "x.zip").write_bytes(seeds.zipped({"a/inner.zip": inner, "a/T1.nii": b"1"}))
    folder = unpacked(tmp_path / "x.zip", tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["T1.nii", "inner.zip"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "../../../../x"}, "sha256: String should match pattern"),
        ({"patch_size": [10**4] * 3}, "too large for any machine"),
        ({"patch_size": [8, 8]}, "patch_size has 2 values for 3 axes"),
        ({"overlap": 1.0}, "overlap: Input should be less than 1"),
        ({"divisor": [0, 1, 1]}, "divisor.0: Input should be greater than or equal to 1"),
        ({"spacing_mm": [float("nan")] * 3}, "spacing_mm.0: Input should be a finite number"),
        ({"outputs": [{"name": "a\nb", "label": 1}]}, "is not a printable name"),
        ({"outputs": [{"name": "a", "label": 7}]}, r"outputs paint \[7\], for which label_scheme has no names"),
        ({"outputs": [{"name": "a", "label": 300}]}, "label: Input should be less than or equal to 255"),
        ({"network": {"family": "x", "in_channels": 10**9, "out_channels": 1}}, "in_channels: Input should be less"),
        ({"network": {"family": "x", "in_channels": 1, "out_channels": 1, "arguments": {"w": [10**9]}}}, "no network"),
    ],
)
def test_cards_are_held_to_what_networks_can_have(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "model.json").write_text(json.dumps({**seeds.CARD, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_card(tmp_path)


def test_graphs_open_no_other_files(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from segkit.inference.graph_check import require_harmless

    (tmp_path / "secret").write_bytes(bytes(8))
    folder = tmp_path / "export"
    folder.mkdir()
    graph = folder / "model.onnx"
    for location in ("../secret", str(tmp_path / "secret"), "model.onnx.data/../../secret"):
        graph.write_bytes(seeds.onnx_graph(location))
        with pytest.raises(CheckpointError, match="the graph keeps weights in"):
            require_harmless(graph, ["model.onnx"])
    graph.write_bytes(seeds.onnx_graph("model.onnx.data"))
    (folder / "model.onnx.data").write_bytes(bytes(8))
    require_harmless(graph, ["model.onnx", "model.onnx.data"])
    graph.write_bytes(seeds.onnx_graph("model.onnx.data", (10**6, 10**6, 1, 1, 1)))
    with pytest.raises(CheckpointError, match="claims weights of 1000000 x 1000000"):
        require_harmless(graph, ["model.onnx", "model.onnx.data"])
    graph.write_bytes(seeds.onnx_graph())
    require_harmless(graph, ["model.onnx"])


def test_a_mask_is_written_where_the_names_of_outputs_cannot_lead(tmp_path: Path) -> None:
    from segkit.reading.case import file_name_of

    assert file_name_of("../../etc/x") == ".._.._etc_x"
    assert file_name_of("tumour core") == "tumour core"
    assert (tmp_path / f"case_{file_name_of('../../x')}.nii.gz").resolve().parent == tmp_path.resolve()


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path, canary: Path) -> None:
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({canary}) (w) file closefile\n"
    (tmp_path / "x.png").write_text(text)
    with pytest.raises(DataError, match="cannot be read"):
        read_volume(tmp_path / "x.png")
    assert not canary.exists()


def test_settings_make_no_objects(tmp_path: Path, canary: Path) -> None:
    from segkit.config import parse_overrides, read_yaml

    attack = f"!!python/object/apply:os.mkdir ['{canary}']"
    (tmp_path / "config.yaml").write_text(f"data: {attack}")
    with pytest.raises(RequestError, match="is not valid YAML"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(RequestError, match="the value is not YAML"):
        parse_overrides([f"data={attack}"])
    assert not canary.exists()


def test_an_element_of_4_gigabytes_costs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from segkit.reading.files import read_grid

    entry = Path(__file__).parent / "corpus" / "dicom-series" / "element-of-4-gigabytes--0.dcm"
    for number in range(1, 5):
        (tmp_path / f"{number}.dcm").write_bytes(seeds.dicom_slice(number))
    (tmp_path / "0.dcm").write_bytes(entry.read_bytes())
    with pytest.raises(SegkitError, match=r"element \(0029,0010\) claims 4294967280 bytes where \d+ are left"):
        read_grid(tmp_path)
