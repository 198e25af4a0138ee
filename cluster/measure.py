"""Images per second and floating-point operations of an image at real sizes: ``python cluster/measure.py STAGE ...``.

What ``cluster/plan.py`` multiplies. Networks, losses and trainers are those of the bundles' configs, on random images
with random weights, which take as long as others; loading images is not in it (it runs beside, in other processes). On
the CPU the time is that of one thread's processor, whatever else the machine does; on a GPU it is wall-clock time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from monai.bundle import ConfigParser
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from medgen.engines import pggan_setting
from medgen.engines.trainer import GenerativeTrainer, unwrap
from medgen.errors import UserError
from medgen.handlers import TrainingCheckpoint
from medgen.inferers import LatentOptimiser, StyleGAN2Projector
from medgen.losses import projection_loss
from medgen.metrics import score_anomaly
from medgen.networks import LatentGenerator, PGGANGenerator, StyleGAN2Generator
from medgen.output import atomic_write_text
from medgen.precision import autocast

ROOT = Path(__file__).resolve().parents[1]
RATES = Path(__file__).with_name("rates.json")
CAPTION = (77, 1024)  # tokens and width of Stable Diffusion 2.1's text encoder
SIDE = 512


@dataclass
class Stage:
    """What is measured.

    Attributes:
        parts: what is done for an image, each with how often, in batches of ``images``.
        images: in a batch.
        amp: whether a GPU computes most of it in bfloat16.
        trainer: of a training.
    """

    parts: list[tuple[Callable[[], Any], float]]
    images: int
    amp: bool = True
    trainer: GenerativeTrainer | None = None


class Stream:
    """What a trainer asks of its loader when it is made; batches are handed to it here."""

    seed, schedule = 0, None

    def __init__(self, size: int) -> None:
        self.images_seen, self.batch_size, self.global_batch_size = 0, size, size

    def __len__(self) -> int:
        return 1_000_000


class RandomCaptions:
    """In place of the text encoder, which is a stage of its own here."""

    key = "sentences"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"context": torch.randn(len(texts), *CAPTION, device=self.device)}


@dataclass
class Bench:
    """Where a stage runs.

    Attributes:
        device: of all networks.
        folder: for files.
        batch_size: that was asked for; 0 for each stage's own.
    """

    device: torch.device
    folder: Path
    batch_size: int = 0

    def size(self, gpu: int, cpu: int = 1) -> int:
        """Images of a batch."""
        return self.batch_size or (gpu if self.device.type == "cuda" else cpu)

    def backbone(self, name: str) -> str:
        """A file with random weights of one of torchvision's networks, as the perceptual losses read them."""
        path = self.folder / f"{name}.pth"
        torch.save(getattr(torchvision.models, name)(weights=None).state_dict(), path)
        return str(path)

    def parse(self, bundle: str, config: str, **settings: Any) -> ConfigParser:
        """A bundle's config with other settings."""
        parser = ConfigParser()
        parser.read_config(ROOT / "bundles" / bundle / "configs" / config)
        parser.update({"bundle_root": str(ROOT / "bundles" / bundle), "device": self.device, **settings})
        return parser

    def training(self, bundle: str, config: str, batch: dict[str, Any], size: int, **settings: Any) -> Stage:
        """A step of the trainer of a bundle's config."""
        stream = Stream(size)
        fixed = {"train#dataloader": stream, "train#handlers": [], "train#trainer#components": {}, "batch_size": size}
        parser = self.parse(bundle, config, **fixed, **settings)
        if "schedule" in parser.config:
            stream.schedule = parser.get_parsed_content("schedule")
        trainer = parser.get_parsed_content("train#trainer")
        trainer.state.epoch = trainer.state.max_epochs  # all terms of the loss are in by then

        def step() -> None:
            stream.images_seen += size
            trainer.state.iteration += 1
            trainer._iteration(trainer, batch)

        return Stage([(step, 1)], size, amp=parser.get("amp", False) is True, trainer=trainer)

    def generator(self) -> LatentGenerator:
        """The progressive GAN that the inversion encoder is trained for."""
        return LatentGenerator(PGGANGenerator.from_preset("rsna_512").to(self.device))


def train_autoencoder(bench: Bench) -> Stage:
    """With discriminator and LPIPS."""
    size = bench.size(12)
    batch = {"image": torch.rand(size, 1, SIDE, SIDE)}
    settings = {"perceptual_weights": bench.backbone("squeezenet1_1")}
    stage = bench.training("cxr_autoencoder_kl", "train.json", batch, size, **settings)
    if bench.device.type == "meta":  # MONAI asks for the type's name, which such a tensor does not have
        stage.trainer.adversarial_loss.get_target_tensor = lambda x, real: torch.full_like(x, float(real))
    return stage


