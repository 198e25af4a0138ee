"""Every setting that names weights takes a file, a folder or a URI; a new config joins by existing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for path in ROOT.glob("bundles/*/configs/*.json")
    if path.name not in ("metadata.json", "tracking.json", "serve.json")
)
NAMES_WEIGHTS = re.compile(
    r"model_path|autoencoder_path|(generator|encoder|initial)_weights|transfer_\w+|\w+_checkpoint|resume_from"
)
# trunks of losses and metrics, which are published files and never registered
PUBLISHED = {"perceptual_weights", "similarity_weights", "pretrained_weights", "xrv_weights", "inception_weights"}
FOUND = re.compile(r"medgen\.(sources\.find_weights|settings\.optional)\([^()]*\)")


def settings_of(config: Path) -> set[str]:
    return {name for name in json.loads(config.read_text()) if NAMES_WEIGHTS.fullmatch(name)}


def texts(value: Any, within: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every text of a config, with the component that it stands in."""
    if isinstance(value, str):
        yield value, within
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(entry, value if isinstance(value, dict) else within)


ALL = sorted({name for config in CONFIGS for name in settings_of(config)})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_weights_are_read_from_where_find_weights_found_them(config):
    content = json.loads(config.read_text())
    is_training = config.name.startswith("train")

    for text, within in texts(content, content):
        loads = str(within.get("_target_", "")).startswith("medgen.sources.load_")
        # what a training writes to is a path
        names = [name for name in ALL if not (name == "model_path" and is_training)]
        rest = FOUND.sub("", text)
        used = [name for name in names if re.search(rf"@{name}\b", rest)]
        assert not used or loads, f"{text!r} reads @{used[0]} itself; give it medgen.sources.find_weights(@{used[0]})"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_files_of_weights_are_settings(config):
    """A path in the middle of a config is one that no URI can take the place of."""
    content = json.loads(config.read_text())
    for name, value in content.items():
        if not NAMES_WEIGHTS.fullmatch(name):
            inside = [
                text for text, _ in texts(value, content) if re.search(r"\.(pt|safetensors)'", FOUND.sub("", text))
            ]
            assert not inside, name
        named = re.fullmatch(r"\w+_weights|\w+_checkpoint", name)
        assert not named or name in PUBLISHED or name == "autoencoder_weights" or NAMES_WEIGHTS.fullmatch(name), name


def test_weights_that_are_loaded_are_those_that_were_found():
    loaders = [
        (config, within["path"])
        for config in CONFIGS
        for text, within in texts(json.loads(config.read_text()), {})
        if text == "medgen.handlers.WeightsLoader"
    ]
    assert loaders
    assert [(config, path) for config, path in loaders if path != "@weights"] == []


def test_run_that_reads_weights_begins_with_none():
    reading = [path for path in CONFIGS if "medgen.sources." in path.read_text() and '"initialize"' in path.read_text()]
    assert len(reading) > 30
    for config in reading:
        assert json.loads(config.read_text())["initialize"][1] == "$medgen.lineage.forget()", config


@pytest.mark.parametrize("config", sorted(ROOT.glob("bundles/*/configs/train*.json")), ids=lambda path: path.stem)
def test_training_begins_with_the_state_of_another_if_told_to(config):
    content = json.loads(config.read_text())
    assert content["resume_from"] is None
    (checkpoint,) = (h for h in content["train"]["handlers"] if str(h).find("TrainingCheckpoint") > 0)
    # asked only by a training that has no checkpoint of its own: the other may be gone by then
    found = "medgen.sources.find_weights(@resume_from, 'resume_from', 'checkpoints/last.pt')"
    assert checkpoint["resume_from"] == f"$lambda: {found}"


def test_the_settings_are_those_that_there_are():
    assert {"model_path", "autoencoder_path", "generator_weights", "encoder_weights", "initial_weights"} < set(ALL)
    assert {"transfer_generator", "transfer_discriminator", "discriminator_checkpoint", "resume_from"} < set(ALL)
