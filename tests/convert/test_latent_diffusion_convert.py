"""Networks of monai-generative beside what they become: equal outputs, and nothing guessed that would change them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import AutoencoderKL as CoreAutoencoder
from monai.networks.nets import DiffusionModelUNet as CoreDiffusion
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from medgen import cli
from medgen.convert import convert_latent_diffusion, convert_state_dict
from medgen.convert import latent_diffusion as conversion
from medgen.data import LatentScaling
from medgen.errors import UserError, find_user_error
from medgen.weights import read_state_dict

monai.config.IgniteInfo = monai.utils.IgniteInfo  # where monai-generative, archived before it moved, looks for it
from generative.networks.nets import AutoencoderKL, DiffusionModelUNet  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "bundles" / "cxr_latent_diffusion" / "configs"
GROUPS, HEADS = 8, (0, 8, 24)

# The source's networks at a reduced width, and what else monai-generative can build.
AUTOENCODERS = {
    "source": {"num_channels": (8, 16, 16, 16), "num_res_blocks": 2, "attention_levels": (False,) * 4},
    "attention": {"num_channels": (8, 16), "num_res_blocks": (1, 2), "attention_levels": (False, True)},
    "attention, one block": {"num_channels": (8, 16), "num_res_blocks": 1, "attention_levels": (False, True)},
    "encoder non-local": {"num_channels": (8, 16), "attention_levels": (False, False), "nonlocal": (True, False)},
    "decoder non-local": {"num_channels": (8, 16), "attention_levels": (True, True), "nonlocal": (False, True)},
    "both": {"num_channels": (8, 16), "num_res_blocks": 1, "attention_levels": (True, True), "nonlocal": (True, True)},
    "3-D, 2 channels": {"spatial_dims": 3, "num_channels": (8, 8), "attention_levels": (False, False), "channels": 2},
}
DIFFUSION = {
    "source": {"with_conditioning": True, "cross_attention_dim": 12},
    "unconditional": {},
    "classes": {"num_class_embeds": 4},
    "no attention but in the middle": {"attention_levels": (False, False, False)},
    "residual sampling": {"with_conditioning": True, "cross_attention_dim": 5, "resblock_updown": True},
    "two layers": {"with_conditioning": True, "cross_attention_dim": 5, "transformer_num_layers": 2},
    "3-D, 4 to 3": {"spatial_dims": 3, "with_conditioning": True, "cross_attention_dim": 5, "in_channels": 4},
}

runner = CliRunner()


def randomised(network: nn.Module) -> nn.Module:
    """All parameters drawn: layers that begin at zero would hide what is wrong behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
    return network.eval()


def make_autoencoder(case: str) -> nn.Module:
    settings = {"spatial_dims": 2, "num_res_blocks": 2, "latent_channels": 3, **AUTOENCODERS[case]}
    encoder, decoder = settings.pop("nonlocal", (False, False))
    channels = settings.pop("channels", 1)
    nonlocal_blocks = {"with_encoder_nonlocal_attn": encoder, "with_decoder_nonlocal_attn": decoder}
    network = AutoencoderKL(
        in_channels=channels, out_channels=channels, norm_num_groups=GROUPS, **nonlocal_blocks, **settings
    )
    return randomised(network)


def make_diffusion(case: str) -> nn.Module:
    settings = {"spatial_dims": 2, "in_channels": 3, "out_channels": 3, "num_res_blocks": 2}
    settings |= {"num_channels": (8, 16, 24), "attention_levels": (False, True, True), **DIFFUSION[case]}
    return randomised(DiffusionModelUNet(norm_num_groups=GROUPS, num_head_channels=HEADS, **settings))


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def built(converted) -> nn.Module:
    network = converted.network(**converted.settings)
    network.load_state_dict(converted.state)
    return network.eval()


