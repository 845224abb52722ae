"""Archives of scans, honest ones and traps; and that what is unpacked is read like the folder it was."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segkit.errors import DataError
from segkit.reading import archives
from segkit.reading.archives import is_archive, opened, unpacked
from segkit.reading.files import read_volume
from segkit.reading.layouts.table import find_cases


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members.items():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def taped(path: Path, members: dict[str, bytes], **changes: Any) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tape:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tape.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def scan(channels: int = 1) -> bytes:
    array = np.arange(4 * 3 * 2 * channels, dtype=np.int16).reshape(4, 3, 2, channels)
    image = nib.Nifti1Image(array if channels > 1 else array[..., 0], np.eye(4))
    data: bytes = image.to_bytes()
    return data


def series(folder: Path, count: int = 4) -> Path:
    """Slices of a DICOM series without a suffix, as discs have them."""
    import SimpleITK

    folder.mkdir(parents=True)
    for number in range(count):
        image = SimpleITK.GetImageFromArray(np.full((1, 3, 4), number, np.uint16))
        image.SetMetaData("0020|000e", "1.2.3.4")
        image.SetMetaData("0020|0032", f"0\\0\\{2 * number}")
        image.SetMetaData("0020|0037", "1\\0\\0\\0\\1\\0")
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / "slice.dcm"))
        writer.Execute(image)
        (folder / "slice.dcm").rename(folder / f"IM{number}")
    return folder


PACKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    ".zip": zipped,
    ".tar": taped,
    ".tar.gz": taped,
    ".tgz": taped,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_goes_in_comes_out(tmp_path: Path, suffix: str) -> None:
    members = {"p1/T1.nii": b"one", "p1/FLAIR.nii": b"two" * 1000, "./p2/T1.nii": b"", "p2/deep/er/x.nii": b"\0\1"}
    path = PACKERS[suffix](tmp_path / f"my scans{suffix.upper()}", members)
    folder = unpacked(path, tmp_path / "out")
    assert folder == tmp_path / "out" / "my scans"
    assert contents(folder) == {name.removeprefix("./"): content for name, content in members.items()}


def test_one_folder_at_the_top_is_what_is_given(tmp_path: Path) -> None:
    for name, members, expected in (
        ("folder", {"BraTS2021_00001/a.nii": b"1", "BraTS2021_00001/b/c.nii": b"2"}, "folder/BraTS2021_00001"),
        ("file", {"case7.nii": b"1"}, "file/case7.nii"),
        ("two", {"a/x.nii": b"1", "y.nii": b"2"}, "two"),
    ):
        assert unpacked(zipped(tmp_path / f"{name}.zip", members), tmp_path / "out") == tmp_path / "out" / expected


def test_hidden_files_and_junk_are_left_out(tmp_path: Path) -> None:
    members = {
        "p/T1.nii": b"1",
        "__MACOSX/p/._T1.nii": b"2",
        "p/.DS_Store": b"3",
        ".git/config": b"4",
        "p/._T1.nii": b"5",
    }
    for path in (zipped(tmp_path / "a.zip", members), taped(tmp_path / "b.tar", members)):
        assert contents(unpacked(path, tmp_path / path.suffix)) == {"T1.nii": b"1"}
    with pytest.raises(DataError, match="the archive holds no files"):
        unpacked(zipped(tmp_path / "c.zip", {".DS_Store": b"3"}), tmp_path / "c")
    assert not any((tmp_path / "c").iterdir())


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../evil.nii", "a/../../evil.nii", "/tmp/evil.nii", "..\\evil.nii", "C:\\evil.nii", "c:evil.nii"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, suffix: str, name: str) -> None:
    path = PACKERS[suffix](tmp_path / f"a{suffix}", {"good.nii": b"1", name: b"2"})
    with pytest.raises(DataError, match=r"would write outside its folder \(.*evil\.nii'\)"):
        unpacked(path, tmp_path / "out")
    assert sorted(found.name for found in tmp_path.rglob("*")) == [f"a{suffix}", "out"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = taped(tmp_path / "a.tar", {"p/link.nii": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match=r"holds a link or a device \(p/link\.nii\); expected plain files"):
        unpacked(path, tmp_path / "out")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.nii")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"holds a link or a device \(link\.nii\)"):
        unpacked(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_too_much_is_refused_before_anything_is_written(tmp_path: Path, suffix: str) -> None:
    members = {f"{number}.nii": bytes(2**20) for number in range(4)}
    path = PACKERS[suffix](tmp_path / f"a{suffix}", members)
    assert path.stat().st_size < 2**14
    assert len(contents(unpacked(path, tmp_path / "fits", most_bytes=4 * 2**20))) == 4
    with pytest.raises(DataError, match="unpacks to 4 MB or more; expected at most 3 MB"):
        unpacked(path, tmp_path / "out", most_bytes=3 * 2**20)
    assert not any((tmp_path / "out").iterdir())


def test_more_than_the_disk_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "a.zip", {"a.nii": bytes(2 * 2**20)})
    usage = shutil.disk_usage(tmp_path)._replace(free=257 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="unpacks to 2 MB or more; expected at most the 1 MB that the disk has room"):
        unpacked(path, tmp_path / "out")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_FILES", 3)
    with pytest.raises(DataError, match="holds more than 3 files"):
        unpacked(zipped(tmp_path / "a.zip", {f"{number}": b"" for number in range(4)}), tmp_path / "out")


def test_a_size_that_lies(tmp_path: Path) -> None:
    """A zip that declares 10 bytes of a member of 1000: no more than those 10 are ever written."""
    path = zipped(tmp_path / "a.zip", {"a.nii": bytes(1000)})
    raw = path.read_bytes()
    assert raw.count((1000).to_bytes(4, "little")) == 2
    path.write_bytes(raw.replace((1000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"the archive is damaged.*CRC"):
        unpacked(path, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_encrypted_and_unknown_packing(tmp_path: Path) -> None:
    raw = zipped(tmp_path / "a.zip", {"a.nii": b"1"}).read_bytes()
    directory = raw.index(b"PK\1\2")
    for offset, value, match in (
        (8, 1, "the archive is encrypted. Unpack it with its password"),
        (10, 9, "packed in a way that cannot be read here"),  # method 9: Deflate64, which Windows uses above 2 GB
    ):
        changed = bytearray(raw)
        changed[directory + offset] = value
        changed[offset - 2] = value
        (tmp_path / "b.zip").write_bytes(changed)
        with pytest.raises(DataError, match=match):
            unpacked(tmp_path / "b.zip", tmp_path / "out")


@pytest.mark.parametrize("suffix", PACKERS)
def test_damaged_archives(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20000, np.uint8).tobytes()
    path = PACKERS[suffix](tmp_path / f"a{suffix}", {"a.nii": noise})
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"this is no archive" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.(zip|tar|tar\.gz|tgz): .*(damaged|truncated)"):
            unpacked(path, tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        unpacked(path, tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        unpacked(tmp_path / f"none{suffix}", tmp_path / "out")


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a.nii", b"A" * 100)
    path.write_bytes(path.read_bytes().replace(b"AAA", b"ABA", 1))
    with pytest.raises(DataError, match="the archive is damaged"):
        unpacked(path, tmp_path / "out")


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for names in (("IM1", "IM1"), ("a", "a/b"), ("a/b", "a"), ("a\\b", "a/b")):
        with tarfile.open(tmp_path / "a.tar", "w") as tape:
            for name in names:
                tape.addfile(tarfile.TarInfo(name))
        with pytest.raises(DataError, match="two files of one name"):
            unpacked(tmp_path / "a.tar", tmp_path / "out")


def test_names_in_any_encoding(tmp_path: Path) -> None:
    utf8 = zipped(tmp_path / "utf8.zip", {"Jörg/scan 患者.nii": b"1"})
    assert contents(unpacked(utf8, tmp_path / "1")) == {"scan 患者.nii": b"1"}
    raw = utf8.read_bytes().replace(b"\x00\x08", b"\x00\x00")  # the sign for UTF-8, as many programs leave it out
    (tmp_path / "unsigned.zip").write_bytes(raw)
    assert [path.parent.name for path in unpacked(tmp_path / "unsigned.zip", tmp_path / "2").iterdir()] == ["Jörg"]
    (tmp_path / "latin.zip").write_bytes(
        zipped(tmp_path / "x.zip", {"J_rg.nii": b"1"}).read_bytes().replace(b"J_", b"J\xf6")
    )
    assert unpacked(tmp_path / "latin.zip", tmp_path / "3").name == "J÷rg.nii"  # f6 in code page 437
    with tarfile.open(tmp_path / "latin.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tape:
        tape.addfile(tarfile.TarInfo("Jörg.nii"))
    assert unpacked(tmp_path / "latin.tar", tmp_path / "4").name == "Jörg.nii"
    backslashes = zipped(tmp_path / "net.zip", {"p1\\T1.nii": b"1", "p2\\T1.nii": b"2"})
    assert contents(unpacked(backslashes, tmp_path / "5")) == {"p1/T1.nii": b"1", "p2/T1.nii": b"2"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.nii": b"1", "b.nii": b"1"})
    unpacked(path, tmp_path)
    (tmp_path / "a" / "a.nii").write_bytes(b"mine")
    with pytest.raises(DataError, match="there is already something where the archive unpacks to"):
        unpacked(path, tmp_path)
    assert (tmp_path / "a" / "a.nii").read_bytes() == b"mine"


def test_the_temporary_folder_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "a.zip", {"a.nii": b"1", "b.nii": b"1"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyError, match="stopped"), opened(path) as folder:  # noqa: PT012
        assert folder.name == "a"
        assert folder.parent.parent == tmp_path
        assert folder.parent.stat().st_mode & 0o077 == 0
        raise KeyError("stopped")
    assert [found.name for found in tmp_path.iterdir()] == ["a.zip"]
    with opened(tmp_path) as same:
        assert same == tmp_path
    with pytest.raises(DataError, match="does not exist"), opened(tmp_path / "none.zip"):
        pass


def test_which_names_are_archives(tmp_path: Path) -> None:
    (tmp_path / "folder.zip").mkdir()
    assert [is_archive(tmp_path / name) for name in ("a.zip", "A.TGZ", "a.tar.gz", "a.tar")] == [True] * 4
    assert [is_archive(tmp_path / name) for name in ("a.nii.gz", "a.gz", "a.mgz", "folder.zip")] == [False] * 4


def test_a_cohort(tmp_path: Path) -> None:
    names = [f"BraTS2021_0000{number}" for number in (1, 2)]
    members = {f"{name}/{name}_{kind}.nii": scan() for name in names for kind in ("t1", "t1ce", "t2", "flair")}
    with opened(zipped(tmp_path / "data.zip", members)) as folder:
        cohort = find_cases(folder)
    assert (cohort.layout, [case.id for case in cohort.cases]) == ("brats2021", names)


@pytest.mark.parametrize("top", ["patient 5/", ""])
def test_a_dicom_series(tmp_path: Path, top: str) -> None:
    slices = {f"{top}{path.name}": path.read_bytes() for path in series(tmp_path / "s").iterdir()}
    with opened(taped(tmp_path / "patient 5.tgz", slices)) as folder:
        (case,) = find_cases(folder).cases
        assert case.id == "patient 5"
        assert read_volume(case.images["image"].path).array[0, 0].tolist() == [0, 1, 2, 3]


def test_a_patient_with_four_dicom_series(tmp_path: Path) -> None:
    slices = [path.read_bytes() for path in series(tmp_path / "s").iterdir()]
    members = {f"{kind}/{number}": slices[number] for kind in ("T1", "T1c", "T2", "FLAIR") for number in range(4)}
    with opened(zipped(tmp_path / "patient 5.zip", members)) as folder:
        (case,) = find_cases(folder).cases
        assert (case.id, tuple(case.images)) == ("patient 5", ("t1n", "t1c", "t2w", "t2f"))


@pytest.mark.parametrize("name", ["case7.nii", "case7_FLAIR.nii"])
def test_one_volume(tmp_path: Path, name: str) -> None:
    with opened(zipped(tmp_path / "download (3).zip", {name: scan()})) as path:
        (case,) = find_cases(path).cases
        assert case.id == name.removesuffix(".nii")
        assert read_volume(path).array.shape == (4, 3, 2)


def test_one_volume_of_four_channels(tmp_path: Path) -> None:
    with opened(zipped(tmp_path / "a.zip", {"case7.nii": scan(channels=4)})) as path:
        cohort = find_cases(path, modalities={"t2f": "0", "t1n": "1", "t1c": "2", "t2w": "3"})
        (case,) = cohort.cases
        assert cohort.modalities == ("t1n", "t1c", "t2w", "t2f")
        flair, t2w = (read_volume(path, case.images[name].channel).array for name in ("t2f", "t2w"))
        assert [int(flair[0, 0, 0]), int(t2w[0, 0, 0])] == [0, 3]


def test_archives_that_nobody_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "p1.zip", {"case7.nii": scan()})
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"the folder holds 1 \.zip; .*Unpack the archives and point to the folder"):
            find_cases(place)
