"""Weights out of a registry, from a folder, out of another training: what runs with them says where they are from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import assert_one_line, files_in, run, state

from medgen import lineage
from medgen.data.image_set import file_sha256
from medgen.registry import pull, register_bundle
from medgen.sources import used

BUNDLES = Path(__file__).parents[2] / "bundles"
PGGAN, AUTOENCODER, LDM = (BUNDLES / name for name in ("cxr_pggan", "cxr_autoencoder_kl", "cxr_latent_diffusion"))
AUTOENCODER_OF_DEMO = {"image_size": 64, "channels": [32, 32, 64], "num_res_blocks": 1}  # as LDM's demo.json has it


@pytest.fixture(scope="module")
def registered(ingredients, tmp_path_factory):
    """A generator and an autoencoder in a registry, both in their first version."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    generator = Path(ingredients(BUNDLES / "cxr_inversion_encoder")["generator_weights"])
    autoencoder = Path(ingredients(LDM)["autoencoder_path"])
    overlay = folder / "autoencoder.json"
    overlay.write_text(json.dumps(AUTOENCODER_OF_DEMO))
    register_bundle(PGGAN, "generator", uri, "champion", overlays=[PGGAN / "configs/demo.json"], weights=generator)
    register_bundle(AUTOENCODER, "autoencoder", uri, overlays=[overlay], weights=autoencoder)
    return SimpleNamespace(uri=uri, generator=generator, autoencoder=autoencoder, folder=folder)


@pytest.fixture
def registry(registered, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(registered.folder / "cache"))
    lineage.forget()
    return registered


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_samples_of_a_registered_generator_say_which_it_was(registry, workflow, tmp_path):
    folder = pull("models:/generator/1", tmp_path / "pulled", registry.uri)
    sources = {"file": registry.generator, "folder": folder, "uri": "models:/generator@champion"}
    for name, source in sources.items():
        run(workflow(PGGAN, "inference", tmp_path / name, model_path=str(source), seeds="0-4"))
        (model,) = used()
        assert (model.kind, model.source, model.sha256) == ("model", str(source), file_sha256(registry.generator))
        assert model.uri == ("models:/generator/1" if name == "uri" else None)

    samples = [files_in(tmp_path / name / "samples") for name in sources]
    assert samples[0] == samples[1] == samples[2]
    items = read_json(tmp_path / "uri" / "datalist.json")["training"]
    assert {(item["model"], item["model_sha256"]) for item in items} == {("models:/generator/1", model.sha256)}
    assert not any("model" in item for item in read_json(tmp_path / "folder" / "datalist.json")["training"])
    # the pixels are decided by the weights, wherever they came from
    assert read_json(tmp_path / "uri" / "generation.json") == read_json(tmp_path / "file" / "generation.json")


def test_registered_model_that_is_measured_is_named_in_the_metrics(registry, workflow, tmp_path):
    run(workflow(AUTOENCODER, "evaluate", tmp_path, model_path="models:/autoencoder/1", **AUTOENCODER_OF_DEMO))
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["model"] == "models:/autoencoder/1"
    assert metrics["model_sha256"] == file_sha256(registry.autoencoder)


def test_encoding_with_an_autoencoder_by_folder_and_by_uri(registry, workflow, tmp_path):
    folder = pull("models:/autoencoder/1", tmp_path / "pulled", registry.uri)
    sources = {"file": registry.autoencoder, "folder": folder, "uri": "models:/autoencoder/1"}
    for name, source in sources.items():
        run(workflow(LDM, "encode", tmp_path, autoencoder_path=str(source), latents_dir=str(tmp_path / name)))
        (autoencoder,) = used()
        assert (autoencoder.kind, autoencoder.source) == ("autoencoder", str(source))
    assert autoencoder.uri == "models:/autoencoder/1"
    scalings = [read_json(tmp_path / name / "scaling.json") for name in sources]
    assert scalings[0] == scalings[1] == scalings[2]
    assert scalings[0]["autoencoder_sha256"] == file_sha256(registry.autoencoder)


