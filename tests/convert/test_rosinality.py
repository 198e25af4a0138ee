"""Checkpoints in rosinality's layout: the images that its equations give, written out here sample by sample."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from medgen.convert import convert_rosinality
from medgen.errors import UserError
from medgen.networks import StyleGAN2Discriminator, StyleGAN2Generator

SIZE, WIDTH, LAYERS = 16, 6, 3
CHANNELS = {4: 8, 8: 8, 16: 4}
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
KERNEL = torch.outer(TAPS, TAPS)


def make_generator_state(image_channels: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {"input.input": torch.randn(1, CHANNELS[4], 4, 4)}
    for layer in range(1, LAYERS + 1):
        state[f"style.{layer}.weight"] = torch.randn(WIDTH, WIDTH) * 100
        state[f"style.{layer}.bias"] = torch.randn(WIDTH) * 10

    def modulated(name: str, n_in: int, n_out: int, side: int) -> None:
        state[f"{name}.conv.weight"] = torch.randn(1, n_out, n_in, side, side)
        state[f"{name}.conv.modulation.weight"] = torch.randn(n_in, WIDTH)
        state[f"{name}.conv.modulation.bias"] = torch.ones(n_in) + torch.randn(n_in)

    def styled(name: str, n_in: int, n_out: int) -> None:
        modulated(name, n_in, n_out, 3)
        state[f"{name}.noise.weight"] = torch.randn(1)
        state[f"{name}.activate.bias"] = torch.randn(n_out)

    def to_image(name: str, n_in: int) -> None:
        modulated(name, n_in, image_channels, 1)
        state[f"{name}.bias"] = torch.randn(1, image_channels, 1, 1)

    styled("conv1", CHANNELS[4], CHANNELS[4])
    to_image("to_rgb1", CHANNELS[4])
    for level, side in enumerate((8, 16)):
        styled(f"convs.{2 * level}", CHANNELS[side // 2], CHANNELS[side])
        styled(f"convs.{2 * level + 1}", CHANNELS[side], CHANNELS[side])
        to_image(f"to_rgbs.{level}", CHANNELS[side])
        state[f"convs.{2 * level}.conv.blur.kernel"] = state[f"to_rgbs.{level}.upsample.kernel"] = 4 * KERNEL
    for index in range(5):
        side = 2 ** ((index + 5) // 2)
        state[f"noises.noise_{index}"] = torch.randn(1, 1, side, side)
    return state


def make_discriminator_state(image_channels: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    c4, c8, c16 = (CHANNELS[side] for side in (4, 8, 16))
    state = {"convs.0.0.weight": torch.randn(c16, image_channels, 1, 1), "convs.0.1.bias": torch.randn(c16)}
    for block, (n_in, n_out) in enumerate(((c16, c8), (c8, c4)), 1):
        state[f"convs.{block}.conv1.0.weight"] = torch.randn(n_in, n_in, 3, 3)
        state[f"convs.{block}.conv1.1.bias"] = torch.randn(n_in)
        state[f"convs.{block}.conv2.0.kernel"] = state[f"convs.{block}.skip.0.kernel"] = KERNEL
        state[f"convs.{block}.conv2.1.weight"] = torch.randn(n_out, n_in, 3, 3)
        state[f"convs.{block}.conv2.2.bias"] = torch.randn(n_out)
        state[f"convs.{block}.skip.1.weight"] = torch.randn(n_out, n_in, 1, 1)
    state["final_conv.0.weight"], state["final_conv.1.bias"] = torch.randn(c4, c4 + 1, 3, 3), torch.randn(c4)
    state["final_linear.0.weight"], state["final_linear.0.bias"] = torch.randn(c4, c4 * 16), torch.randn(c4)
    state["final_linear.1.weight"], state["final_linear.1.bias"] = torch.randn(1, c4), torch.randn(1)
    return state


def lrelu(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2) * 2**0.5


def filtered(x: torch.Tensor, before: int, after: int, gain: float = 1.0) -> torch.Tensor:
    """Each channel by itself, padded at the top left and the bottom right."""
    x = F.pad(x, (before, after, before, after))
    return torch.cat([F.conv2d(x[:, i : i + 1], gain * KERNEL[None, None]) for i in range(x.shape[1])], 1)


def modulated_convolution(state, name, x, w, demodulate, upsample=False):
    """Weights of its own for each sample (StyleGAN2, equations 1 and 3)."""
    weight = state[f"{name}.conv.weight"][0]
    results = []
    for sample, style_of in zip(x, w, strict=True):
        style = state[f"{name}.conv.modulation.weight"] @ style_of / WIDTH**0.5 + state[f"{name}.conv.modulation.bias"]
        own = weight / weight[0].numel() ** 0.5 * style[None, :, None, None]
        if demodulate:
            own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if upsample:
            y = F.conv_transpose2d(sample[None], own.transpose(0, 1), stride=2)
            y = filtered(y, 1, 1, gain=4)
        else:
            y = F.conv2d(sample[None], own, padding=own.shape[-1] // 2)
        results.append(y)
    return torch.cat(results)


def reference_images(state: dict[str, torch.Tensor], z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w and images with the stored noise."""
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in range(1, LAYERS + 1):
        weight, bias = state[f"style.{layer}.weight"], state[f"style.{layer}.bias"]
        w = lrelu(w @ weight.T * 0.01 / WIDTH**0.5 + bias * 0.01)

    def styled(name, index, x, upsample=False):
        y = modulated_convolution(state, name, x, w, True, upsample)
        y = y + state[f"{name}.noise.weight"] * state[f"noises.noise_{index}"]
        return lrelu(y + state[f"{name}.activate.bias"][:, None, None])

    x = styled("conv1", 0, state["input.input"].expand(len(z), -1, -1, -1))
    image = modulated_convolution(state, "to_rgb1", x, w, False) + state["to_rgb1.bias"]
    for level in range(2):
        x = styled(f"convs.{2 * level}", 2 * level + 1, x, upsample=True)
        x = styled(f"convs.{2 * level + 1}", 2 * level + 2, x)
        spread = torch.zeros(*image.shape[:2], 2 * image.shape[2], 2 * image.shape[3])
        spread[:, :, ::2, ::2] = image
        image = modulated_convolution(state, f"to_rgbs.{level}", x, w, False) + state[f"to_rgbs.{level}.bias"]
        image = image + filtered(spread, 2, 1, gain=4)
    return w, image