@pytest.mark.parametrize("case", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_computes_the_same(tmp_path, case):
    old = make_autoencoder(case)
    source = save(old.state_dict(), tmp_path / "autoencoder.pth")

    new = built(convert_latent_diffusion(source, norm_num_groups=GROUPS))

    dims = AUTOENCODERS[case].get("spatial_dims", 2)
    images = torch.rand(2, AUTOENCODERS[case].get("channels", 1), *[16] * dims)
    (old_mu, old_sigma), (mu, sigma) = old.encode(images), new.encode(images)
    exact = not any(AUTOENCODERS[case]["attention_levels"]) and "nonlocal" not in AUTOENCODERS[case]
    tolerance = {"rtol": 0.0, "atol": 0.0 if exact else 1e-5}  # attention sums in another order
    torch.testing.assert_close(mu, old_mu, **tolerance)
    torch.testing.assert_close(sigma, old_sigma, **tolerance)
    torch.testing.assert_close(new(images), old.reconstruct(images), **tolerance)
    assert mu.std() > 0.01


@pytest.mark.parametrize("case", DIFFUSION)
@torch.no_grad()
def test_diffusion_network_computes_the_same(tmp_path, case):
    old = make_diffusion(case)
    source = save(old.state_dict(), tmp_path / "diffusion_model.pth")

    new = built(convert_latent_diffusion(source, num_head_channels=HEADS, norm_num_groups=GROUPS))

    settings = DIFFUSION[case]
    latents = torch.randn(2, settings.get("in_channels", 3), *[8] * settings.get("spatial_dims", 2))
    condition = {}
    if "cross_attention_dim" in settings:
        condition["context"] = torch.randn(2, 7, settings["cross_attention_dim"])
    if "num_class_embeds" in settings:
        condition["class_labels"] = torch.tensor([0, 3])
    expected = old(latents, torch.tensor([3, 700]), **condition)
    torch.testing.assert_close(new(latents, torch.tensor([3, 700]), **condition), expected, rtol=0.0, atol=1e-5)
    assert expected.std() > 0.01


def test_networks_of_the_source_need_no_settings_and_give_the_bundles_own(tmp_path):
    """All names and shapes at full size, without the numbers."""
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            spatial_dims=2,
            num_channels=(64, 128, 128, 128),
            attention_levels=(False,) * 4,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        diffusion = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=3,
            num_res_blocks=2,
            num_channels=(256, 512, 768),
            attention_levels=(False, True, True),
            num_head_channels=(0, 512, 768),
            with_conditioning=True,
            cross_attention_dim=1024,
        )

    autoencoder = convert_state_dict("autoencoder.pth", autoencoder.state_dict())
    diffusion = convert_state_dict("diffusion_model.pth", diffusion.state_dict())

    assert autoencoder.overlay == {
        "in_channels": 1,
        "autoencoder_channels": [64, 128, 128, 128],
        "autoencoder_res_blocks": 2,
        "latent_channels": 3,
    }
    assert diffusion.overlay == {
        "latent_channels": 3,
        "channels": [256, 512, 768],
        "num_res_blocks": 2,
        "attention_levels": [False, True, True],
        "num_head_channels": [0, 512, 768],
        "conditioning": "text",
        "context_dim": 1024,
        "null_caption": "eos",
    }
    assert diffusion.trained_as == {
        "conditioning": "text",
        "num_classes": 0,
        "num_head_channels": [0, 512, 768],
        "norm_num_groups": 32,
        "null_caption": "eos",
        "noise_scheduler": "DDPMScheduler",
        "prediction_type": "v_prediction",
        "beta_start": 0.0015,
        "beta_end": 0.0205,
        "num_train_timesteps": 1000,
    }
    for converted in (autoencoder, diffusion):
        with torch.device("meta"):
            expected = converted.network(**converted.settings).state_dict()
        assert {name: value.shape for name, value in converted.state.items()} == {
            name: value.shape for name, value in expected.items()
        }


