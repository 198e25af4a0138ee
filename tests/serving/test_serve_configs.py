"""serve.json of every bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BUNDLES = sorted(path.parents[1] for path in (Path(__file__).parents[2] / "bundles").glob("*/configs/serve.json"))


def read(bundle: Path, name: str) -> dict:
    return json.loads((bundle / "configs" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)
def test_network_is_that_of_the_inference(bundle):
    served, inference = read(bundle, "serve"), read(bundle, "inference")

    assert served["network_def"] == inference["network_def"]
    assert served["network"] == inference["network"]
    # what decides the network has one name in both: a registration's overlays reach both
    used = {name for name in inference if f"@{name}" in json.dumps(served["network_def"])}
    assert {name: served[name] for name in used} == {name: inference[name] for name in used}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)
def test_image_goes_the_way_of_the_inference_once_it_is_read(bundle):
    served, inference = read(bundle, "serve"), read(bundle, "inference")
    if "preprocessing" not in served:
        assert "preprocessing" not in inference
        return

    reading = ("SelectItemsd", "LoadImaged")
    expected = [each for each in inference["preprocessing"]["transforms"] if each["_target_"] not in reading]
    assert served["preprocessing"]["transforms"] == expected


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)
def test_no_overlay_of_a_training_reaches_the_limits(bundle):
    others = {
        path.stem: read(bundle, path.stem) for path in (bundle / "configs").glob("*.json") if path.stem != "serve"
    }
    limits = {"request_images", "request_samples", "image_pixels", "samples_at_once", "max_steps", "max_passes"}

    limits &= read(bundle, "serve").keys()  # to a classifier's training max_steps means something else
    named = {(name, limit) for name, config in others.items() for limit in limits if limit in config}

    assert named == set()
