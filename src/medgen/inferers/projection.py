"""Projection of images into the latent space of a StyleGAN2 generator, a whole batch at once."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer

from medgen.data.stream import derive_seed
from medgen.errors import UserError
from medgen.inferers.descent import ADAM_BETAS, CHECK_INTERVAL, keep_rows, own_graph, plain, ramped_lr
from medgen.losses.projection import Features, PixelMSSSIMLoss, ProjectionLoss, noise_correlation
from medgen.networks.latent_generator import W_AVG_SAMPLES, W_AVG_SEED, LatentStatistics, latent_statistics
from medgen.networks.stylegan2 import StyleGAN2Generator, SynthesisNetwork, class_vectors
from medgen.output import atomic_file
from medgen.settings import check_between, check_whole

__all__ = ["StyleGAN2Projector"]

# Legend of the shape suffixes: B images that are still being projected, L styles of W+ (1 for the space W), W width of
# W. "Rows" are the parameters of the B images, a row each: L · W numbers and the pixels of all its noise maps.

# StyleGAN2, appendix D, as published with StyleGAN2-ADA
STEPS = 1000
INITIAL_LR = 0.1
LR_RAMP_UP, LR_RAMP_DOWN = 0.05, 0.25  # shares of the steps: linear at the start, cosine at the end
INITIAL_NOISE_FACTOR = 0.05  # of the deviation of w
NOISE_RAMP = 0.75  # share of the steps in which w is disturbed
NOISE_REGULARISATION = 1e5
RUN_SEED = 303  # Woodland et al.

STEPS_AT_ONCE = 64  # steps whose disturbances of w are drawn together; no setting: it is part of the random sequence
SPACES = ("w", "w+")
RENDER_NOISE = ("optimised", "const")
LARGEST = 1e12  # of a factor: far beyond any use, far below what float32 can hold


class StyleGAN2Projector(Inferer):
    """Finds w and noise maps whose image is nearest to a given one. StyleGAN2 (arXiv 1912.04958), appendix D.

    All images of a batch are optimised at once. Their losses are summed, Adam's steps are taken for each number by
    itself, and random numbers depend on ``seed`` and the image's own pixels: nothing of an image's result comes from
    the others of its batch, and an image that has stopped leaves it. The same batch size gives the same bits. Another
    one rounds sums in another order, and the steps amplify that: four radiographs in one batch and each alone, under a
    generator of radiographs with 64×64 pixels on a CPU, differed after 300 steps by up to 0.16 in w, 3.6 of 255 levels
    in a pixel and 0.44 % in the mean square error, and after 1,000 steps by up to 0.98, 18.5 levels and 1.7 %. Images
    that are to be compared have to be projected with one batch size.

    The learning rate rises linearly from 0, so that the first step changes nothing but Adam's moments, and falls along
    a cosine at the end, as published. The result is the last step's, not the best one's, as published as well: at the
    end of the schedule both are the same but for chance, and the best of many noisy values would flatter.

    An image stops early where the mean loss of its last ``patience`` steps is not below ``1 - min_improvement`` times
    the mean of the ``patience`` steps before. Means, because the disturbance of w makes single losses jump. The
    image then lacks the ramp-down of the learning rate and is a little worse than it could be.

    Args:
        loss: distance of images; default: :class:`~medgen.losses.PixelMSSSIMLoss`.
        space: "w": one w for all layers, as published; "w+": one for each layer, which comes nearer to any image, to
            what is wrong with it as well.
        steps: of the optimiser.
        initial_lr: the highest learning rate.
        noise_regularisation: weight of the noise maps' autocorrelation.
        initial_noise_factor: disturbance of w at the start, relative to the deviation of w.
        noise_ramp: share of the steps after which w is not disturbed any more.
        optimise_noise: whether noise maps are found as well; False keeps the model's own.
        render_noise: "optimised": the reconstruction is made with the maps found; "const": with the model's own, as
            the source did by mistake (it optimised a copy).
        patience: steps of each of the two means that an early stop compares; 0 for all steps.
        min_improvement: share by which the mean loss must fall.
        w_avg_samples: latents drawn for the mean and the deviation of w.
        w_avg_seed: seed of those latents.
        w_statistics_dir: folder in which the mean and the deviation are kept, under the digest of the mapping network;
            None for the memory of this object alone.
        seed: of noise maps and disturbances, together with each image's pixels.
        compile: whether the loss of a step runs under ``torch.compile``. Worth its minute of compilation on a GPU and
            many images.

    Raises:
        UserError: a setting outside its range.
    """

    def __init__(
        self,
        loss: ProjectionLoss | None = None,
        space: str = "w",
        steps: int = STEPS,
        initial_lr: float = INITIAL_LR,
        noise_regularisation: float = NOISE_REGULARISATION,
        initial_noise_factor: float = INITIAL_NOISE_FACTOR,
        noise_ramp: float = NOISE_RAMP,
        optimise_noise: bool = True,
        render_noise: str = "optimised",
        patience: int = 0,
        min_improvement: float = 0.01,
        w_avg_samples: int = W_AVG_SAMPLES,
        w_avg_seed: int = W_AVG_SEED,
        w_statistics_dir: str | Path | None = None,
        seed: int = RUN_SEED,
        compile: bool = False,
    ) -> None:
        for name, value, allowed in (("space", space, SPACES), ("render_noise", render_noise, RENDER_NOISE)):
            if value not in allowed:
                raise UserError(f"{name} must be {' or '.join(allowed)}, got {value!r}; set {name} to {allowed[0]}")
        check_whole(steps=steps, w_avg_samples=w_avg_samples)
        check_whole(0, patience=patience, seed=seed, w_avg_seed=w_avg_seed)
        check_between(
            0,
            LARGEST,
            initial_lr=initial_lr,
            noise_regularisation=noise_regularisation,
            initial_noise_factor=initial_noise_factor,
        )
        check_between(0, 1, noise_ramp=noise_ramp, min_improvement=min_improvement)
        self.loss = PixelMSSSIMLoss() if loss is None else loss
        self.space, self.steps, self.initial_lr = space, steps, initial_lr
        self.noise_regularisation, self.initial_noise_factor = noise_regularisation, initial_noise_factor
        self.noise_ramp, self.optimise_noise, self.render_noise = noise_ramp, optimise_noise, render_noise
        self.patience, self.min_improvement, self.seed = patience, min_improvement, seed
        self.w_avg_samples, self.w_avg_seed = w_avg_samples, w_avg_seed
        self.w_statistics_dir = None if w_statistics_dir is None else Path(w_statistics_dir)
        #: called after each step with the step's number from 1 and the images still in the batch
        self.on_step: Callable[[int, int], None] | None = None
        self._statistics: dict[str, LatentStatistics] = {}
        self._objective = torch.compile(_objective) if compile else _objective

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on but the image and the generator; plain values."""
        names = (
            "space", "steps", "initial_lr", "noise_regularisation", "initial_noise_factor", "noise_ramp",
            "optimise_noise", "render_noise", "patience", "min_improvement", "w_avg_samples", "w_avg_seed", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | self.loss.settings

    def schedule(self, step: int) -> tuple[float, float]:
        """Learning rate, and disturbance of w in units of its deviation, at a step counted from 0."""
        lr = ramped_lr(step, self.steps, self.initial_lr, LR_RAMP_UP, LR_RAMP_DOWN)
        remaining = max(0.0, 1 - step / self.steps / self.noise_ramp) if self.noise_ramp else 0.0
        return lr, self.initial_noise_factor * remaining**2

    def __call__(
        self,
        inputs: torch.Tensor,
        network: StyleGAN2Generator,
        labels: torch.Tensor | None = None,
        initial_w: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Project a batch.

        Works under ``no_grad``, ``inference_mode`` and autocast, as evaluators use them, in float32 but for the layers
        that the generator itself runs in bfloat16. The generator's weights get no gradient.

        Args:
            inputs: images (B, C, H, W) in [0, 1], of the generator's size and channels.
            network: the generator.
            labels: classes (B,) or (B, K) for a generator with classes; the mean of w is then the class's.
            initial_w: where to start, (B, W) or for the space "w+" also (B, L, W), such as an encoder's estimate;
                None: the mean.

        Returns:
            ``reconstruction`` (B, C, H, W) in [0, 1], clipped; ``w`` (B, L, W), for the space "w" L times the same;
            ``noise``, a list of maps (B, 1, H, W); ``loss_curve`` (B, steps), the loss at each step, w disturbed and
            without the regulariser, NaN after an image has stopped; ``steps`` (B,), taken; ``distance`` (B,), the loss
            of the reconstruction, not finite for an image whose projection diverged: such a one does not disturb the
            others. All on the device of the images.

        Raises:
            UserError: shapes do not fit.
        """
        with own_graph(inputs.device, network):
            return self._project(plain(inputs), network, labels, initial_w)

    def _project(
        self,
        target: torch.Tensor,
        network: StyleGAN2Generator,
        labels: torch.Tensor | None,
        initial_w: torch.Tensor | None,
    ) -> dict[str, Any]:
        layout = _Layout(network.synthesis, self.space == "w+", self.optimise_noise)
        layout.check(target)
        device = target.device
        statistics = self._statistics_of(network, labels, len(target))
        w_std_B = torch.tensor([each.std for each in statistics], device=device)
        generators = [torch.Generator().manual_seed(_image_seed(self.seed, image)) for image in target]
        noise = [torch.stack([torch.randn(n, generator=g) for g in generators]).to(device) for n in layout.parts[1:]]
        start_BLW = self._start(layout, statistics, initial_w).to(device)
        rows = torch.cat([start_BLW.flatten(1), *noise], 1).requires_grad_()
        optimizer = torch.optim.Adam([rows], lr=self.initial_lr, betas=ADAM_BETAS, fused=True)

        features = self.loss.prepare(target)
        final = rows.detach().clone()
        curve = target.new_full((len(target), self.steps), torch.nan)
        taken = torch.zeros(len(target), dtype=torch.long, device=device)
        here = torch.arange(len(target), device=device)  # which images the rows belong to
        for step in range(self.steps):
            lr, disturbance = self.schedule(step)
            shift = target.new_zeros(len(here), layout.parts[0])
            if disturbance:
                if step % STEPS_AT_ONCE == 0:
                    drawn = [torch.randn(STEPS_AT_ONCE, layout.parts[0], generator=g) for g in generators]
                    draws = torch.stack(drawn).to(device)
                shift = draws[:, step % STEPS_AT_ONCE] * (w_std_B * disturbance)[:, None]
            total, distance_B = self._objective(rows, shift, layout, self.loss, features, self.noise_regularisation)
            (rows.grad,) = torch.autograd.grad(total, rows)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            with torch.no_grad():
                for noise_map in layout.maps(rows):
                    noise_map -= noise_map.mean((2, 3), keepdim=True)
                    noise_map *= noise_map.square().mean((2, 3), keepdim=True).rsqrt()
                curve[here, step] = distance_B.detach()
            if self.on_step is not None:
                self.on_step(step + 1, len(here))
            last = step + 1 == self.steps
            if not last and not self._is_due(step + 1):
                continue
            stopped = torch.ones_like(here, dtype=torch.bool) if last else self._on_plateau(curve[here, : step + 1])
            taken[here[stopped]] = step + 1
            final[here[stopped]] = rows.detach()[stopped]
            kept = (~stopped).nonzero()[:, 0]
            if not len(kept):
                break
            if len(kept) < len(here):
                rows = keep_rows(optimizer, kept)
                features = tuple(part[kept] for part in features)
                generators = [generators[row] for row in kept.tolist()]
                w_std_B, here = w_std_B[kept], here[kept]
                if disturbance:
                    draws = draws[kept]
        return self._result(final, target, network, layout) | {"loss_curve": curve, "steps": taken}

    def _is_due(self, step: int) -> bool:
        """Whether plateaus are looked for after so many steps."""
        return self.patience > 0 and step >= 2 * self.patience and step % CHECK_INTERVAL == 0

    def _on_plateau(self, curve: torch.Tensor) -> torch.Tensor:
        """Which of the images stop, given their losses so far."""
        before, last = curve[:, -2 * self.patience :].unflatten(1, (2, self.patience)).mean(2).unbind(1)
        return last >= before * (1 - self.min_improvement)

    def _result(
        self, final: torch.Tensor, target: torch.Tensor, network: StyleGAN2Generator, layout: _Layout
    ) -> dict[str, Any]:
        with torch.no_grad():
            ws_BLW = layout.ws(final).contiguous()
            maps = [noise_map.contiguous() for noise_map in layout.maps(final)]
            rendered = network.synthesis(ws_BLW, maps if maps and self.render_noise == "optimised" else "const")
            reconstruction = _unit_range(rendered).clamp(0, 1)
            distance_B = self.loss(reconstruction, self.loss.prepare(target))
            own = [layer.noise for block in network.synthesis.blocks for layer in block.convolutions()]
            noise = maps or [noise_map.expand(len(target), 1, -1, -1).clone() for noise_map in own]
        return {"reconstruction": reconstruction, "w": ws_BLW, "noise": noise, "distance": distance_B}

    def _start(
        self, layout: _Layout, statistics: Sequence[LatentStatistics], initial_w: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, L, W)."""
        if initial_w is None:
            return torch.stack([each.mean for each in statistics])[:, None].expand(-1, layout.layers, -1)
        shapes = [(len(statistics), layout.w_dim)]
        if self.space == "w+":
            shapes.append((len(statistics), layout.layers, layout.w_dim))
        if tuple(initial_w.shape) not in shapes:
            raise UserError(
                f"initial_w must have shape {' or '.join(map(str, shapes))} for the space {self.space}, got "
                f"{tuple(initial_w.shape)}; set space to w+ for one w for each layer"
            )
        start = plain(initial_w)
        return start if start.ndim == 3 else start[:, None].expand(-1, layout.layers, -1)

    def _statistics_of(
        self, network: StyleGAN2Generator, labels: torch.Tensor | None, batch_size: int
    ) -> list[LatentStatistics]:
        """For each image that of its class; computed once for a mapping network and a class."""
        classes_BK = class_vectors(labels, network.num_classes, batch_size)
        vectors = [None] * batch_size if classes_BK is None else classes_BK.float()
        weights = _digest(network.mapping_network.state_dict().values())
        found = []
        for vector in vectors:
            label = "" if vector is None else f"-{_digest([vector])[:16]}"
            name = f"{weights}{label}-{self.w_avg_samples}-{self.w_avg_seed}"
            if name not in self._statistics:
                self._statistics[name] = self._read_or_compute(name, network, vector)
            found.append(self._statistics[name])
        return found

    def _read_or_compute(self, name: str, network: StyleGAN2Generator, label: torch.Tensor | None) -> LatentStatistics:
        path = None if self.w_statistics_dir is None else self.w_statistics_dir / f"{name}.npz"
        if path is not None and path.is_file():
            # a file that a full disk cut off is written anew
            with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(path, allow_pickle=False) as file:
                mean, std = file["mean"], float(file["std"])
                if mean.shape == (network.w_dim,) and mean.dtype == np.float32:
                    return LatentStatistics(torch.from_numpy(mean), std)
        statistics = latent_statistics(network, label, self.w_avg_samples, self.w_avg_seed)
        if path is not None:
            with atomic_file(path) as file:
                np.savez(file, mean=statistics.mean.numpy(), std=np.float64(statistics.std))
        return statistics


class _Layout:
    """How the parameters of an image, a row, are made up: w or W+ first, then its noise maps.

    Args:
        synthesis: the synthesis network.
        extended: W+ instead of W.
        with_noise: whether the noise maps are parameters.
    """

    def __init__(self, synthesis: SynthesisNetwork, extended: bool, with_noise: bool) -> None:
        self.synthesis = synthesis
        self.layers, self.w_dim = synthesis.num_ws if extended else 1, synthesis.w_dim
        self.sizes = synthesis.noise_sizes if with_noise else []
        self.parts = [self.layers * self.w_dim, *(height * width for height, width in self.sizes)]

    def check(self, images: torch.Tensor) -> None:
        """Refuse images that the network could not make."""
        expected = (self.synthesis.blocks[-1].to_image.bias.numel(), *self.synthesis.noise_sizes[-1])
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"images to be projected must have shape (B, {', '.join(map(str, expected))}), got "
                f"{tuple(images.shape)}; resize them, or use the preset and in_channels of the weights"
            )

    def ws(self, rows: torch.Tensor, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
        """(B, num_ws, W)."""
        w = rows[:, : self.parts[0]] + shift
        return w.unflatten(1, (self.layers, self.w_dim)).expand(-1, self.synthesis.num_ws, -1)

    def maps(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Views (B, 1, H, W) of the noise maps."""
        _, *maps = rows.split(self.parts, 1)
        return [noise.unflatten(1, (1, *size)) for noise, size in zip(maps, self.sizes, strict=True)]


def _objective(
    rows: torch.Tensor,
    shift: torch.Tensor,
    layout: _Layout,
    loss: ProjectionLoss,
    features: Features,
    noise_regularisation: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum that is minimised, and the distance (B,) of each image in it."""
    maps = layout.maps(rows)
    images = layout.synthesis(layout.ws(rows, shift), maps or "const")
    distance_B = loss(_unit_range(images), features)
    total = distance_B.sum()
    if maps:
        total = total + noise_regularisation * noise_correlation(maps).sum()
    return total, distance_B


def _unit_range(images: torch.Tensor) -> torch.Tensor:
    """The generator's [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(f"{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _image_seed(seed: int, image: torch.Tensor) -> int:
    """From the image itself: its name, place in the datalist and batch change nothing."""
    return derive_seed(seed, int(_digest([image])[:16], 16))