@pytest.mark.parametrize("parallel", [False, True])
def test_module_saved_whole_tells_its_settings_and_nothing_of_it_runs(tmp_path, parallel):
    """As MLflow logs a model: ``data/model.pth`` in a folder; classes that cannot be imported do not matter."""
    network = make_diffusion("source")
    network.device = torch.device("cpu")  # DataParallel keeps one
    (tmp_path / "final_model" / "data").mkdir(parents=True)
    save(nn.DataParallel(network) if parallel else network, tmp_path / "final_model" / "data" / "model.pth")

    converted = convert_latent_diffusion(tmp_path / "final_model")

    assert converted.settings["num_head_channels"] == list(HEADS)
    assert converted.settings["norm_num_groups"] == GROUPS
    expected = convert_state_dict("x", network.state_dict(), HEADS, GROUPS)
    assert converted.overlay == expected.overlay
    assert all(torch.equal(value, expected.state[name]) for name, value in converted.state.items())


class Canary:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_hostile_module_is_refused_and_nothing_of_it_runs(tmp_path):
    network = make_autoencoder("source")
    network.canary = Canary(tmp_path / "mark")
    source = save(network, tmp_path / "autoencoder.pth")

    with pytest.raises(UserError, match=r"it names (posix|nt)\.mkdir.*nothing in it was run"):
        convert_latent_diffusion(source)

    assert not (tmp_path / "mark").exists()
    torch.load(source, weights_only=False)  # what anything else would have done
    assert (tmp_path / "mark").exists()


def test_checkpoint_gives_the_network_among_its_other_parts(tmp_path):
    network = make_diffusion("source")
    optimiser = torch.optim.AdamW(network.parameters())
    checkpoint = {
        "epoch": 3,
        "diffusion": {f"module.{name}": value for name, value in network.state_dict().items()},
        "optimizer": optimiser.state_dict(),
        "discriminator": nn.Conv2d(1, 1, 3).state_dict(),
        "best_loss": np.float64(0.25),
    }

    converted = convert_latent_diffusion(save(checkpoint, tmp_path / "checkpoint.pth"), None, HEADS, GROUPS)

    assert converted.state.keys() == convert_state_dict("x", network.state_dict(), HEADS, GROUPS).state.keys()


def test_one_of_several_networks_is_named(tmp_path):
    parts = {"ema": make_diffusion("source").state_dict(), "autoencoder": make_autoencoder("source").state_dict()}
    source = save(parts, tmp_path / "both.pth")

    with pytest.raises(UserError, match=r"expected one .* got 2 \(ema, autoencoder\); name one with --network"):
        convert_latent_diffusion(source)

    assert convert_latent_diffusion(source, "autoencoder", norm_num_groups=GROUPS).is_autoencoder


@torch.no_grad()
@pytest.mark.parametrize("include_fc", [True, False])
@pytest.mark.parametrize("combined", [True, False])
def test_names_of_core_pass_with_the_layers_that_they_have(tmp_path, include_fc, combined):
    """The zoo's weights may be under either names; ``out_proj`` of MONAI core is used, ``proj_attn`` never was."""
    settings = {"channels": (8, 16), "num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": GROUPS}
    layers = {"include_fc": include_fc, "use_combined_linear": combined}
    core = randomised(CoreAutoencoder(spatial_dims=2, **settings, **layers))

    converted = convert_latent_diffusion(save(core.state_dict(), tmp_path / "core.pth"), norm_num_groups=GROUPS)

    images = torch.rand(1, 1, 8, 8)
    assert torch.equal(built(converted)(images), core.reconstruct(images))


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("context_dim", [None, 12])
def test_diffusion_network_of_core_with_attention(tmp_path, whole, context_dim):
    """Saved whole, its attention holds layers of einops, which have no weights."""
    core = randomised(
        CoreDiffusion(
            2, 3, 3, (1, 1, 1), (8, 16, 24), (False, True, True), norm_num_groups=GROUPS, num_head_channels=HEADS,
            with_conditioning=context_dim is not None, cross_attention_dim=context_dim,
        )
    )  # fmt: skip
    source = save(core if whole else {"net": core, "epoch": 1}, tmp_path / "core.pth")

    converted = convert_latent_diffusion(source)

    latents, condition = torch.randn(2, 3, 8, 8), {}
    if context_dim:
        condition["context"] = torch.randn(2, 7, context_dim)
    found = built(converted)(latents, torch.tensor([3, 700]), **condition)
    assert torch.equal(found, core(latents, torch.tensor([3, 700]), **condition))
    assert converted.settings["num_head_channels"] == list(HEADS)


