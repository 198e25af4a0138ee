"""Models out of bundles' folders and out of a registry: networks of a few numbers, SQLite in a temporary folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from medgen import lineage
from medgen.errors import UserError
from medgen.networks import ConvNeXtEncoder, PGGANDiscriminator, PGGANGenerator, StyleGAN2Generator
from medgen.registry import register_bundle, resolve
from medgen.sources import find_weights, load_discriminator, load_encoder, load_generator, used

CHANNELS = [8, 8, 8]  # of the levels 4×4, 8×8 and 16×16
STYLEGAN2 = {"image_size": 16, "channel_base": 64, "channel_max": 8, "latent_dim": 8, "w_dim": 8}
ENCODER = {"image_size": 16, "latent_shape": [1, 8], "space": "w", "size": "atto", "patch": 2, "layer_scale": 0.1}
GENERATOR_CONFIG = {
    "imports": ["$import os"],
    "bundle_root": ".",
    "width": 6,
    "channels": CHANNELS,
    "network_def": {"_target_": "medgen.networks.PGGANGenerator", "channels": "@channels", "latent_dim": "@width"},
}
DISCRIMINATOR = {"_target_": "medgen.networks.PGGANDiscriminator", "channels": "$@network_def.channels"}
SMALL = {"width": 4, "train#lr": 0.1}
WIDER = {"width": 5, "+network_def": {"out_channels": 3}, "network_def#first_norm": False}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(network: torch.nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def make_generator_bundle(folder: Path, seed: int = 0) -> Path:
    """A bundle with a progressive GAN, whose overlay ``small.json`` its weights need."""
    torch.manual_seed(seed)
    write(folder / "configs/inference.json", GENERATOR_CONFIG)
    write(folder / "configs/small.json", SMALL)
    write(folder / "configs/wider.json", WIDER)
    train = {**GENERATOR_CONFIG, "classes": 0, "discriminator_def": {**DISCRIMINATOR, "num_classes": "@classes"}}
    train["discriminator_def"]["channels"] = "@channels"
    write(folder / "configs/train.json", train)
    saved(PGGANGenerator(CHANNELS, latent_dim=4), folder / "models/model.pt")
    return folder


@pytest.fixture(autouse=True)
def _no_other_registry(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    lineage.forget()


@pytest.fixture
def bundle(tmp_path) -> Path:
    return make_generator_bundle(tmp_path / "pggan")


@pytest.fixture
def encoder_bundle(tmp_path) -> Path:
    torch.manual_seed(0)
    definition = {"_target_": "medgen.networks.ConvNeXtEncoder", **ENCODER}
    write(tmp_path / "encoder/configs/inference.json", {"network_def": definition})
    saved(ConvNeXtEncoder(**ENCODER), tmp_path / "encoder/models/model.pt")
    return tmp_path / "encoder"


# ---- folders


def test_generator_of_a_folder_draws_what_its_weights_draw(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "medgen.registry", None)  # not needed, and slow
    network = PGGANGenerator(CHANNELS, latent_dim=4)
    network.load_state_dict(torch.load(bundle / "models/model.pt", weights_only=True))
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))

    generator = load_generator(bundle, "small.json")

    torch.testing.assert_close(generator(generator.from_z(z)), (network(z) + 1) / 2)
    assert generator.sha256 == sha256(bundle / "models/model.pt")
    assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_weights_may_lie_elsewhere_and_the_space_be_another(tmp_path):
    definition = {"_target_": "medgen.networks.StyleGAN2Generator", **STYLEGAN2}
    write(tmp_path / "g/configs/inference.json", {"network_def": definition})
    weights = saved(StyleGAN2Generator(**STYLEGAN2), tmp_path / "results/w.pt")

    for space, styles in ((None, 6), ("w+", 6), ("w", 1)):
        generator = load_generator(str(tmp_path / "g"), weights=str(weights), space=space)
        assert (generator.space, generator.latent_shape) == (space or "w+", (styles, 8))
        assert generator.sha256 == sha256(weights)


@pytest.mark.parametrize("text", ["['small.json', 'wider.json']", "[small.json,wider.json]", "small.json,wider.json"])
def test_overlays_are_laid_over_each_other_as_monai_does(text, bundle):
    # a number, an argument more, and one within: SMALL's "train#lr" is about an id that this config does not have
    weights = saved(PGGANGenerator(CHANNELS, 5, out_channels=3, first_norm=False), bundle / "wide.pt")

    for overlay in (text, ["small.json", "wider.json"], ("small.json", bundle / "configs/wider.json"), "wider.json"):
        generator = load_generator(bundle, overlay, weights)
        assert (generator.z_dim, generator.channels) == (5, 3)
        assert generator.network.blocks[0].first_norm is False


def test_overlay_of_the_current_folder_goes_before_the_bundles_own(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "small.json", {"width": 5})
    weights = saved(PGGANGenerator(CHANNELS, 5), tmp_path / "wide.pt")

    assert load_generator(bundle, "small.json", weights).z_dim == 5


def test_encoder_estimates_what_its_weights_estimate(encoder_bundle):
    network = ConvNeXtEncoder(**ENCODER)
    network.load_state_dict(torch.load(encoder_bundle / "models/model.pt", weights_only=True))
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))

    encoder = load_encoder(encoder_bundle)

    torch.testing.assert_close(encoder(images), network.eval()(images))
    assert encoder.sha256 == sha256(encoder_bundle / "models/model.pt")
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_encoder_of_another_generator_is_refused(encoder_bundle, tmp_path, caplog):
    mine, other = (saved(torch.nn.Linear(1, n), tmp_path / f"{n}.pt") for n in (1, 2))
    load_encoder(encoder_bundle, generator_weights=mine)
    assert "is taken for granted" in caplog.text  # nothing says what it was trained for

    write(encoder_bundle / "models/trained_as.json", {"generator_sha256": sha256(mine), "space": "w"})
    load_encoder(encoder_bundle, generator_weights=mine)
    with pytest.raises(UserError, match=f"generator_sha256 must be {sha256(mine)} as in the training of .*model.pt"):
        load_encoder(encoder_bundle, generator_weights=other)
    with pytest.raises(UserError, match=r"^no weights of a generator at absent\.pt; .*$"):
        load_encoder(encoder_bundle, generator_weights="absent.pt")


def test_discriminator_comes_from_a_checkpoint_or_a_bare_state_dict(bundle, tmp_path):
    torch.manual_seed(1)
    network = PGGANDiscriminator(CHANNELS, num_classes=2)
    network.grow(8, 1.0)
    bare = saved(network, tmp_path / "bare.pt")
    components = {"network": {}, "discriminator": network.state_dict(), "optimizer": {"state": {}}}
    checkpoint = tmp_path / "last.pt"
    torch.save({"components": components, "images_seen": 1, "fingerprint": {}}, checkpoint)
    classes = write(tmp_path / "classes.json", {"classes": 2})
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1

    output_dir = tmp_path / "out"  # of a training
    (output_dir / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, output_dir / "checkpoints")
    for named, file in ((bare, bare), (checkpoint, checkpoint), (output_dir, checkpoint)):
        found = load_discriminator(bundle, ["small.json", classes], named)
        assert found.resolution == 8
        torch.testing.assert_close(found(images), network(images))
        assert found.sha256 == sha256(file)
        (source,) = used()
        assert (source.kind, source.source, source.sha256) == ("discriminator", str(named), found.sha256)
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())


def test_checkpoint_without_the_discriminator_is_refused(bundle, tmp_path):
    torch.save({"components": {"network": {}, "ema": {}}}, tmp_path / "last.pt")
    for path, message in (
        (tmp_path / "last.pt", r"expected a checkpoint with a discriminator, .*last\.pt holds network, ema; name"),
        (bundle / "models/model.pt", r"the discriminator of .*model\.pt belongs to another architecture"),
        (bundle / "configs/train.json", "is not a file of plain weights"),
        ("absent.pt", r"no checkpoint with a discriminator at absent\.pt; name OUT/checkpoints/last\.pt"),
    ):
        with pytest.raises(UserError, match=message):
            load_discriminator(bundle, "small.json", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": None}, "generator must be a bundle's folder, models:/NAME@ALIAS or .*, got none; set --generator"),
        ({"source": "absent"}, "generator must be .*, no folder at absent; set --generator"),
        ({"source": "{}/models"}, r"generator must be .*, no configs/inference\.json in .*models; set --generator"),
        ({"source": "{}/models/model.pt"}, "got the file .*; give the folder of its bundle, and .*--generator_weights"),
        ({"source": "model:/x@y"}, "generator must be .*models:/NAME@ALIAS or .*, got model:/x@y; set --generator"),
        ({"source": "models:/x@y"}, "models:/x@y is in a registry, and none is named; set MLFLOW_TRACKING_URI"),
        ({"weights": "absent.pt"}, r"no weights of the generator at absent\.pt; .*set --generator_weights"),
        ({"overlay": None}, "model.pt belongs to another architecture: .*--generator_overlay"),
        (
            {"overlay": "large.json"},
            "no overlay large.json, neither .* nor in .*configs; set --generator_overlay",
        ),
        ({"overlay": "['small.json', 'x']"}, "no overlay x, neither"),
        ({"overlay": "{}/models/model.pt"}, r"inference\.json with .*model\.pt cannot be built \(UnicodeDecodeError"),
        ({"space": "w"}, "space must be z for a PGGANGenerator, got 'w'; set --space"),
    ],
)
def test_mistakes_are_one_line(arguments, message, bundle):
    arguments = {"source": bundle, "overlay": "small.json", **arguments}
    arguments = {k: v.format(bundle) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(UserError, match=f"^.*{message}") as caught:
        load_generator(**arguments)
    assert "\n" not in str(caught.value)


def test_networks_of_another_kind_are_refused(bundle, encoder_bundle):
    with pytest.raises(
        UserError, match=r"expected an inversion encoder in .*pggan, got a PGGANGenerator; .*--encoder$"
    ):
        load_encoder(bundle, "small.json")
    with pytest.raises(UserError, match=r"an inversion takes a PGGANGenerator or .*, got ConvNeXtEncoder"):
        load_generator(encoder_bundle)
    with pytest.raises(UserError, match=r"encoder must be .*, got the file .*; .* the file as --encoder_weights"):
        load_encoder(encoder_bundle / "models/model.pt")
    with pytest.raises(UserError, match=r"no configs/train\.json in .*encoder"):
        load_discriminator(encoder_bundle, None, "last.pt")


# ---- files of weights


def test_file_and_bundle_folder_name_the_same_weights(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "medgen.registry", None)  # not needed, and slow
    weights = bundle / "models/model.pt"

    for source in (weights, str(weights), bundle, str(bundle)):
        assert find_weights(source) == weights
        lineage.forget()
    assert find_weights(bundle, "autoencoder", "configs/small.json") == bundle / "configs/small.json"


def test_weights_that_are_not_there_are_told_by_whoever_reads_them(tmp_path):
    assert find_weights("absent.pt") == Path("absent.pt")
    assert find_weights(tmp_path) == tmp_path / "models/model.pt"
    assert find_weights(None) is find_weights("null") is find_weights("") is None
    assert used() == []


def test_used_weights_are_listed_once_and_in_order(bundle, encoder_bundle, tmp_path, caplog):
    other = saved(torch.nn.Linear(1, 1), tmp_path / "other.pt")
    with caplog.at_level(logging.INFO, logger="medgen"):
        find_weights(other)
        load_generator(bundle, "small.json")
        load_encoder(encoder_bundle)
        find_weights(other)

    named = [(source.kind, source.source, source.path) for source in used()]
    assert named == [
        ("model", str(other), other),
        ("generator", str(bundle), bundle / "models/model.pt"),
        ("encoder", str(encoder_bundle), encoder_bundle / "models/model.pt"),
    ]
    assert [source.sha256 for source in used()] == [sha256(path) for _, _, path in named]
    assert {(source.uri, source.model_id) for source in used()} == {(None, None)}
    assert f"model: weights {sha256(other)[:12]} of {other}" in caplog.text

    lineage.forget()
    assert used() == []


def test_checksum_is_of_the_file_as_it_is_now(tmp_path):
    path = tmp_path / "model.pt"
    for content in (b"one", b"other"):
        path.write_bytes(content)
        find_weights(path)
        assert [source.sha256 for source in used()] == [hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("model", "model:/x/1", r"model_path must be a file, a folder, models:/NAME@ALIAS or .*, got model:/x/1; set"),
        (
            "autoencoder",
            "http://host/x.pt",
            r"autoencoder_path must be .*, got http://host/x\.pt; set --autoencoder_path",
        ),
        (
            "initial_weights",
            "models:/x@y",
            "initial_weights models:/x@y is in a registry, and none is named; set MLFLOW",
        ),
        ("resume_from", "runs:/0a/../../x.pt", r"resume_from must name a file of a run, got runs:/0a/\.\./\.\./x\.pt"),
        ("resume_from", "runs:/0a//etc/x.pt", "resume_from must name a file of a run, got runs:/0a//etc/x"),
        ("resume_from", "runs:/0a/last.pt", "resume_from runs:/0a/last.pt is in a registry, and none is named; set"),
    ],
)
def test_mistakes_in_naming_weights_are_one_line(kind, source, message):
    with pytest.raises(UserError, match=message) as caught:
        find_weights(source, kind)
    assert "\n" not in str(caught.value)
    assert used() == []


# ---- the registry


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> dict:
    """Two versions of a bundle, the first of them the champion."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    z, image = (
        {"num_channels": n, "spatial_shape": shape, "dtype": "float32"} for n, shape in ((4, []), (1, [16, 16]))
    )
    data_format = {"inputs": {"z": z}, "outputs": {"image": image}}
    pins = {"monai_version": "1.6.1", "pytorch_version": "2.15.0", "numpy_version": "2.4.6"}
    metadata = {"version": "0.1.0", **pins, "required_packages_version": {}, "network_data_format": data_format}
    overlay = write(folder / "width.json", {"width": 4})
    weights = []
    for seed in (0, 1):
        bundle = make_generator_bundle(folder / f"{seed}" / "pggan", seed)
        write(bundle / "configs/metadata.json", metadata)
        (bundle / "LICENSE").write_text("as you like\n")
        register_bundle(bundle, "generator", uri, None if seed else "champion", overlays=[overlay])
        weights.append(sha256(bundle / "models/model.pt"))
    return {"uri": uri, "weights": weights}