def train_diffusion(bench: Bench) -> Stage:
    """From cached latents and encoded captions."""
    size = bench.size(32)
    batch = {"image": torch.randn(size, 3, SIDE // 8, SIDE // 8), "sentences": [""] * size}
    settings = {"conditioner": RandomCaptions(bench.device), "train#encoder": None}
    return bench.training("cxr_latent_diffusion", "train.json", batch, size, **settings)


def encode_text(bench: Bench) -> Stage:
    """Stable Diffusion 2.1's text encoder, which each step of the diffusion's training runs once."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = bench.size(32)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    encoder = CLIPTextModel(CLIPTextConfig(**shape, hidden_act="gelu", projection_dim=512)).eval().to(bench.device)
    tokens = torch.randint(0, 49_000, (size, CAPTION[0]), device=bench.device)
    return Stage([(lambda: encoder(tokens), 1)], size)


def encode_latents(bench: Bench) -> Stage:
    """Images to latents."""
    size = bench.size(16)
    network = bench.parse("cxr_latent_diffusion", "encode.json").get_parsed_content("autoencoder_def").to(bench.device)
    images = torch.rand(size, 1, SIDE, SIDE, device=bench.device)
    return Stage([(lambda: network.encode(images), 1)], size)


def sample_diffusion(bench: Bench) -> Stage:
    """200 steps of DDIM with guidance, which is two forward passes each, and the decoder: the source's settings."""
    size = bench.size(8)
    parser = bench.parse("cxr_latent_diffusion", "inference.json")
    network = parser.get_parsed_content("network_def").to(bench.device).eval()
    autoencoder = parser.get_parsed_content("autoencoder_def").to(bench.device).eval()
    latents = torch.randn(2 * size, 3, SIDE // 8, SIDE // 8, device=bench.device)
    context = torch.randn(2 * size, *CAPTION, device=bench.device)
    times = torch.full((2 * size,), 500, device=bench.device)
    step = lambda: network(latents, timesteps=times, context=context)  # noqa: E731
    return Stage([(step, 200), (lambda: autoencoder.decode(latents[:size]), 1)], size)


def train_stylegan2(bench: Bench) -> Stage:
    """Of sixteen steps twelve are plain, three have path length regularisation, one has R1 as well."""
    size = bench.size(8, 2)
    batch = {"image": torch.rand(size, 1, SIDE, SIDE)}
    settings = {"minibatch_group_size": min(size, 4)}
    stage = bench.training("stylegan2_anomaly", "train.json", batch, size, **settings)

    def part(iteration: int, times: int) -> tuple[Callable[[], Any], float]:
        def step() -> None:
            stage.trainer.state.iteration = iteration
            stage.trainer._iteration(stage.trainer, batch)

        return step, times / 16

    stage.parts = [part(2, 12), part(5, 3), part(1, 1)]
    return stage


def project_stylegan2(bench: Bench) -> Stage:
    """1,000 steps with VGG16's features, as the source; what begins and ends a projection is taken off."""
    size = bench.size(8)
    generator = StyleGAN2Generator.from_preset("anomaly_source").to(bench.device).eval()
    loss = projection_loss(bench.backbone("vgg16")).to(bench.device)
    images = torch.rand(size, 1, SIDE, SIDE, device=bench.device)

    def part(steps: int, times: float) -> tuple[Callable[[], Any], float]:
        projector = StyleGAN2Projector(loss, steps=steps, w_avg_samples=100)
        return lambda: projector(images, generator), times

    return Stage([part(3, 1000 / 2), part(1, -1000 / 2)], size, amp=False)


def score_anomalies(bench: Bench) -> Stage:
    """Both distances over the image, the body and all patches; on the CPU everywhere."""
    images = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).numpy()
    return Stage([(lambda: score_anomaly(images[0], images[1]), 1)], 1, amp=False)


def generate_stylegan2(bench: Bench) -> Stage:
    """One forward pass."""
    size = bench.size(32)
    generator = StyleGAN2Generator.from_preset("anomaly_source").to(bench.device).eval()
    z = torch.randn(size, generator.latent_dim, device=bench.device)
    return Stage([(lambda: generator(z), 1)], size, amp=False)


def train_pggan(bench: Bench) -> Stage:
    """A step of each level, as often as the schedule of ``rsna_512`` shows images there."""
    images = pggan_setting("rsna_512", "images")
    size = bench.size(4, 4)
    stage = bench.training("cxr_pggan", "train.json", {}, size)

    def part(level: int, end: int) -> tuple[Callable[[], Any], float]:
        side = 4 * 2**level
        batch = {"image": torch.randint(0, 256, (size, 1, side, side), dtype=torch.uint8)}

        def step() -> None:
            stage.trainer.data_loader.images_seen = end
            stage.trainer._iteration(stage.trainer, batch)

        return step, images[level] / sum(images)

    stage.parts = [part(level, end) for level, end in enumerate(accumulate(images))]
    return stage


def generate_pggan(bench: Bench) -> Stage:
    """One forward pass."""
    size = bench.size(32)
    generator = bench.generator()
    z = torch.randn(size, 1, generator.z_dim, device=bench.device)
    return Stage([(lambda: generator(z), 1)], size, amp=False)


def train_bootstrap(bench: Bench) -> Stage:
    """Latents of images that the generator draws."""
    size = bench.size(16)
    batch = {"seed": torch.arange(size)}
    settings = {"generator_def": bench.generator()}
    return bench.training("cxr_inversion_encoder", "train_bootstrap.json", batch, size, **settings)


def train_encoder(bench: Bench) -> Stage:
    """On images, with AlexNet's LPIPS and ResNet-50."""
    size = bench.size(10)
    batch = {"image": torch.rand(size, 1, SIDE, SIDE)}
    settings: dict[str, Any] = {"generator_def": bench.generator(), "weights": None, "discriminator": None}
    settings |= {"perceptual_weights": bench.backbone("alexnet"), "similarity_weights": bench.backbone("resnet50")}
    return bench.training("cxr_inversion_encoder", "train.json", batch, size, **settings)


def optimise_latents(bench: Bench) -> Stage:
    """3,000 steps with the whole loss, as the source; what begins and ends an optimisation is taken off."""
    size = bench.size(32)
    parser = bench.parse(
        "cxr_inversion_encoder",
        "optimise.json",
        perceptual_weights=bench.backbone("alexnet"),
        similarity_weights=bench.backbone("resnet50"),
        discriminator=None,
    )
    loss, generator = parser.get_parsed_content("loss").to(bench.device), bench.generator()
    images = torch.rand(size, 1, SIDE, SIDE, device=bench.device)

    def part(steps: int, times: float) -> tuple[Callable[[], Any], float]:
        optimiser = LatentOptimiser(loss, generator, start="mean", steps=steps)
        return lambda: optimiser(images), times

    return Stage([part(3, 3000 / 2), part(1, -3000 / 2)], size, amp=False)


def train_segmentation(bench: Bench) -> Stage:
    """At 256×256."""
    size = bench.size(16)
    batch = {"image": torch.rand(size, 1, 256, 256), "label": (torch.rand(size, 1, 256, 256) > 0.5).float()}
    return bench.training("lung_segmentation", "train.json", batch, size)


def train_sngan(bench: Bench) -> Stage:
    """Of both classes, at 128×128."""
    size = bench.size(16)
    batch = {"image": torch.rand(size, 3, 128, 128), "label": torch.arange(size) % 2}
    settings = {"image_size": 128, "num_classes": 2, "max_images": 1_000_000, "tick_images": 1_000_000}
    settings["train#trainer#labels"] = None  # there is no datalist
    return bench.training("skin_sngan", "train.json", batch, size, **settings)


def train_classifier(bench: Bench) -> Stage:
    """In colour, at 128×128."""
    size = bench.size(32, 2)
    batch = {"image": torch.rand(size, 3, 128, 128), "label": torch.arange(size) % 2}
    return bench.training("augmentation_classifier", "train.json", batch, size, image_size=128, in_channels=3)


STAGES: dict[str, Callable[[Bench], Stage]] = {
    "cxr_autoencoder_kl.train": train_autoencoder,
    "cxr_latent_diffusion.encode": encode_latents,
    "cxr_latent_diffusion.text": encode_text,
    "cxr_latent_diffusion.train": train_diffusion,
    "cxr_latent_diffusion.sample": sample_diffusion,
    "stylegan2_anomaly.train": train_stylegan2,
    "stylegan2_anomaly.project": project_stylegan2,
    "stylegan2_anomaly.score": score_anomalies,
    "stylegan2_anomaly.generate": generate_stylegan2,
    "cxr_pggan.train": train_pggan,
    "cxr_pggan.generate": generate_pggan,
    "cxr_inversion_encoder.train_bootstrap": train_bootstrap,
    "cxr_inversion_encoder.train": train_encoder,
    "cxr_inversion_encoder.optimise": optimise_latents,
    "lung_segmentation.train": train_segmentation,
    "skin_sngan.train": train_sngan,
    "augmentation_classifier.train": train_classifier,
}


def convolution_backward(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *rest: Any, out_val: Any) -> int:
    """Operations of a convolution's backward pass: each gradient takes what the forward pass took.

    torch's own formula forgets the groups, and counts a depthwise convolution's weights by the channel too often.
    """
    transposed, wanted = rest[4], rest[7]
    positions = math.prod((x if transposed else grad).shape[2:])
    return 2 * x.shape[0] * positions * w.numel() * sum(wanted[:2])


class OperationCounter(TorchDispatchMode):
    """Counts multiplications and additions of matrices and convolutions by torch's formulas.

    Not ``FlopCounterMode``: its hooks on modules refuse double backward passes and frozen networks.
    """

    formulas: ClassVar = {**flop_registry, torch.ops.aten.convolution_backward: convolution_backward}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


def clock(device: torch.device) -> float:
    """Seconds: of this process's processor, or of the wall once the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def processor() -> str:
    """Name of the processor, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def checkpoint_bytes(trainer: GenerativeTrainer) -> int:
    """What networks, averages and optimisers take in a checkpoint; the rest is a few numbers."""
    parts = [unwrap(part) for part in trainer.components.values()]
    tensors = [t for part in parts if isinstance(part, nn.Module) for t in (*part.parameters(), *part.buffers())]
    for part in parts:
        if isinstance(part, torch.optim.Optimizer):
            tensors += [t for state in part.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(name: str, bench: Bench, rounds: int) -> dict[str, Any]:
    """Measure a stage.

    Args:
        name: of :data:`STAGES`.
        bench: where.
        rounds: how often each part is timed, after a first time in which its operations are counted; 0: the first time
            is the one that is timed, for steps of minutes.

    Returns:
        A row of ``rates.json``: ``seconds`` and ``flops`` are an image's; a training also has ``checkpoint_bytes`` and
        ``checkpoint_seconds``, wall-clock, flushed to the disk. On the meta device, which computes nothing, there are
        no seconds.
    """
    stage = STAGES[name](bench)
    seconds = flops = 0.0
    searches = ".project" in name or ".optimise" in name
    for part, times in stage.parts:
        # trainers switch to bfloat16 themselves
        with (
            torch.set_grad_enabled(stage.trainer is not None or searches),
            autocast(bench.device, stage.amp and stage.trainer is None),
        ):
            with OperationCounter() as counter:
                start = clock(bench.device)
                part()
                spent = clock(bench.device) - start
            if rounds:
                start = clock(bench.device)
                for _ in range(rounds):
                    part()
                spent = (clock(bench.device) - start) / rounds
        seconds += times * spent / stage.images
        flops += times * counter.count / stage.images
    cpu = f"one core of {processor()}, float32"
    counts = bench.device.type == "meta"
    row = {
        "seconds": None if counts else float(f"{seconds:.4g}"),
        "flops": float(f"{flops:.4g}"),
        "amp": stage.amp,
        "batch_size": stage.images,
        "hardware": torch.cuda.get_device_name() if bench.device.type == "cuda" else "none" if counts else cpu,
        "date": datetime.date.today().isoformat(),
        "command": f"python cluster/measure.py {name} "
        + ("--count" if counts else f"--rounds {rounds} --batch_size {stage.images}"),
    }
    if counts and stage.trainer is not None:
        row["checkpoint_bytes"] = checkpoint_bytes(stage.trainer)
    elif stage.trainer is not None:
        folder = bench.folder / "checkpoints"
        start = time.perf_counter()
        TrainingCheckpoint(folder).save(stage.trainer)
        row["checkpoint_seconds"] = float(f"{time.perf_counter() - start:.3g}")
        row["checkpoint_bytes"] = (folder / "last.pt").stat().st_size
    return row


def main(argv: list[str] | None = None) -> int:
    """Measure the stages that are named, and print or note their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", metavar="STAGE", help=f"all, or some of {', '.join(STAGES)}")
    parser.add_argument("--batch_size", type=int, default=0, help="images of a step; default: the bundle's on a GPU")
    parser.add_argument("--rounds", type=int, default=1, help="how often each part is timed after its first time")
    parser.add_argument("--write", nargs="?", type=Path, const=RATES, help=f"add to this file; {RATES.name} if unnamed")
    parser.add_argument("--count", action="store_true", help="count operations and bytes without computing anything")
    options = parser.parse_args(argv)
    device = torch.device("meta" if options.count else "cuda" if torch.cuda.is_available() else "cpu")
    rounds = 0 if options.count else options.rounds
    torch.set_num_threads(1)
    names = list(STAGES) if options.stages == ["all"] else options.stages
    for name in names:
        if name not in STAGES:
            raise UserError(f"expected all or stages of {', '.join(STAGES)}, got {name}; see --help")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Bench(device, Path(folder), options.batch_size), rounds)
        print(json.dumps({name: row}, indent=4), flush=True)
        if options.write:
            rates = json.loads(options.write.read_text(encoding="utf-8")) if options.write.is_file() else {}
            side = "gpu" if device.type == "cuda" and row["flops"] else "cpu"
            rates.setdefault(name, {})[side] = row
            atomic_write_text(options.write, json.dumps(dict(sorted(rates.items())), indent=4) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