@torch.no_grad()
def test_autoencoder_of_core_with_attention_saved_whole(tmp_path):
    core = randomised(CoreAutoencoder(2, channels=(8, 16), num_res_blocks=1, attention_levels=(False, True),
                                      norm_num_groups=GROUPS))  # fmt: skip

    converted = convert_latent_diffusion(save(core, tmp_path / "core.pth"))

    images = torch.rand(1, 1, 8, 8)
    assert torch.equal(built(converted)(images), core.reconstruct(images))


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "model.", "module.model._orig_mod."])
def test_prefixes_in_any_order_are_taken_off(tmp_path, prefix):
    network = make_diffusion("unconditional")
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}

    converted = convert_latent_diffusion(save({"state_dict": state}, tmp_path / "x.pth"), None, HEADS, GROUPS)

    assert converted.state.keys() == convert_state_dict("x", network.state_dict(), HEADS, GROUPS).state.keys()


def test_what_is_left_of_other_prefixes_is_named(tmp_path):
    state = make_diffusion("unconditional").state_dict()
    with pytest.raises(
        UserError, match=r"got 0 \(state_dict with net\.conv_in\.conv\.weight, net\.conv_in\.conv\.bias"
    ):
        convert_latent_diffusion(
            save({"state_dict": {f"module.net.{k}": v for k, v in state.items()}}, tmp_path / "x.pth")
        )
    both = state | {f"model.{name}": value for name, value in state.items()}
    with pytest.raises(UserError, match=r"two tensors for .*, one of them model\.conv_in"):
        convert_latent_diffusion(save(both, tmp_path / "x.pth"), None, HEADS, GROUPS)


@torch.no_grad()
def test_half_precision_becomes_float32_of_the_same_values(tmp_path):
    state = {name: value.half() for name, value in make_autoencoder("source").state_dict().items()}

    converted = convert_latent_diffusion(save(state, tmp_path / "half.pth"), norm_num_groups=GROUPS)

    for name, value in state.items():
        found = converted.state[re.sub(r"^(decoder\.blocks\.\d+)\.conv\.conv", r"\1.postconv.conv", name)]
        assert found.dtype == torch.float32
        assert torch.equal(found, value.float())


