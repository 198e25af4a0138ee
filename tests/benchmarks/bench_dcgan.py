"""DCGANTrainer's images per second, engine and loader and all, against the loop of PyTorch's DCGAN example.

The example's loop is restated as a reader of it would write it: networks as sequences of torch's layers, a sigmoid at
the discriminator's end and ``BCELoss`` after it, a backward pass for the real images and one for the generated ones, a
``DataLoader`` that shuffles. Both have the same networks with the same weights at 64×64, both read the same RGB images
from memory, and one step of each is compared before they are timed, in turn.

The trainer's moving average, which the example has not, is off in the first comparison and on in the second. No round
ends an epoch, at which the trainer measures the statistics of what it saves.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from ignite.engine import Events
from monai.data import Dataset
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines import DCGANTrainer, dcgan_setting, exponential_moving_copy
from medgen.losses import AdversarialLoss
from medgen.networks import DCGANDiscriminator, DCGANGenerator
from medgen.settings import keep_freed_memory

SIDE, CHANNELS, LATENT_DIM = 64, 3, 100
ROUNDS = 7
STEPS = {"cpu": {16: 4, 128: 1}, "cuda": {16: 200, 128: 100}}  # batch size: steps in a round
# the moving average is measured once in an epoch: no round ends one
DISTINCT_IMAGES, EPOCH_IMAGES = 256, 16384
BASE_CHANNELS = dcgan_setting("dcgan", "base_channels")


def make_images() -> torch.Tensor:
    """RGB images (B, 3, 64, 64) in [0, 1]."""
    return torch.rand(DISTINCT_IMAGES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def make_adam(network: nn.Module) -> torch.optim.Adam:
    """The paper's."""
    return torch.optim.Adam(network.parameters(), lr=0.0002, betas=(0.5, 0.999))


