"""Reading MONAI bundles: what is accepted, what is refused by its key, and that nothing in a bundle is executed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from segkit.checkpoint.bundle_config import BundleConfig
from segkit.checkpoint.run_folder import load_card
from segkit.errors import CheckpointError
from segkit.inference.predictor import Predictor
from tests.monai_bundles import (
    BRATS,
    BRATS_LAMBDA,
    CT,
    SEGRESNET,
    SWINUNETR,
    UNET,
    WHOLE_BODY,
    inference,
    regions,
    softmax_first,
    transform,
    write_bundle,
)

CLASSES = ("background", "spleen", "liver")
WINDOWS: dict[str, Any] = {"roi_size": [96, 96, 96], "overlap": 0.5}


def of_classes(folder: Path, change: Callable[[dict[str, Any]], object] = lambda document: None) -> Path:
    """A bundle in the format of spleen_ct_segmentation with `change(inference.json)`."""
    document = inference(UNET, CT, softmax_first(), **WINDOWS)
    network = {**UNET}
    change(document)
    bundle = write_bundle(folder, {**document, "network_def": network}, ["image"], CLASSES)
    (bundle / "configs" / "inference.json").write_text(json.dumps(document))
    return bundle


def test_the_card_of_a_bundle_of_classes(tmp_path: Path) -> None:
    card = load_card(of_classes(tmp_path / "bundle"))
    assert (card.network.family, card.network.in_channels, card.network.out_channels) == ("monai", 1, 3)
    assert card.network.arguments["network_def"]["_target_"] == "UNet"
    assert (card.modalities, card.patch_size, card.overlap, card.divisor) == (("image",), (96,) * 3, 0.5, (2,) * 3)
    assert [(output.name, output.label) for output in card.outputs] == [("background", 0), ("spleen", 1), ("liver", 2)]
    assert card.scheme().values == {"spleen": 1, "liver": 2}
    # (x + 57) / 221 of x from -57 to 164
    near = card.preprocessing
    assert (near.orientation, near.spacing_mm, near.normalisation, near.crop) == (
        "RAS",
        (1.5, 1.5, 2.0),
        "ct-window",
        "none",
    )
    assert (near.ct_window, near.ct_mean, near.ct_std) == ((-57, 164), -57, 221)
    assert card.bundle is not None
    assert (card.bundle.restores, card.bundle.blending, card.bundle.padding) == (
        "probabilities",
        "constant",
        "constant",
    )
    assert card.bundle.without_counterpart == ()


def test_the_card_of_the_brats_bundle(tmp_path: Path) -> None:
    """Outputs TC, WT, ET are painted as WT 2, then TC 1, then ET 4, as the lambda does."""
    channels = ("T1c", "T1", "T2", "FLAIR")
    document = inference(SEGRESNET, BRATS, regions(), roi_size=[240, 240, 160], overlap=0.5)
    card = load_card(write_bundle(tmp_path / "bundle", document, channels, ("TC", "WT", "ET")))
    assert card.modalities == channels
    assert [(output.name, output.label) for output in card.outputs] == [("WT", 2), ("TC", 1), ("ET", 4)]
    assert card.network.arguments["output_order"] == (1, 0, 2)
    assert (card.preprocessing.orientation, card.preprocessing.normalisation) == ("IJK", "zscore-nonzero")


def test_literal_expressions_and_references_are_resolved(tmp_path: Path) -> None:
    """As in wholeBody_ct_segmentation, whose weights and spacing depend on a setting."""

    def change(document: dict[str, Any]) -> None:
        document["displayable_configs"] = {"highres": False, "sw_overlap": 0.25}
        document["pixdim"] = "$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]"
        document["modelname"] = "$'model.pt' if @displayable_configs::highres else 'model_lowres.pt'"
        document["checkpointloader"]["load_path"] = "$@bundle_root + '/models/' + @modelname"
        document["preprocessing"] = {"_target_": "Compose", "transforms": list(WHOLE_BODY)}
        document["preprocessing"]["transforms"][3] = transform("Spacingd", pixdim="@pixdim", mode="bilinear")
        document["inferer"]["overlap"] = "@displayable_configs#sw_overlap"
        document["shape"] = [1, 2, 3]
        document["network_def"]["spatial_dims"] = "$len(@shape)"

    bundle = of_classes(tmp_path / "bundle", change)
    (bundle / "models" / "model.pt").rename(bundle / "models" / "model_lowres.pt")
    card = load_card(bundle)
    assert (card.overlap, card.preprocessing.spacing_mm) == (0.25, (3.0, 3.0, 3.0))
    assert card.bundle is not None
    assert card.bundle.without_counterpart == ("preprocessing::ScaleIntensityd",)


def at(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Set the value at `a::b::0` of a document."""

    def change(document: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("::")]
        for part in parents:
            document = document[part]
        document[last] = value

    return change


