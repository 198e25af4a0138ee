"""Sampling of latent diffusion: guidance in one forward against two, few steps against many, and the GPU's share.

On the CPU a small network with text (latents 3×16×16 of 64×64 images) is compared with itself. On a GPU the source's
U-Net samples 512×512 images by 20 steps of DPM-Solver++ with guidance, decoding included, in float32, in bf16,
compiled, and compiled onto CUDA graphs; the floor is the time that its floating-point operations would take at the rate
of a large bf16 matrix product on the same GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from medgen.data.latents import LatentScaling
from medgen.inferers import LatentDiffusionSampler, Sampler
from medgen.networks import KLAutoencoder

BATCH, ROUNDS = 2, 3
GPU_BATCHES, GPU_ROUNDS = (1, 16), 5
SCHEDULER = DDPMScheduler(
    1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, prediction_type="v_prediction"
)


class Noise:
    """Contexts of captions, without the text model: 77 tokens."""

    key = "caption"

    def __init__(self, width: int, device: str) -> None:
        self.token = torch.randn(1, 77, width, generator=torch.Generator().manual_seed(0)).to(device)

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"context": self.token.expand(len(captions), -1, -1)}

    def null(self, batch: int) -> dict[str, torch.Tensor]:
        return {"context": -self.token.expand(batch, -1, -1)}


def unet(channels: tuple[int, ...], context: int, device: str) -> DiffusionModelUNet:
    """A U-Net of the bundle's form, with text."""
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=2,
        channels=channels,
        attention_levels=(False, True, True),
        num_head_channels=(0, *channels[1:]),
        norm_num_groups=32,
        norm_eps=1e-6,
        with_conditioning=True,
        cross_attention_dim=context,
        use_flash_attention=device == "cuda",
    )
    return network.to(device).eval().requires_grad_(False)


def autoencoder(channels: tuple[int, ...], num_res_blocks: int, device: str) -> KLAutoencoder:
    """An autoencoder of the bundle's form."""
    network = KLAutoencoder(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=num_res_blocks,
        channels=channels,
        attention_levels=[False] * len(channels),
        latent_channels=3,
        norm_num_groups=32,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def median_seconds(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Wall-clock seconds of each, by turns, so that a busy moment of the machine meets them all."""

    def seconds(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for action in actions.values():
        action()
    times = [{name: seconds(action) for name, action in actions.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in times) for name in actions}


def run() -> list[tuple[str, float, str]]:
    """Measure on the CPU; a ratio above 1 is how many times faster than the other way.

    Returns:
        (name, ratio, detail) per comparison.
    """
    network, conditioner = unet((32, 64, 96), 64, "cpu"), Noise(64, "cpu")
    decoder, scaling = autoencoder((32, 64, 64), 1, "cpu"), LatentScaling((1.0,), (0.0,), "")
    seeds, prompts = list(range(BATCH)), ["effusion"] * BATCH

    def inferer(name: str, num_steps: int) -> LatentDiffusionSampler:
        return LatentDiffusionSampler(
            SCHEDULER, decoder, scaling, (3, 16, 16), conditioner, sampler=name, num_steps=num_steps
        )

    def guided(name: str, num_steps: int) -> Callable[[], object]:
        sampler = inferer(name, num_steps)
        return lambda: sampler(seeds, network, prompts=prompts)

    @torch.inference_mode()
    def two_forwards() -> None:
        sampler, x = Sampler(SCHEDULER, "dpm++", 20), torch.randn(BATCH, 3, 16, 16)
        for index, timestep in enumerate(sampler.timesteps):
            t = timestep.expand(BATCH)
            without = network(x, timesteps=t, **conditioner.null(BATCH))
            conditional = network(x, timesteps=t, **conditioner(prompts))
            x = sampler.step(without + 7.0 * (conditional - without), index, x)
        decoder.decode(scaling.unwhiten(x))

    times = median_seconds(
        {
            "two": two_forwards,
            "dpm++ 20": guided("dpm++", 20),
            "ddim 50": guided("ddim", 50),
            "ddim 200": guided("ddim", 200),
        },
        ROUNDS,
    )
    each = {name: 1000 * duration / BATCH for name, duration in times.items()}
    return [
        (
            f"guidance, one forward of {2 * BATCH} / two of {BATCH}",
            times["two"] / times["dpm++ 20"],
            f"{each['dpm++ 20']:.0f} ms an image against {each['two']:.0f}",
        ),
        *(
            (
                f"DPM-Solver++ 20 / {name.replace('ddim', 'DDIM')}",
                times[name] / times["dpm++ 20"],
                f"{each['dpm++ 20']:.0f} ms an image against {each[name]:.0f}",
            )
            for name in ("ddim 50", "ddim 200")
        ),
    ]


def matmul_rate() -> float:
    """FLOP/s of a large bf16 matrix product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(10):
            a @ a

    return 10 * 2 * 8192**3 / median_seconds({"": products}, 5)[""]


def run_cuda() -> list[tuple[str, float, str]]:
    """Measure on the GPU, at the source's size.

    Returns:
        (name, seconds an image, detail) for each way and batch.
    """
    network, conditioner = unet((256, 512, 768), 1024, "cuda"), Noise(1024, "cuda")
    decoder, scaling = autoencoder((64, 128, 128, 128), 2, "cuda"), LatentScaling((0.3,), (0.0,), "")
    latents = torch.zeros(1, 3, 64, 64, device="cuda")
    with torch.inference_mode(), FlopCounterMode(display=False) as forward:
        network(latents, timesteps=torch.zeros(1, device="cuda"), **conditioner([""]))
    with torch.inference_mode(), FlopCounterMode(display=False) as decode:
        decoder.decode(latents)
    flops = 2 * 20 * forward.get_total_flops() + decode.get_total_flops()
    rate = matmul_rate()
    ways = {
        "float32": (network, False),
        "bf16": (network, True),
        "bf16, compiled": (torch.compile(network), True),
        "bf16, compiled, CUDA graphs": (torch.compile(network, mode="reduce-overhead"), True),
    }
    results = []
    for batch in GPU_BATCHES:
        actions = {}
        for way, (model, amp) in ways.items():
            sampler = LatentDiffusionSampler(SCHEDULER, decoder, scaling, (3, 64, 64), conditioner, amp=amp)
            actions[way] = lambda sampler=sampler, model=model, batch=batch: sampler(
                list(range(batch)), model, prompts=["effusion"] * batch
            )
        for way, duration in median_seconds(actions, GPU_ROUNDS).items():
            share = flops * batch / rate / duration
            detail = (
                f"{share:.0%} of the floor ({flops / 1e12:.1f} TFLOP an image, {forward.get_total_flops() / 1e9:.0f} "
                f"GFLOP a forward, at {rate / 1e12:.0f} TFLOP/s; {torch.cuda.get_device_name()})"
            )
            results.append((f"512×512, batch {batch}, {way}", duration / batch, detail))
    return results


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f} times as fast, {detail} ({torch.get_num_threads()} threads, median of {ROUNDS})")
    if torch.cuda.is_available():
        for name, duration, detail in run_cuda():
            print(f"{name}: {duration:.3f} s an image, {detail}, median of {GPU_ROUNDS}")