def files_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_registered_generator_is_fetched_once(registered, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered["uri"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="medgen"):
        first = load_generator("models:/generator@champion")
    assert "models:/generator@champion is version 1 of generator" in caplog.text
    assert f"weights {registered['weights'][0][:12]} of models:/generator/1, from {tmp_path}" in caplog.text
    cached = files_in(tmp_path)

    again = load_generator("models:/generator/1")
    assert first.sha256 == again.sha256 == registered["weights"][0]
    assert files_in(tmp_path) == cached
    assert load_generator("models:/generator/2").sha256 == registered["weights"][1]
    assert len(list((tmp_path / "medgen/models").iterdir())) == 2


def test_registered_weights_are_those_of_its_bundle_and_known_by_their_version(registered, tmp_path):
    settings = {"tracking_uri": registered["uri"], "cache_dir": tmp_path}
    for source in ("models:/generator@champion", "models:/generator/1"):
        path = find_weights(source, **settings)
        assert path.parts[-2:] == ("models", "model.pt")
        assert sha256(path) == registered["weights"][0]
        assert path.is_relative_to(tmp_path)
    (source,) = used()
    assert (source.source, source.uri) == ("models:/generator@champion", "models:/generator/1")
    assert source.model_id == resolve("models:/generator/1", registered["uri"]).model_id
    assert lineage.uri_of(sha256(path)) == "models:/generator/1"

    # weights that are named beside a bundle are those that are used
    load_generator("models:/generator/1", weights="models:/generator/2", **settings)
    assert [(source.kind, source.uri) for source in used()][1:] == [("generator", "models:/generator/2")]
    # named again by its file, as a reader does, it is still known where it came from
    find_weights(path)
    assert used()[0].uri == "models:/generator/1"


def test_registered_bundle_without_the_file_is_told(registered, tmp_path):
    with pytest.raises(
        UserError, match=r"models:/generator/1 holds no checkpoints/last\.pt; set --resume_from to a file"
    ):
        find_weights("models:/generator@champion", "resume_from", "checkpoints/last.pt", registered["uri"], tmp_path)


def test_file_of_a_run_is_fetched_anew_each_time(registered, tmp_path):
    client = MlflowClient(registered["uri"])
    run = client.create_run(client.create_experiment(tmp_path.name, (tmp_path / "artifacts").as_uri())).info.run_id
    for content in ("first", "second"):
        client.log_text(run, content, "checkpoints/last.pt")
        path = find_weights(
            f"runs:/{run}/checkpoints/last.pt", "resume_from", "", registered["uri"], tmp_path / "cache"
        )
        assert path.read_text() == content
        assert [item.name for item in path.parent.iterdir()] == ["last.pt"]
    assert used()[0].sha256 == sha256(path)

    for name, message in (("absent.pt", "refused"), ("checkpoints", "must name a file of a run, got the folder")):
        with pytest.raises(UserError, match=message) as caught:
            find_weights(f"runs:/{run}/{name}", "resume_from", "", registered["uri"], tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_alias_that_moves_is_followed(registered, tmp_path):
    client, settings = MlflowClient(registered["uri"]), {"tracking_uri": registered["uri"], "cache_dir": tmp_path}
    for version in ("1", "2", "1"):
        client.set_registered_model_alias("generator", "moving", version)
        found = load_generator("models:/generator@moving", **settings)
        assert found.sha256 == registered["weights"][int(version) - 1]


def test_changed_copy_in_the_cache_is_refused(registered, tmp_path):
    settings = {"tracking_uri": registered["uri"], "cache_dir": tmp_path}
    load_generator("models:/generator@champion", **settings)
    (folder,) = tmp_path.iterdir()
    saved(PGGANGenerator(CHANNELS, 4), folder / "models/model.pt")

    with pytest.raises(UserError, match=rf"model\.pt of .* was changed .*: the copy in {folder}; delete"):
        load_generator("models:/generator@champion", **settings)
    shutil.rmtree(folder)
    assert load_generator("models:/generator@champion", **settings).sha256 == registered["weights"][0]


def test_another_process_may_be_faster(registered, tmp_path, monkeypatch):
    settings = {"tracking_uri": registered["uri"]}
    load_generator("models:/generator@champion", **settings, cache_dir=tmp_path / "other")
    replace = os.replace

    def overtaken(source, target):
        if Path(target).parent == tmp_path / "cache" and not Path(target).exists():
            shutil.copytree(tmp_path / "other" / Path(target).name, target)
        return replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    found = load_generator("models:/generator@champion", **settings, cache_dir=tmp_path / "cache")
    assert found.sha256 == registered["weights"][0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_checksum_that_is_none_leads_out_of_no_cache(registered, tmp_path):
    client = MlflowClient(registered["uri"])
    honest = client.get_model_version("generator", "2").tags["bundle_sha256"]
    try:
        client.set_model_version_tag("generator", "2", "bundle_sha256", "../../elsewhere")
        with pytest.raises(UserError, match=r"checksum of models:/generator/2 must be a SHA-256, got '\.\./\.\./"):
            load_generator("models:/generator/2", tracking_uri=registered["uri"], cache_dir=tmp_path / "a/b")
    finally:
        client.set_model_version_tag("generator", "2", "bundle_sha256", honest)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("models:/generator", "named models:/NAME@ALIAS or models:/NAME/VERSION, got models:/generator$"),
        ("models:/generator@absent", "the registry at .* refused: .*absent"),
        ("models:/absent/1", "the registry at .* refused: .*absent"),
    ],
)
def test_mistakes_in_a_uri_are_one_line(source, message, registered, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_generator(source, tracking_uri=registered["uri"], cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