STEPS, POST = "preprocessing::transforms", "postprocessing::transforms"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("imports", ["$import scripts.networks"], r"imports::0 is \$import scripts.networks"),
        ("initialize", ["$os.system('x')"], r"initialize::0 is \$os\.system"),
        ("handlers", [{"_target_": "scripts.Saver"}], r"handlers::0 is \{'_target_': 'scripts\.Saver'\}"),
        ("network", "$torch.jit.load('model.ts')", r"network is \$torch\.jit\.load"),
        ("network_def", "$torch.jit.load('model.ts')", r"network_def is \$torch\.jit\.load\('model\.ts'\)"),
        (
            "network_def::_target_",
            "scripts.UNesT",
            r"network_def::_target_ is scripts\.UNesT; .*expected one of SegResNet",
        ),
        ("network_def::_target_", "torch.jit.load", r"network_def::_target_ is torch\.jit\.load"),
        ("network_def::channels", "$import os", r"network_def::channels is the expression \$import os"),
        ("network_def::channels", "$[4] * 10**9", r"network_def::channels is the expression"),
        ("network_def::channels", "@nothing", r"network_def::channels is @nothing; .*expected the id of a value"),
        ("network_def::channels", "%other.json::channels", r"network_def::channels is %other\.json"),
        ("network_def::channels", "@network_def::channels", r"network_def::channels is nested too deeply"),
        ("network_def::colour", 3, r"network_def: monai: network_def: .*UNet has no argument 'colour'"),
        ("network_def::channels", [4], r"network_def: monai: the length of `channels`"),
        ("network_def::spatial_dims", 2, r"network_def::spatial_dims is 2; .*expected 3"),
        (f"{STEPS}::1", {"_target_": "Lambdad", "keys": "image"}, r"transforms::1::_target_ is Lambdad"),
        (f"{STEPS}::2::axcodes", "XYZ", r"transforms::2::axcodes is XYZ; .*expected three letters"),
        (f"{STEPS}::3::pixdim", [1.5, 1.5, -1], r"transforms::3::pixdim is \[1\.5, 1\.5, -1\]; .*expected mm above 0"),
        (f"{STEPS}::3::dtype", "$torch.float64", r"transforms::3::dtype is \$torch\.float64"),
        (f"{STEPS}::3::keys", ["image", "label"], r"transforms::3::keys is \['image', 'label'\]"),
        (f"{STEPS}::5::dtype", "$numpy.float16", r"transforms::5::dtype is \$numpy\.float16; .*expected float32"),
        (
            "inferer::_target_",
            "SliceInferer",
            r"inferer::_target_ is SliceInferer; .*expected one of SlidingWindowInferer",
        ),
        ("inferer::roi_size", [96, 96, -1], r"inferer::roi_size is \[96, 96, -1\]"),
        ("inferer::overlap", [0.5, 0.5, 0.25], r"inferer::overlap is \[0\.5, 0\.5, 0\.25\]"),
        ("inferer::buffer_steps", 2, r"inferer::buffer_steps is 2"),
        (f"{POST}::1::nearest_interp", True, r"transforms::1::nearest_interp is True; .*expected false"),
        (f"{POST}::2", {"_target_": "AsDiscreted", "keys": "pred", "to_onehot": 3}, r"transforms::2::to_onehot is 3"),
        (f"{POST}::2::argmax", False, r"postprocessing::transforms::2 is .*expected argmax: true"),
        (f"{POST}::3::scale", 255, r"postprocessing::transforms::3::scale is 255"),
        ("evaluator::prepare_batch", "$scripts.batch", r"evaluator::prepare_batch is \$scripts\.batch"),
        ("checkpointloader::load_path", "../../model.pt", r"load_path is \.\./\.\./model\.pt; .*inside the bundle"),
        ("checkpointloader::load_path", "models/other.pt", r"holds no models/other\.pt"),
    ],
)
def test_everything_else_is_refused_by_its_key(path: str, value: object, expected: str, tmp_path: Path) -> None:
    bundle = of_classes(tmp_path / "bundle", at(path, value))
    with pytest.raises(CheckpointError, match=expected):
        load_card(bundle)