def reference_logits(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def convolution(name, x, **keywords):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight / weight[0].numel() ** 0.5, **keywords)

    def bias(name, x):
        return lrelu(x + state[f"{name}.bias"][:, None, None])

    x = bias("convs.0.1", convolution("convs.0.0", x))
    for block in (1, 2):
        name = f"convs.{block}"
        y = bias(f"{name}.conv1.1", convolution(f"{name}.conv1.0", x, padding=1))
        y = bias(f"{name}.conv2.2", convolution(f"{name}.conv2.1", filtered(y, 2, 2), stride=2))
        x = (y + convolution(f"{name}.skip.1", filtered(x, 1, 1), stride=2)) / 2**0.5
    deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()  # one group of four
    x = torch.cat([x, deviation.expand(len(x), 1, 4, 4)], 1)
    x = bias("final_conv.1", convolution("final_conv.0", x, padding=1)).flatten(1)
    for index in range(2):
        weight = state[f"final_linear.{index}.weight"]
        x = x @ weight.T / weight.shape[1] ** 0.5 + state[f"final_linear.{index}.bias"]
        x = lrelu(x) if index == 0 else x
    return x


def saved(path: Path, content: dict[str, object]) -> Path:
    torch.save(content, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("name", ["g_ema", "g"])
def test_images_equal_those_of_the_equations(tmp_path, image_channels, name):
    given = make_generator_state(image_channels)
    path = saved(tmp_path / "c.pt", {name: given, "latent_avg": torch.ones(WIDTH)})
    z = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))

    network, settings, state = convert_rosinality(path, name)
    generator = network(**settings).eval()
    generator.load_state_dict(state)

    w, image = reference_images(given, z)
    assert network is StyleGAN2Generator
    torch.testing.assert_close(generator.mapping(z)[:, 0], w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(generator(z, noise="const"), image, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("image_channels", [1, 3])
def test_logits_equal_those_of_the_equations(tmp_path, image_channels):
    given = make_discriminator_state(image_channels)
    images = torch.randn(4, image_channels, SIZE, SIZE, generator=torch.Generator().manual_seed(3))

    network, settings, state = convert_rosinality(saved(tmp_path / "c.pt", {"d": given}), "d")
    discriminator = network(**settings).eval()
    discriminator.load_state_dict(state)

    assert network is StyleGAN2Discriminator
    torch.testing.assert_close(discriminator(images), reference_logits(given, images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mean_w_is_the_stored_one_or_that_of_many_latents(tmp_path):
    given = make_generator_state(1)
    stored = torch.arange(float(WIDTH))

    kept = convert_rosinality(saved(tmp_path / "a.pt", {"g_ema": given, "latent_avg": stored})).state["w_avg"]
    estimated = convert_rosinality(saved(tmp_path / "b.pt", {"g_ema": given})).state["w_avg"]

    w, _ = reference_images(given, torch.randn(20_000, WIDTH, generator=torch.Generator().manual_seed(5))[:2000])
    assert torch.equal(kept, stored)
    # standard errors of both means
    assert (estimated - w.mean(0)).abs().max() < 5 * w.std(0).max() / 2000**0.5


def test_arguments_of_a_training_are_passed_over(tmp_path):
    arguments = argparse.Namespace(size=SIZE, latent=WIDTH)
    path = saved(tmp_path / "c.pt", {"g_ema": make_generator_state(1), "args": arguments})

    assert convert_rosinality(path).settings["image_size"] == SIZE


def test_other_content_is_refused_in_words(tmp_path):
    state = make_generator_state(1)
    without = {name: value for name, value in state.items() if name != "to_rgbs.0.bias"}
    for content, said in (
        ({"g": state}, r"expected g_ema in .*, got g; set --network"),
        (state, "got no network"),
        ({"g_ema": without}, r"without to_rgbs\.0\.bias"),
        ({"g_ema": {**state, "encoder.weight": torch.zeros(1)}}, r"with an unknown encoder\.weight"),
        (
            {"g_ema": {**state, "convs.0.conv.blur.kernel": KERNEL}},
            r"convs\.0\.conv\.blur\.kernel .* must be the filter",
        ),
        ({"g_ema": {**state, "input.input": torch.zeros(2, 8, 4, 4)}}, "belongs to another architecture"),
    ):
        with pytest.raises(UserError, match=said):
            convert_rosinality(saved(tmp_path / "c.pt", content))
    with pytest.raises(UserError, match="network must be one of g_ema, g, d, got 'G_ema'"):
        convert_rosinality(tmp_path / "c.pt", "G_ema")


def test_calls_are_refused_and_not_made(tmp_path):
    class Run:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    with pytest.raises(UserError, match=r"it names posix\.system"):
        convert_rosinality(saved(tmp_path / "c.pt", {"g_ema": make_generator_state(1), "args": Run()}))

    assert not (tmp_path / "mark").exists()
