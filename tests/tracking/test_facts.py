"""What a run is known by."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from mlflow.utils.validation import _validate_metric_name
from monai.bundle import ConfigParser

from medgen.data import datalist_hash
from medgen.lineage import Source
from medgen.tracking import facts
from medgen.tracking.tracker import Tracker


def test_settings_are_those_of_the_run_not_the_texts_of_the_config():
    config = {
        "imports": ["$import torch"],
        "batch_size": 4,
        "lr": "$0.1 * @batch_size",
        "device": "$torch.device('cpu')",
        "channels": [8, 16],
        "network_def": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
        "never_asked_for": 7,
        "never_resolved": "$1 + 1",
        "settings": "$__local_refs",
    }
    parser = ConfigParser(config)
    resolved = parser.get_parsed_content("settings")
    for name in ("lr", "device", "channels", "network_def"):
        parser.get_parsed_content(name)

    found = facts.plain_settings(dict(resolved), config)

    # a guard of MONAI's name for what it has resolved as well
    assert found == {"batch_size": 4, "lr": 0.4, "device": "cpu", "channels": [8, 16], "never_asked_for": 7}


PATIENT, REPORT = "DOE_JANE_19510203", "Pneumothorax of Jane Doe"
BUNDLES = Path(__file__).parents[2] / "bundles"
CONFIGS = sorted(
    p for p in BUNDLES.glob("*/configs/*.json") if "initialize" in (c := json.loads(p.read_text())) or "items" in c
)
LOADERS = re.compile(
    r"\b(load_\w+|items_from_folder|readable_items|with_masks|Embedding\.read|records\.|@(samples|table)\b)"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_no_config_makes_settings_of_patients_and_reports(path):
    config = json.loads(path.read_text())
    texts = {name: json.dumps(value) for name, value in config.items()}
    loaded = {name for name, text in texts.items() if LOADERS.search(text) and not text.startswith('"$@network')}
    derived = set(loaded)
    while more := {n for n, t in texts.items() if derived & set(re.findall(r"@(\w+)", t))} - derived:
        derived |= more
    worst = [[{"image": f"{PATIENT}.png", "patient": PATIENT, "text": REPORT}], [REPORT], {"text": REPORT}, (PATIENT,)]
    for data in worst:
        # the loaded as they are, and of what is made of them one text each
        resolved = {**config, **dict.fromkeys(derived, f"{PATIENT}: {REPORT}"), **dict.fromkeys(loaded, data)}
        settings = json.dumps(facts.plain_settings(resolved, config))
        assert PATIENT not in settings
        assert REPORT not in settings


def test_texts_and_lists_that_a_config_computes_are_no_settings_unless_they_are_made_of_settings():
    config = {
        "root": "/data",
        "path": "$@root + '/a'",
        "deeper": "$@path + '/b'",
        "sizes": "$[4, 8]",
        "many": "$list(range(100))",
        "items": "$load(@path)",
        "first": "$@items[0]['text']",
        "second": "$@first.upper()",
        "count": "$len(@items)",
        "mixed": {"n": "@items"},
    }
    resolved = {
        **config,
        **{"path": "/data/a", "deeper": "/data/a/b", "sizes": [4, 8], "many": list(range(100)), "count": 1},
        **{"items": [{"text": REPORT}], "first": REPORT, "second": REPORT.upper(), "mixed": {"n": [{"text": REPORT}]}},
    }
    kept = {"root": "/data", "path": "/data/a", "deeper": "/data/a/b", "sizes": [4, 8], "count": 1}
    assert facts.plain_settings(resolved, config) == kept
    assert facts.plain_settings(resolved, {}) == {"sizes": [4, 8], "count": 1}  # nobody knows of what a text is made


def test_names_that_mlflow_refuses_are_made_into_ones_that_it_takes():
    for name in ("dice (mean)", "a:b#c", "µ", "x" * 300, "train/loss", "x//y", "../m", "/abs", "a/./b/", "..", ""):
        _validate_metric_name(facts.name_of(name))
        assert len(facts.name_of(name)) <= 250


def test_long_texts_are_cut_to_what_mlflow_takes():
    assert facts.short("x" * 10_000, facts.LONGEST_PARAM) == "x" * 5996 + " ..."
    assert facts.short("x" * 6000, facts.LONGEST_PARAM) == "x" * 6000


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (
            ["/x/monai/bundle/__main__.py", "run", "--lr", "1", "--batch_size=4", "--config_file", "a"],
            ["lr", "batch_size"],
        ),
        (["/x/pytest", "--lr", "1"], []),
    ],
)
def test_settings_of_the_command_line_are_named(argv, names):
    assert facts.command_line_settings(argv) == names


def test_data_are_known_by_hash_and_counts_and_nobodys_name(tmp_path):
    items = [{"image": f"{patient}.png", "patient": patient} for patient in ("ann", "ann", "bob")]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"name": "set", "training": items, "validation": items[:1], "test": []}))

    params, dataset = facts.data_facts(path)

    assert params["datalist_sha256"] == datalist_hash(path)
    assert (params["images_training"], params["patients_training"]) == ("3", "2")
    assert (params["images_validation"], params["images_test"]) == ("1", "0")
    assert dataset["name"] == "set"
    assert len(dataset["digest"]) <= 36
    assert not any(name in json.dumps([params, dataset]) for name in ("ann", "bob"))


def test_a_run_without_data_has_none():
    assert facts.data_facts(None) == ({}, None)


def test_models_that_were_used_are_named_with_their_checksums(monkeypatch):
    used = [
        Source("autoencoder", "models:/ae@champion", Path("a.pt"), "12", "models:/ae/3", "m-1"),
        Source("model", "model.pt", Path("model.pt"), "34"),
    ]
    monkeypatch.setattr(facts, "used", lambda: used)
    tags, models = facts.lineage()
    assert tags == {
        "autoencoder": "models:/ae/3",
        "autoencoder_sha256": "12",
        "model": "model.pt",
        "model_sha256": "34",
    }
    assert models == ["m-1"]


def test_versions_packages_and_device_are_told():
    assert facts.version_facts()["version_torch"] == torch.__version__.partition("+")[0]
    assert f"torch=={facts.version_facts()['version_torch']}\n" in facts.installed_packages()
    assert facts.device_facts(torch.device("cpu")).items() >= {"device": "cpu", "world_size": "1"}.items()


def test_weights_of_an_earlier_training_are_not_this_runs(tmp_path):
    tracker = Tracker(tmp_path, "e", "r", settings={"model_path": str(tmp_path / "model.pt")})
    (tmp_path / "model.pt").write_bytes(b"new")
    (tmp_path / "best.json").write_text(json.dumps({"model_sha256": "of another file"}))
    assert not tracker._is_ours(tmp_path / "model.pt")