def test_another_lambda_is_refused(tmp_path: Path) -> None:
    document = inference(SEGRESNET, BRATS, regions(), **WINDOWS)
    document["postprocessing"]["transforms"][3]["func"] = BRATS_LAMBDA.replace("4", "3")
    bundle = write_bundle(tmp_path / "bundle", document, ("T1c", "T1", "T2", "FLAIR"), ("TC", "WT", "ET"))
    with pytest.raises(CheckpointError, match=r"transforms::3::func is \$lambda .*, 3, .*exactly \$lambda .*, 4, "):
        load_card(bundle)


def test_probabilities_after_argmax_are_not_interpolated(tmp_path: Path) -> None:
    """As prostate_mri_anatomy asks for."""
    document = inference(UNET, CT, softmax_first(invert_labels=True), **WINDOWS)
    document["postprocessing"]["transforms"][2]["nearest_interp"] = False
    with pytest.raises(CheckpointError, match=r"transforms::2::nearest_interp is False; .*labels of neither"):
        load_card(write_bundle(tmp_path / "bundle", document, ["image"], CLASSES))


class _Code:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_nothing_in_a_bundle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expressions, logging.conf, scripts of the bundle and a pickle would each make a file."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "made"
    touch = f"$__import__('pathlib').Path({str(made)!r}).touch()"

    def attack(document: dict[str, Any]) -> None:
        for key in ("dataset_dir", "ckpt_dir", "datalist", "device"):
            document[key] = touch
        document["run"] = [touch]
        document["preprocessing"]["transforms"][0]["reader"] = touch
        document["postprocessing"]["transforms"][3]["output_dtype"] = touch

    bundle = of_classes(tmp_path / "bundle", attack)
    code = f"import pathlib; pathlib.Path({str(made)!r}).touch()"
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "__init__.py").write_text(code)
    (bundle / "configs" / "logging.conf").write_text(f"[loggers]\nkeys=root\n[handler_x]\nargs=(exec({code!r}),)\n")
    Predictor.load(bundle)
    for key in ("network_def", "preprocessing", "inferer", "postprocessing"):
        for value in (touch, {"_target_": touch}, {"_target_": "scripts.Anything"}):
            refused = of_classes(tmp_path / f"{key} {len(str(value))}", at(key, value))
            with pytest.raises(CheckpointError, match=rf"{key}(::_target_)? is "):
                Predictor.load(refused)
    torch.save({"model.0.weight": _Code(f"touch {made}")}, bundle / "models" / "model.pt")
    with pytest.raises(CheckpointError, match=r"carries code and not only weights; nothing in it was run"):
        Predictor.load(bundle)
    assert not made.exists()


def test_yaml_and_wrong_channels(tmp_path: Path) -> None:
    bundle = of_classes(tmp_path / "bundle")
    file = bundle / "configs" / "inference.json"
    file.rename(file.with_suffix(".yaml"))  # JSON is YAML
    assert load_card(bundle).patch_size == (96, 96, 96)
    document = inference({**UNET, "in_channels": 2}, CT, softmax_first(), **WINDOWS)
    other = write_bundle(tmp_path / "other", document, ["ADC"], CLASSES)
    with pytest.raises(CheckpointError, match=r"inputs::image::channel_def is \['ADC'\]; .*expected 2 different names"):
        load_card(other)


def test_a_value_of_a_reference_inside_a_list(tmp_path: Path) -> None:
    config = BundleConfig(tmp_path, {"sizes": [{"x": "@deep::0"}], "deep": ["$-@one + 3", None], "one": 1})
    assert config.literal("sizes") == [{"x": 2}]
    assert config.literal("sizes::0::x") == 2
    assert config.literal("deep::1") is None


def test_swinunetr_needs_einops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = inference(SWINUNETR, CT, softmax_first(), **WINDOWS)
    bundle = write_bundle(tmp_path / "bundle", document, ["image"], CLASSES)
    assert load_card(bundle).divisor == (32, 32, 32)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "einops" else find(name, *more)
    )
    with pytest.raises(CheckpointError, match=r"SwinUNETR needs einops.*pip install 'segkit\[monai\]'"):
        load_card(bundle)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    bundle = of_classes(tmp_path / "bundle")
    torch.save({"model": {"convInit.conv.weight": torch.zeros(8, 1, 3, 3, 3)}}, bundle / "models" / "model.pt")
    with pytest.raises(CheckpointError, match=r"the weights do not fit 'monai'"):
        Predictor.load(bundle)