def transposed() -> nn.Module:
    return AutoencoderKL(
        2,
        num_channels=(8, 8),
        num_res_blocks=1,
        attention_levels=(False,) * 2,
        norm_num_groups=8,
        use_convtranspose=True,
    )


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (lambda: make_diffusion("source").state_dict(), {"norm_num_groups": 8}, "do not tell how wide its attention"),
        (lambda: make_diffusion("source").state_dict(), {"num_head_channels": HEADS}, "do not tell how many groups"),
        (
            lambda: make_diffusion("source").state_dict(),
            {"num_head_channels": (0, 5, 24), "norm_num_groups": 8},
            r"must divide the channels \[8, 16, 24\]",
        ),
        (
            lambda: make_diffusion("source").state_dict(),
            {"num_head_channels": (8, 8), "norm_num_groups": 8},
            "one number for each level",
        ),
        (lambda: make_autoencoder("source").state_dict(), {"norm_num_groups": 5}, "norm_num_groups must divide"),
        (
            lambda: make_autoencoder("source").state_dict(),
            {"norm_num_groups": 8, "num_head_channels": (8,)},
            "leave out --num_head_channels",
        ),
        (lambda: make_autoencoder("source"), {"norm_num_groups": 4}, "was built with norm_num_groups 8, got 4"),
        (transposed, {}, "up-samples by transposed convolutions"),
        (
            lambda: make_autoencoder("source").state_dict() | {"encoder.blocks.0.extra": torch.ones(1)},
            {"norm_num_groups": 8},
            r"nothing at encoder\.blocks\.0\.extra",
        ),
        (lambda: nn.Conv2d(1, 1, 3).state_dict(), {}, r"expected one AutoencoderKL or DiffusionModelUNet"),
        (lambda: {"epoch": 3, "autoencoder": {}}, {}, r"got 0 \(epoch, autoencoder\)"),
        (lambda: [1, 2], {}, r"got 0 \(list\)"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(tmp_path, content, arguments, message):
    source = save(content(), tmp_path / "source.pth")

    with pytest.raises(UserError, match=message):
        convert_latent_diffusion(source, **arguments)


def convert(*arguments: object):
    return runner.invoke(cli.app, ["convert", "latent-diffusion", *map(str, arguments)])


HEAD = {
    "in_channels": 1,
    "autoencoder_channels": [64, 128],
    "autoencoder_res_blocks": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "channels": [64, 128],
    "num_res_blocks": 1,
    "attention_levels": [False, True],
    "num_head_channels": [0, 64],
    "context_dim": 1024,
    "num_classes": 0,
    "autoencoder_def": {
        "_target_": "medgen.networks.KLAutoencoder",
        "spatial_dims": 2,
        "in_channels": "@in_channels",
        "out_channels": "@in_channels",
        "num_res_blocks": "@autoencoder_res_blocks",
        "channels": "@autoencoder_channels",
        "attention_levels": "$[False] * len(@autoencoder_channels)",
        "latent_channels": "@latent_channels",
        "norm_num_groups": "@norm_num_groups",
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    "network_def": {
        "_target_": "DiffusionModelUNet",
        "spatial_dims": 2,
        "in_channels": "@latent_channels",
        "out_channels": "@latent_channels",
        "num_res_blocks": "@num_res_blocks",
        "channels": "@channels",
        "attention_levels": "@attention_levels",
        "num_head_channels": "@num_head_channels",
        "norm_num_groups": "@norm_num_groups",
        "with_conditioning": "$@conditioning == 'text'",
        "cross_attention_dim": "$@context_dim if @conditioning == 'text' else None",
        "num_class_embeds": "$@num_classes + 1 if @conditioning == 'label' else None",
    },
}


@pytest.mark.parametrize("case", ["autoencoder", "unconditional", "classes", "residual sampling"])
def test_overlay_makes_the_bundles_definition_take_the_weights(tmp_path, case):
    network = make_autoencoder("decoder non-local") if case == "autoencoder" else make_diffusion(case)
    source = save(network, tmp_path / "network.pth")
    (tmp_path / "head.json").write_text(json.dumps(HEAD))

    result = convert(source, "--output", tmp_path / "out" / "model.pt")

    assert result.exit_code == 0, result.stderr
    parser = ConfigParser(ConfigParser.load_config_files([tmp_path / "head.json", tmp_path / "out" / "model.json"]))
    built = parser.get_parsed_content("autoencoder_def" if case == "autoencoder" else "network_def")
    built.load_state_dict(read_state_dict(tmp_path / "out" / "model.pt"))
    assert ("no scaling.json" in result.stdout) == (case != "autoencoder")


@pytest.fixture
def autoencoder(tmp_path) -> Path:
    convert(save(make_autoencoder("source"), tmp_path / "a.pth"), "--output", tmp_path / "autoencoder.pt")
    return tmp_path / "autoencoder.pt"


@pytest.fixture
def small_source(monkeypatch) -> None:
    """Takes the network of reduced width for the source's own."""
    reduced = {"channels": [8, 16, 24], "cross_attention_dim": 12}
    monkeypatch.setattr(conversion, "SOURCE_DIFFUSION", conversion.SOURCE_DIFFUSION | reduced)
    monkeypatch.setattr(conversion, "SOURCE_HEADS", list(HEADS))


def test_scaling_belongs_to_the_converted_autoencoder(tmp_path, autoencoder, small_source):
    source = save(make_diffusion("source"), tmp_path / "u.pth")

    result = convert(source, "--output", tmp_path / "model.pt", "--autoencoder", autoencoder)

    assert result.exit_code == 0, result.stderr
    assert "scale 0.3 (the source's)" in result.stdout
    assert "taken to be trained like it: v_prediction, betas 0.0015 to 0.0205, null caption eos" in result.stdout
    trained_as = json.loads((tmp_path / "trained_as.json").read_text())
    assert (trained_as["null_caption"], trained_as["scale"], trained_as["shift"]) == ("eos", [0.3], [0.0])
    assert trained_as["norm_num_groups"] == GROUPS
    scaling = LatentScaling.read(tmp_path / "scaling.json")
    scaling.check_autoencoder(autoencoder)
    assert scaling.whiten(torch.ones(1, 3, 2, 2)).unique().item() == pytest.approx(0.3)
    assert trained_as["autoencoder"] == scaling.autoencoder_sha256
    refused = convert(autoencoder, "--output", tmp_path / "b" / "other.pt", "--autoencoder", autoencoder)
    assert refused.exit_code == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("factor", [torch.tensor(1.7), torch.tensor([1.7])])
def test_scale_factor_of_a_checkpoint_is_used_and_said(tmp_path, autoencoder, flat, factor):
    state = make_diffusion("unconditional").state_dict()
    checkpoint = {**state, "scale_factor": factor} if flat else {"model": state, "scale_factor": factor}
    source = save(checkpoint, tmp_path / "u.pth")
    heads = ("--num_head_channels", "0,8,24", "--norm_num_groups", GROUPS, "--autoencoder", autoencoder)

    result = convert(source, "--output", tmp_path / "model.pt", *heads)

    assert result.exit_code == 0, result.stderr
    assert f"scale 1.7 (scale_factor of {source})" in result.stdout
    assert LatentScaling.read(tmp_path / "scaling.json").scale == pytest.approx((1.7,))
    result = convert(source, "--output", tmp_path / "model.pt", *heads, "--scale", 2, "--force")
    assert "scale 2 (--scale)" in result.stdout


def test_of_another_network_nothing_is_guessed(tmp_path, autoencoder):
    source = save(make_diffusion("unconditional"), tmp_path / "u.pth")
    arguments = (source, "--output", tmp_path / "model.pt", "--autoencoder", autoencoder)

    refused = convert(*arguments)
    assert "does not tell what its latents were multiplied by; name it with --scale" in refused.stderr
    assert not (tmp_path / "model.pt").exists()

    result = convert(*arguments, "--scale", 0.5)
    assert "does not tell how it was trained: set --prediction_type, --beta_start" in result.stdout
    record = json.loads((tmp_path / "trained_as.json").read_text())
    assert record.keys().isdisjoint({"prediction_type", "beta_start", "beta_end", "noise_scheduler", "null_caption"})
    assert (record["conditioning"], record["num_head_channels"]) == ("none", list(HEADS))

    result = convert(*arguments, "--scale", 0.5, "--prediction_type", "epsilon", "--force")
    assert "how it was trained: set --beta_start" in result.stdout
    assert json.loads((tmp_path / "trained_as.json").read_text())["prediction_type"] == "epsilon"
    assert json.loads((tmp_path / "model.json").read_text())["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "{}/m.pt", "--autoencoder", "{}/u.pth"), "not a file of plain weights"),
        (("--output", "{}/m.pt", "--autoencoder", "{}/state.pt"), "got .*state.pt with weights of something else"),
        (("--output", "{}/m.pt", "--autoencoder", "{}/none.pt"), "which is not there"),
        (("--output", "{}/m.pt", "--config", "{}/scaling.json"), "expected different files"),
        (("--output", "{}/m.pt", "--config", "{}/x/../trained_as.json"), "expected different files"),
        (("--output", "{}/scaling.pt"), "expected different files"),
        (
            ("--output", "{}/autoencoder.pt", "--autoencoder", "{}/autoencoder.pt", "--force"),
            "expected different files",
        ),
        (("--output", "{}/m.pt", "--scale", "0.5"), "name it with --autoencoder"),
        (("--output", "{}/m.pt", "--autoencoder", "{}/autoencoder.pt", "--scale", "nan"), "must be a number above 0"),
        (("--output", "{}/m.pt", "--prediction_type", "eps"), "prediction_type must be one of epsilon, v_prediction"),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_write_nothing(tmp_path, autoencoder, arguments, message):
    source = save(make_diffusion("unconditional"), tmp_path / "u.pth")
    save(make_diffusion("unconditional").state_dict(), tmp_path / "state.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    result = convert(source, *(argument.format(tmp_path) for argument in arguments))

    assert result.exit_code == 1
    assert re.search(message, result.stderr)
    assert result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@torch.no_grad()
def test_bundle_samples_with_what_was_converted(tmp_path):
    """The overlays beside the bundle's own, and the old network's latents after one step of DDIM."""
    old, autoencoder = make_diffusion("unconditional"), make_autoencoder("decoder non-local")
    convert(save(autoencoder, tmp_path / "a.pth"), "--output", tmp_path / "autoencoder.pt")
    unet = save(old, tmp_path / "u.pth")
    convert(unet, "--output", tmp_path / "model.pt", "--autoencoder", tmp_path / "autoencoder.pt", "--scale", 0.5)
    files = [CONFIGS / "inference.json", CONFIGS / "demo.json", tmp_path / "autoencoder.json", tmp_path / "model.json"]

    workflow = ConfigWorkflow(
        [str(file) for file in files],
        logging_file=False,
        workflow_type="infer",
        model_path=str(tmp_path / "model.pt"),
        output_dir=str(tmp_path / "out"),
        seeds=3,
        image_size=16,
        sampler="ddim",
        spacing="linspace",
        num_steps=1,
    )
    workflow.initialize()
    workflow.run()

    sampler = workflow.parser.get_parsed_content("inferer")
    noise = sampler.interpolate(3, 3, [0.0])
    alpha = workflow.parser.get_parsed_content("noise_scheduler").alphas_cumprod[999]
    latents = alpha.sqrt() * noise - (1 - alpha).sqrt() * old(noise, torch.tensor([999]))
    expected = autoencoder.decode(latents / 0.5).clamp(0, 1)[0, 0].numpy() * 255
    found = np.asarray(Image.open(tmp_path / "out" / "samples" / "seed000003.png"))
    np.testing.assert_allclose(found, expected, atol=0.51)
    assert found.std() > 1

    overlay = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**overlay, "num_head_channels": [0, 16, 12]}))
    other = ConfigWorkflow(
        [str(file) for file in files], logging_file=False, workflow_type="infer", image_size=16,
        model_path=str(tmp_path / "model.pt"), output_dir=str(tmp_path / "other"),
    )  # fmt: skip
    with pytest.raises((ValueError, RuntimeError)) as raised:
        other.initialize()
    assert "num_head_channels must be [0, 8, 24] as in the training" in find_user_error(raised.value)


def test_folder_without_a_logged_model_is_one_line(tmp_path):
    (tmp_path / "final_model").mkdir()

    result = convert(tmp_path / "final_model", "--output", tmp_path / "model.pt")

    assert result.exit_code == 1
    assert "a folder must be a model that MLflow logged, with data/model.pth in it" in result.stderr
    assert result.stderr.count("\n") == 1