class Trainings:
    """Both trainings on a device at a batch size, each a function of a number of steps."""

    def __init__(self, device: str, batch_size: int, ema_decay: float, amp: bool) -> None:
        self.device, self.batch_size, self.amp = torch.device(device), batch_size, amp
        self.images = make_images()
        torch.manual_seed(0)
        self.generator = DCGANGenerator(SIDE, LATENT_DIM, CHANNELS, BASE_CHANNELS).to(device)
        self.discriminator = DCGANDiscriminator(SIDE, CHANNELS, BASE_CHANNELS).to(device)
        self.ema = exponential_moving_copy(self.generator)
        self.optimizers = make_adam(self.generator), make_adam(self.discriminator)
        self.ema_decay = ema_decay
        self.plain_generator, self.plain_discriminator = self._plain_networks()
        self.plain_optimizers = make_adam(self.plain_generator), make_adam(self.plain_discriminator)

    def _plain_networks(self) -> tuple[nn.Sequential, nn.Sequential]:
        width, layers = BASE_CHANNELS, []
        for before, after in ((8, 4), (4, 2), (2, 1)):
            layers += [nn.BatchNorm2d(before * width), nn.ReLU(True)]
            layers += [nn.ConvTranspose2d(before * width, after * width, 4, 2, 1, bias=False)]
        first = nn.ConvTranspose2d(LATENT_DIM, 8 * width, 4, 1, 0, bias=False)
        last = nn.ConvTranspose2d(width, CHANNELS, 4, 2, 1, bias=False)
        generator = nn.Sequential(first, *layers, nn.BatchNorm2d(width), nn.ReLU(True), last, nn.Tanh())
        layers = [nn.Conv2d(CHANNELS, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for before, after in ((1, 2), (2, 4), (4, 8)):
            layers += [nn.Conv2d(before * width, after * width, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after * width), nn.LeakyReLU(0.2, inplace=True)]
        discriminator = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 0, bias=False), nn.Sigmoid())
        for plain, ours in ((generator, self.generator), (discriminator, self.discriminator)):
            plain.to(self.device)
            for kind, those in ((nn.modules.conv._ConvNd, ours.convs), (nn.BatchNorm2d, ours.norms)):
                for layer, other in zip([x for x in plain if isinstance(x, kind)], those, strict=True):
                    layer.load_state_dict(other.state_dict())
        return generator, discriminator

    def ours(self, steps: int) -> Callable[[], DCGANTrainer]:
        """Some steps of the trainer, which is made beforehand: its construction is not the training.

        Raises:
            RuntimeError: when called, if it made another number of steps.
        """
        items = [{"image": image} for image in self.images] * (EPOCH_IMAGES // DISTINCT_IMAGES)
        loader = ResumableDataLoader(Dataset(items), batch_size=self.batch_size, seed=0)
        trainer = DCGANTrainer(
            device=self.device,
            max_epochs=1,
            train_data_loader=loader,
            generator=self.generator,
            discriminator=self.discriminator,
            g_optimizer=self.optimizers[0],
            d_optimizer=self.optimizers[1],
            ema=self.ema,
            loss=AdversarialLoss(),
            ema_decay=self.ema_decay,
            amp=self.amp,
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=steps), trainer.terminate)

        def train() -> DCGANTrainer:
            trainer.run()
            if trainer.state.iteration != steps or trainer.at_epoch_end:
                raise RuntimeError(
                    f"{steps} steps within an epoch of {len(loader)} were to be timed, the trainer made "
                    f"{trainer.state.iteration}; raise EPOCH_IMAGES"
                )
            return trainer

        return train

    def plain(self, steps: int) -> Callable[[], None]:
        """Some steps of the example's loop."""
        images = list(self.images * 2 - 1) * (EPOCH_IMAGES // DISTINCT_IMAGES)
        loader = torch.utils.data.DataLoader(images, batch_size=self.batch_size, shuffle=True)
        return lambda: self._train_plain(itertools.islice(loader, steps))

    def _train_plain(self, batches: Iterable[torch.Tensor], z: torch.Tensor | None = None) -> None:
        generator, discriminator = self.plain_generator, self.plain_discriminator
        g_optimizer, d_optimizer = self.plain_optimizers
        criterion = nn.BCELoss()

        def judge(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                return discriminator(x).view(-1).float()  # autocast has no binary cross-entropy of probabilities

        for real in batches:
            real = real.to(self.device)
            labels = torch.full((len(real),), 1.0, device=self.device)
            discriminator.zero_grad()
            criterion(judge(real), labels).backward()
            noise = torch.randn(len(real), LATENT_DIM, 1, 1, device=self.device) if z is None else z
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                fake = generator(noise)
            labels.fill_(0.0)
            criterion(judge(fake.detach()), labels).backward()
            d_optimizer.step()
            generator.zero_grad()
            labels.fill_(1.0)
            criterion(judge(fake), labels).backward()
            g_optimizer.step()

    def check(self) -> None:
        """See that one step does the same to both networks."""
        train = self.ours(1)
        z = None

        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal z
            z = inputs[0]

        handle = self.generator.register_forward_pre_hook(note)
        engine = train()
        handle.remove()
        self._train_plain([engine.state.output[0]["image"]], z[:, :, None, None])
        for ours, plain in ((self.generator, self.plain_generator), (self.discriminator, self.plain_discriminator)):
            theirs = [layer for layer in plain if isinstance(layer, nn.modules.conv._ConvNd)]
            for layer, other in zip(ours.convs, theirs, strict=True):
                # Adam's first step is the rate times the gradient's sign, which is chance where it is nearly 0
                agree = (layer.weight - other.weight).abs() < 1e-5
                if agree.float().mean() < 0.98:
                    raise RuntimeError(f"the two loops differ after a step: {1 - agree.float().mean():.1%} of a layer")


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(device: str, batch_size: int, ema_decay: float, amp: bool) -> tuple[str, float, str]:
    """Ratio of the medians of both, taken in turn so that a busy moment of the machine meets both."""
    steps = STEPS[device][batch_size]
    trainings = Trainings(device, batch_size, ema_decay, amp)
    if not amp:
        trainings.check()
    for run in (trainings.ours(steps), trainings.plain(steps)):  # warm up
        run()
    times = [(seconds(trainings.ours(steps)), seconds(trainings.plain(steps))) for _ in range(ROUNDS)]
    ours, plain = (steps * batch_size / statistics.median(column) for column in zip(*times, strict=True))
    average = "no moving average" if not ema_decay else "moving average"
    name = f"{device}{', bfloat16' if amp else ''}, batch {batch_size}, {average}: trainer / the example's loop"
    return name, ours / plain, f"{ours:.1f} images/s against {plain:.1f}"


def run() -> Iterator[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than the example's loop.

    Yields:
        (name, ratio, detail) per comparison.
    """
    keep_freed_memory("cpu")  # as the bundle does
    devices = [("cpu", False)] + ([("cuda", False), ("cuda", True)] if torch.cuda.is_available() else [])
    for device, amp in devices:
        for batch_size in STEPS[device]:
            for ema_decay in (0.0, 0.999):
                yield compare(device, batch_size, ema_decay, amp)


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}, {detail}", flush=True)
    print("what the end of an epoch takes is in none of it: the trainer's statistics, measured on 256 latents")
    if not torch.cuda.is_available():
        print("no GPU here: the trainer was not measured on one")
