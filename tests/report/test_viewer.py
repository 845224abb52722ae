"""The viewer's volumes and its script, and the stills: geometry, values, sizes."""

from __future__ import annotations

import base64
import gzip
import io
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from segkit.labels import SCHEMES
from segkit.reading.volume import Grid
from segkit.report import pictures
from segkit.report.images import CaseArrays, label_colours
from segkit.report.pictures import case_picture, case_volumes, outline, viewer_script

LPS = np.diag([-1.0, -2.0, 3.0, 1.0])


def opened(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def arrays_of(shape=(20, 22, 18), **changes) -> CaseArrays:
    image = np.zeros(shape, np.float32)
    image[4:16, 5:15, 6:12] = np.linspace(1000, 2000, 6)
    prediction = np.zeros(shape, np.uint8)
    prediction[6:10, 7:10, 7:9] = 2
    reference = np.zeros(shape, np.uint8)
    reference[7:11, 7:10, 7:9] = 2
    reference[8, 8, 8] = 4
    whole = {"modality": "t2f", "image": image, "prediction": prediction, "reference": reference}
    return CaseArrays(**{**whole, "grid": Grid(shape, LPS), **changes})


def test_volumes_keep_the_place_and_the_value_of_every_voxel():
    arrays = arrays_of()
    volumes = case_volumes(arrays)
    assert list(volumes.layers) == ["image", "prediction", "reference", "difference"]
    image, reference = opened(volumes.layers["image"]), opened(volumes.layers["reference"])
    assert reference.get_data_dtype() == np.uint8
    for place in ((7, 7, 7), (8, 8, 8), (10, 9, 8)):
        world = LPS @ [*place, 1]
        there = np.rint(np.linalg.inv(reference.affine) @ world)[:3].astype(int)
        assert np.asanyarray(reference.dataobj)[tuple(there)] == arrays.reference[place]
        step = float(image.dataobj.slope)
        assert image.get_fdata()[tuple(there)] == pytest.approx(arrays.image[place], abs=step)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")


def test_the_difference_tells_missed_surplus_and_confused():
    volumes = case_volumes(arrays_of())
    difference = np.asanyarray(opened(volumes.layers["difference"]).dataobj)
    assert [int((difference == value).sum()) for value in (1, 2, 3)] == [6, 6, 1]


def test_a_large_case_is_cut_to_its_masks_and_then_thinned(monkeypatch):
    monkeypatch.setattr(pictures, "_MARGIN_MM", 0.0)
    monkeypatch.setattr(pictures, "_MOST_VOXELS", 100)
    assert opened(case_volumes(arrays_of()).layers["image"]).shape == (5, 3, 2)
    monkeypatch.setattr(pictures, "_MOST_VOXELS", 10)
    thinned = opened(case_volumes(arrays_of()).layers["image"])
    assert thinned.shape == (3, 2, 1)
    assert nib.affines.voxel_sizes(thinned.affine) == pytest.approx((2.0, 4.0, 6.0))


def test_pictures_have_no_volumes():
    image = np.arange(12.0).reshape(3, 4)
    assert case_volumes(CaseArrays("green", Grid((3, 4), np.eye(4)), image)) is None


def test_the_crosshair_begins_in_the_middle_of_the_masks():
    only = np.zeros((20, 22, 18), np.uint8)
    only[5, 6, 7] = 2
    volumes = case_volumes(arrays_of(prediction=only, reference=None))
    assert volumes.facts["centre_mm"] == [-5.0, -12.0, 21.0]


def test_the_bundle_exports_niivue():
    pytest.importorskip("ipyniivue", reason="ipyniivue is not installed")
    script = gzip.decompress(base64.b64decode(viewer_script())).decode()
    name = re.search(r"export\{([\w$]+) as Niivue\};$", script)[1]
    assert re.search(rf"[;}}\s,]{re.escape(name)}=class|class {re.escape(name)}\b", script)


def test_the_licence_of_niivue_goes_with_it():
    pytest.importorskip("ipyniivue")
    assert "Redistributions in binary form must reproduce the above copyright" in str(pictures.viewer_licence())


@pytest.mark.parametrize("text", ["export{a as default};", 'console.log("Creating new Niivue instance");x=new N(1)'])
def test_an_unknown_bundle_is_left_out(tmp_path, monkeypatch, text):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "widget.js").write_text(text)
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})()
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: spec)
    assert viewer_script.__wrapped__() is None


def test_the_outline_follows_the_edges_of_the_pixels():
    mask = np.array([[0, 1, 1], [0, 0, 1]], np.bool_)
    path = outline(mask, 10.0, 100.0, (2.0, 4.0))
    across = {"M12.0 100.0h4.0", "M12.0 104.0h2.0", "M14.0 108.0h2.0"}
    down = {"M12.0 100.0v4.0", "M14.0 104.0v4.0", "M16.0 100.0v8.0"}
    assert set(re.findall(r"M[^M]*", path)) == across | down


def test_a_still_has_three_planes_of_every_layer():
    colours = label_colours(SCHEMES["brats2017"])
    picture = case_picture("case 1", arrays_of(), colours, "p0", 100_000)
    assert picture.count("<use ") == 9
    assert "image (t2f)" in picture
    assert 'aria-label="case 1: image, prediction, reference in the axial, coronal, sagittal plane"' in picture
    masks = re.findall(r'href="data:image/png;base64,([^"]+)"', picture)
    assert len(masks) == 6
    axial = Image.open(io.BytesIO(base64.b64decode(masks[1]))).convert("RGBA")
    found = {colour for _, colour in axial.getcolors() if colour[3]}
    oedema, enhancing = (tuple(bytes.fromhex(colours[value][1][1:])) for value in (2, 4))
    assert found <= {(*oedema, 140), (*enhancing, 140)}
    assert (*oedema, 140) in found


def test_a_still_shrinks_to_its_share_or_is_left_out():
    generator = np.random.default_rng(0)
    noise = generator.uniform(0, 1000, (200, 200, 8)).astype(np.float32)
    arrays = CaseArrays("MRI", Grid(noise.shape, np.eye(4)), noise)
    large = case_picture("case", arrays, {}, "p0", 10**6)
    small = case_picture("case", arrays, {}, "p0", len(large) - 1)
    assert len(small) < len(large)
    assert case_picture("case", arrays, {}, "p0", 100) is None