def test_diffusion_model_knows_the_registered_autoencoder_it_was_trained_on(registry, workflow, tmp_path):
    run(workflow(LDM, "train", tmp_path, autoencoder_path="models:/autoencoder/1", max_epochs=1))
    trained_as = read_json(tmp_path / "models" / "trained_as.json")
    assert trained_as["autoencoder"] == file_sha256(registry.autoencoder)
    assert trained_as["autoencoder_model"] == "models:/autoencoder/1"
    # resumed from a file, it is the same training
    run(workflow(LDM, "train", tmp_path, autoencoder_path=str(registry.autoencoder), max_epochs=2, resume=True))
    assert state(tmp_path)["images_seen"] == 2 * 4


def test_weights_of_another_architecture_say_which_overlay_is_missing(registry, workflow, tmp_path):
    with pytest.raises(Exception, match=r".") as caught:
        run(workflow(AUTOENCODER, "evaluate", tmp_path, model_path="models:/autoencoder/1"))
    assert_one_line(caught.value, "model.pt belongs to another architecture: .* the overlay, that it was trained with")


@pytest.mark.parametrize("source", ["models:/autoencoder/1", str(AUTOENCODER)])
def test_training_writes_its_model_to_a_file_and_nowhere_else(source, workflow, tmp_path):
    with pytest.raises(Exception, match=r".") as caught:
        run(workflow(AUTOENCODER, "train", tmp_path, model_path=source))
    assert_one_line(caught.value, "model_path .*must be a file.*, got ")


def test_training_begun_with_the_state_of_another_ends_like_one_that_was_never_interrupted(workflow, tmp_path):
    train = {"adversarial_start_epoch": 1, "ema_decay": 0.9}
    run(workflow(AUTOENCODER, "train", tmp_path / "whole", **train))
    run(workflow(AUTOENCODER, "train", tmp_path / "half", max_epochs=1, **train))
    before = files_in(tmp_path / "half")
    model = tmp_path / "other/models/model.pt"
    model.parent.mkdir(parents=True)
    model.write_bytes(before["models/model.pt"])

    run(workflow(AUTOENCODER, "train", tmp_path / "other", resume_from=str(tmp_path / "half"), **train))

    whole, other = state(tmp_path / "whole"), state(tmp_path / "other")
    assert whole["components"].pop("best_model") is not None
    assert other["components"].pop("best_model")["best"] is not None
    assert other.pop("fingerprint") == whole.pop("fingerprint")
    torch.testing.assert_close(other, whole, rtol=0, atol=0)
    # its best model is one that it has made itself: the file that was there is another training's
    assert (model.parent / "previous" / "model.pt").read_bytes() == before["models/model.pt"]
    assert not (model.parent / "previous" / "trained_on.json").exists()  # it had come without
    trained_on = read_json(model.with_name("trained_on.json"))
    of_half = json.loads(before["models/trained_on.json"])
    assert trained_on.pop("weights_sha256") != of_half.pop("weights_sha256")
    assert trained_on == of_half
    assert model.read_bytes() != before["models/model.pt"]
    assert files_in(tmp_path / "half") == before
    (source,) = used()
    assert (source.kind, source.source) == ("resume_from", str(tmp_path / "half"))
    assert source.path == tmp_path / "half/checkpoints/last.pt"
    names = {read_json(tmp_path / name / "run.json")["run_name"] for name in ("half", "other")}
    assert len(names) == 2


def test_state_of_a_training_with_other_settings_is_refused(workflow, tmp_path):
    run(workflow(AUTOENCODER, "train", tmp_path / "one", max_epochs=1))
    for change, message in (
        ({"g_lr": 1e-5}, r"the checkpoint .*one.checkpoints.last\.pt was made with g_lr .*, this run has 1e-05"),
        ({"resume_from": str(tmp_path / "none")}, r"no checkpoint at .*none; name OUT/checkpoints/last\.pt"),
        ({"resume_from": str(tmp_path)}, r"no checkpoint at .*checkpoints/last\.pt; name OUT/checkpoints/last\.pt"),
    ):
        with pytest.raises(Exception, match=r".") as caught:
            run(workflow(AUTOENCODER, "train", tmp_path / "two", **{"resume_from": str(tmp_path / "one"), **change}))
        assert_one_line(caught.value, message)
        assert not (tmp_path / "two" / "checkpoints").exists()
