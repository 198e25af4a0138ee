"""Images made from the latents of patients: mixtures of their styles, ways between them, and what lies around one."""

from __future__ import annotations

import csv
import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
import torch
from PIL import Image
from torch.nn import functional as F

from medgen.apps.derived import SUFFIXES, check_space, derived_item, derived_record, save_derived
from medgen.data import begin_generation, check_format, derive_seed, pending_groups, write_datalist
from medgen.errors import UserError
from medgen.handlers import check_animation_name, save_grid, write_animation
from medgen.inferers import draw_latents, parse_numbers, walk_positions
from medgen.inferers.generation import NOISE_STREAM
from medgen.inferers.latent_walk import slerp, walk_segments
from medgen.metrics.diversity import ms_ssim
from medgen.metrics.paired import PAIRED_METRICS
from medgen.networks import LatentGenerator
from medgen.output import atomic_file
from medgen.settings import check_between

if TYPE_CHECKING:
    from medgen.data.embedding import Embedding

__all__ = ["MODES", "StylisedSet", "select_images", "step_aside"]

MODES = ("mix", "interpolate", "around")
# StyleGAN, figure 3: styles of 4² and 8², of 16² and 32², and of what is finer
STYLES = {"coarse": range(4), "middle": range(4, 8), "fine": range(8, 64)}
SHOWN_AROUND, SMALLEST_TILE = 8, 128  # of pictures: samples in a row, pixels of a tile


def select_images(embedding: Embedding, images: Any, setting: str = "images") -> list[int]:
    """Which latents of an embedding are meant.

    Args:
        embedding: the latents.
        images: names and indices: ``"a.png,b.png"``, ``3``, ``["sub/a.png", 7]``. A name is the path in the datalist,
            or the end of one that no other image has: the file's name, with its suffix or without.
        setting: name of the setting, for messages.

    Returns:
        Indices, in the order given, each once.

    Raises:
        UserError: none given, an unknown name, with the closest ones, or one that several images have.
    """
    if isinstance(images, str):
        images = images.split(",")
    wanted = list(images) if isinstance(images, Sequence) else [images]
    names = [item["image"] for item in embedding.items]
    if not wanted or images is None:
        raise UserError(
            f"{setting} must name images of the embedding, such as {PurePosixPath(names[0]).name} or 0, got none; set "
            f"--{setting}"
        )
    return list(dict.fromkeys(_index(name, names, setting) for name in wanted))


def _index(name: Any, names: Sequence[str], setting: str) -> int:
    text = str(name).strip()
    if text in names:
        return names.index(text)
    paths = [PurePosixPath(entry) for entry in names]
    found = [i for i, path in enumerate(paths) if f"/{path}".endswith(f"/{text}") or path.stem == text]
    if len(found) > 1:
        raise UserError(
            f"{setting} must name one image each, {text!r:.80} is the name of {len(found)}, among them "
            f"{names[found[0]]} and {names[found[1]]}; write the path as in the datalist"
        )
    if found:
        return found[0]
    if text.isascii() and text.isdecimal():
        if int(text) < len(names):
            return int(text)
        raise UserError(f"{setting} must be names or indices from 0 to {len(names) - 1}, got {text}; set --{setting}")
    known = [path.name for path in paths]
    close = difflib.get_close_matches(text, [*known, *names], n=3, cutoff=0) or known[:3]
    raise UserError(f"no image {text!r:.80} in the embedding; the closest are {', '.join(close)}; set --{setting}")


def step_aside(
    latents: torch.Tensor,
    generator: LatentGenerator,
    z: torch.Tensor,
    sigma: float,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents at a distance from others, each towards a random one.

    On the sphere of Z the way is the great circle whose direction is the part of z that is perpendicular to the latent,
    and the distance an angle, ``atan(sigma)``: as in adding noise of that spread to a latent of many numbers and
    normalising, but the same for every z. Sigma 1 are 45 degrees; two random latents are about 90 apart. The numbers of
    a class keep their proportions.

    In W and W+ the way is the straight line towards the w of z, and the distance sigma times the spread of random
    latents; two of them are about 1.4 apart. W is no ball, its spread lies along few principal axes. Differences
    of random latents lie along these, too, in their proportions. Isotropic noise spends its length on the others, where
    the generator was never trained: at the same distance it changes the image less and spoils it more. Noise with the
    covariance of random latents keeps to the axes, but leads outwards as often as not.

    Args:
        latents: (B, L, D).
        generator: theirs.
        z: (B, Z), N(0, 1).
        sigma: from 0, which gives the latents, to 1.
        labels: class indices (B,) of the random latents, for a generator with classes in W or W+.

    Returns:
        (B, L, D).
    """
    if not generator.is_spherical:
        way = generator.from_z(z, labels) - latents
        return latents + sigma * generator.std * way / way.square().mean((1, 2), keepdim=True).sqrt()
    start = generator.nearest(latents)[:, 0]
    noise = F.pad(z, (0, start.shape[1] - z.shape[1]))
    aside = noise - (noise * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True) * start
    aside = aside * (start.norm(dim=1, keepdim=True) / aside.norm(dim=1, keepdim=True))
    angle = math.atan(sigma)
    return generator.nearest((math.cos(angle) * start + math.sin(angle) * aside)[:, None])


class StylisedSet:
    """Images made from the latents of patients, below ``output_dir``, each marked as synthetic.

    - ``mix``: styles of the patients in ``columns`` in the place of those in ``images``, layer by layer (StyleGAN,
      figure 3); of latents in w or w+. ``images/mix_*.png`` are grids, given styles on top, kept ones on the left.
    - ``interpolate``: from patient to patient, on great circles in z, in straight lines in w and w+; all frames, and
      ``images/interpolation.gif``.
    - ``around``: samples at a distance from a patient, :func:`step_aside`; ``distances.csv`` says how far each is from
      the patient's reconstruction, ``images/around.png`` shows it first in each row.

    Samples go to ``samples/``, rendered by the caller and written by :meth:`save`. ``generation.json`` holds the
    settings that decide the pixels. ``datalist.json`` says of each image that it is synthetic, from which images of
    which patients it was made, and by which generator. These images show patients: they are not anonymous, and a study
    that tests on one of the patients must not train on them. What lies around one patient has one synthetic patient;
    so have all mixtures, or all frames, of a set: a split by patient keeps together what was made from the same.

    Args:
        embedding: latents of real images.
        generator: theirs.
        output_dir: the folder.
        mode: one of :data:`MODES`.
        images: patients, by :func:`select_images`.
        columns: patients whose styles are given; None for ``images``.
        layers: styles that are given, from 0, the coarsest; None for three groups in turn: coarse, middle and fine.
        frames: of an interpolation.
        closed: whether it returns to its beginning.
        seeds: of the samples around each patient.
        sigma: their distance, from 0 to 1.
        file_format: ``png`` or ``dicom``.
        batch_size: images generated together; a resumed run makes the same batches again.
        resume: keep what is there and make the rest; False refuses a folder that holds samples.
        modality: of the datalist.
        file_name: of the animation.
        fps: its frames a second.

    Attributes:
        generator: the one that renders: of w+ where styles of w are mixed.
        items: all samples, with ``latent`` (L, D), ``name``, and the indices of their ``sources``.
        todo: those that are to be made, with ``latent`` and ``name``.

    Raises:
        UserError: a setting that is none, or that the space does not allow; unknown images; or a folder that holds
            samples already.
    """

    def __init__(
        self,
        embedding: Embedding,
        generator: LatentGenerator,
        output_dir: str | os.PathLike[str],
        mode: str,
        images: Any,
        columns: Any = None,
        layers: Any = None,
        frames: int = 25,
        closed: bool = False,
        seeds: Any = "0-15",
        sigma: float = 0.3,
        file_format: str = "png",
        batch_size: int = 8,
        resume: bool = False,
        modality: str = "unknown",
        file_name: str = "interpolation.gif",
        fps: float = 10,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}; set --mode")
        check_space(embedding, generator)
        check_format(file_format, tuple(SUFFIXES))
        check_animation_name(file_name)
        self.embedding, self.generator, self.mode = embedding, generator, mode
        self.output_dir, self.resume, self.modality = Path(output_dir), resume, modality
        self.file_name, self.fps, self.file_format = file_name, fps, file_format
        self.rows = select_images(embedding, images)
        self.columns = self.rows if columns is None else select_images(embedding, columns, "columns")
        self.settings: dict[str, Any] = {}
        if mode == "mix":
            self.items = self._mixtures(layers)
        elif mode == "interpolate":
            self.items = self._frames(frames, closed)
        else:
            self.items = self._samples(parse_numbers(seeds, "seeds"), sigma)
        self.settings["file_format"] = file_format
        todo = pending_groups(self.items, self._is_there, batch_size, resume)
        self.todo = [{"latent": item["latent"], "name": item["name"]} for item in todo]
        self._listed = {item["name"]: self._datalist_item(item) for item in self.items}

    # -------------------------------------------------------------- what to make

    def _latents(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, L, D), on the generator's device; of w+ where the generator is."""
        latents = torch.from_numpy(self.embedding.latents[list(indices)]).to(self.generator.mean.device)
        return latents.expand(-1, self.generator.latent_shape[0], -1)

    def _item(self, name: str, latent: torch.Tensor, sources: Iterable[int], **more: Any) -> dict[str, Any]:
        return {"name": name, "latent": latent.cpu(), "sources": list(dict.fromkeys(sources)), **more}

    def _mixtures(self, layers: Any) -> list[dict[str, Any]]:
        if self.generator.space == "z":
            raise UserError(
                "mode mix replaces styles layer by layer, for which latents must be of w or w+, got z, which has one "
                "style; in z set --mode interpolate or --mode around"
            )
        if self.generator.space == "w":
            device = self.generator.mean.device
            self.generator = LatentGenerator(self.generator.network, "w+", self.generator.sha256).to(device)
        last = self.generator.latent_shape[0] - 1
        groups = {name: [layer for layer in group if layer <= last] for name, group in STYLES.items()}
        if layers is not None:
            groups = {"styles": parse_numbers(layers, "layers", last)}
        self.groups = {name: group for name, group in groups.items() if group}
        self.settings |= {"columns": self._names(self.columns), "styles": self.groups}
        items = []
        for name, group in self.groups.items():
            for row in self.rows:
                for column in self.columns:
                    if row == column:
                        continue  # the patient's own reconstruction is no mixture
                    latent = self._latents([row])[0].clone()
                    latent[group] = self._latents([column])[0, group]
                    items.append(self._item(f"{name}_{row:04d}_{column:04d}", latent, [row, column], styles=group))
        if not items:
            raise UserError("mode mix takes two or more patients, got one; set --images to two names")
        return items

    def _frames(self, frames: int, closed: bool) -> list[dict[str, Any]]:
        if len(self.rows) < 2:
            raise UserError("mode interpolate takes two or more patients, got one; set --images to two names")
        positions = torch.tensor(walk_positions(len(self.rows), frames, closed), dtype=torch.float64)
        start, end, t = walk_segments(positions, len(self.rows))
        anchors = self._latents(self.rows)
        a, b, way = anchors[start], anchors[end], t.to(anchors.device)
        if self.generator.is_spherical:
            latents = self.generator.nearest(slerp(a[:, 0], b[:, 0], way)[:, None])
        else:
            latents = torch.lerp(a, b, way[:, None, None])
        self.settings |= {"frames": frames, "closed": closed}
        return [
            self._item(
                f"frame_{number:04d}",
                latents[number],
                [self.rows[start[number]]] + [self.rows[end[number]]] * bool(t[number] > 0),
                position=round(positions[number].item(), 6),
            )
            for number in range(len(positions))
        ]

    def _samples(self, seeds: Sequence[int], sigma: float) -> list[dict[str, Any]]:
        check_between(0, 1, sigma=sigma)
        seeds = list(dict.fromkeys(seeds))
        # of the seeds themselves, the z of a synthetic image that has one of them would be its own noise
        z = draw_latents([derive_seed(seed, NOISE_STREAM) for seed in seeds], self.generator.z_dim)
        z = z.to(self.generator.mean.device)
        self.settings |= {"seeds": seeds, "sigma": sigma}
        items = []
        for row in self.rows:
            with torch.no_grad():
                near = step_aside(self._latents([row] * len(seeds)), self.generator, z, sigma, self._labels(row, z))
            for seed, latent in zip(seeds, near, strict=True):
                items.append(self._item(f"image{row:04d}_seed{seed:06d}", latent, [row], seed=seed))
        return items

    def _labels(self, row: int, z: torch.Tensor) -> torch.Tensor | None:
        """The patient's class (B,), which random latents in W must have as well."""
        classes = self.generator.num_classes
        if not classes or self.generator.is_spherical:
            return None
        label = self.embedding.items[row].get("label")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise UserError(
                f"a sample around {self.embedding.items[row]['image']} needs its class from 0 to {classes - 1}, got "
                f"{label!r}; give its item a label in the datalist of the embedding"
            )
        return torch.full((len(z),), label, device=z.device)

    # -------------------------------------------------------------- the folder

    @property
    def folder(self) -> Path:
        """Where the samples are."""
        return self.output_dir / "samples"

    @property
    def record(self) -> dict[str, Any]:
        """All that decides the pixels."""
        latents = self.embedding.latents[[*self.rows, *self._columns_used()]]
        return derived_record(self.embedding, self.generator, self.mode, self.rows, latents, **self.settings)

    @property
    def summary(self) -> str:
        """What was made, and where."""
        return (
            f"{len(self.items)} images in {self.folder}, {len(self.todo)} of them new; datalist.json and images/ "
            "beside them; they show patients and are not anonymous"
        )

    def begin(self) -> None:
        """Record the settings, or see that they are those of the samples that are there.

        Raises:
            UserError: they are others.
        """
        begin_generation(self.output_dir, self.folder, self.record, self.resume)

    def save(self, data: Mapping[str, Any]) -> None:
        """Write a sample.

        Args:
            data: ``name`` of the sample, and its image ``pred`` (C, H, W) in [0, 1].
        """
        save_derived(self.output_dir, self._listed[data["name"]], self.record, self.file_format, data["pred"])

    def finish(self) -> None:
        """Write the datalist, the pictures and the distances, once all samples are there."""
        write_datalist(
            self.output_dir / "datalist.json",
            f"synthetic: {self.mode}",
            self.modality,
            {"training": list(self._listed.values())},
            generation=self.record,
        )
        made = {item["name"]: self._read(item["name"]) for item in self.items}
        if self.mode == "mix":
            self._draw_mixtures(made)
        elif self.mode == "interpolate":
            frames = [(image * 255).round().to(torch.uint8).numpy() for image in made.values()]
            frames = [frame[0] if len(frame) == 1 else frame.transpose(1, 2, 0).copy() for frame in frames]
            write_animation(self.output_dir / "images" / self.file_name, frames, self.fps)
        else:
            self._draw_around(made)
            self._write_distances(made)

    def _columns_used(self) -> list[int]:
        return self.columns if self.mode == "mix" else []

    def _names(self, indices: Iterable[int]) -> list[str]:
        return [self.embedding.items[i]["image"] for i in indices]

    def _datalist_item(self, item: Mapping[str, Any]) -> dict[str, Any]:
        # mixtures, and frames, pass over into each other; what lies around two patients does not
        among = item["sources"] if self.mode == "around" else [*self.rows, *self._columns_used()]
        sources, among = ([self.embedding.items[i] for i in indices] for indices in (item["sources"], among))
        how = {key: item[key] for key in ("seed", "position", "styles") if key in item}
        return derived_item(self._file(item["name"]), sources, among, self.generator.sha256, **how)

    def _file(self, name: str) -> str:
        return f"{self.folder.name}/{name}{SUFFIXES[self.file_format]}"

    def _is_there(self, item: dict[str, Any]) -> bool:
        return (self.output_dir / self._file(item["name"])).is_file()

    def _read(self, name: str) -> torch.Tensor:
        """A sample (C, H, W) in [0, 1]: what is on the disk is what a person should see."""
        path = self.output_dir / self._file(name)
        # not by the collection's reader, which stretches a DICOM picture without a window to its own range
        pixels = pydicom.dcmread(path).pixel_array if path.suffix == ".dcm" else np.array(Image.open(path))
        return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1) / np.float32(255))

    @torch.no_grad()
    def _reconstructions(self, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """Images (C, H, W) of patients' latents, in 8 bits as the samples are."""
        images = {i: self.generator(self._latents([i]))[0].cpu() for i in dict.fromkeys(indices)}
        return {i: (image.clamp(0, 1) * 255).round() / 255 for i, image in images.items()}

    # -------------------------------------------------------------- pictures

    def _draw_mixtures(self, made: dict[str, torch.Tensor]) -> None:
        own = self._reconstructions([*self.rows, *self.columns])
        white = torch.ones_like(own[self.rows[0]])
        for name, group in self.groups.items():
            grid = [torch.stack([white, *(own[column] for column in self.columns)])]
            for row in self.rows:
                mixed = [
                    own[row] if row == column else made[f"{name}_{row:04d}_{column:04d}"] for column in self.columns
                ]
                grid.append(torch.stack([own[row], *mixed]))
            kind = name if name == "styles" else f"{name} styles"
            text = f"synthetic: {kind} {_span(group)} from the top row"
            save_grid(_enlarged(grid), self.output_dir / "images" / f"mix_{name}.png", gap=4, caption=text)

    def _draw_around(self, made: dict[str, torch.Tensor]) -> None:
        own = self._reconstructions(self.rows)
        seeds = self.settings["seeds"][:SHOWN_AROUND]
        grid = [
            torch.stack([own[row], *(made[f"image{row:04d}_seed{seed:06d}"] for seed in seeds)]) for row in self.rows
        ]
        caption = f"synthetic: patient | around it, sigma {self.settings['sigma']:g}"
        save_grid(_enlarged(grid), self.output_dir / "images" / "around.png", gap=4, caption=caption)

    def _write_distances(self, made: dict[str, torch.Tensor]) -> None:
        """How far each sample is from the patient: its latent in units of the spread, its image in MSE and MS-SSIM."""
        own = self._reconstructions(self.rows)
        has_ms_ssim = min(self.generator.image_size) >= PAIRED_METRICS["ms_ssim"].min_side
        with atomic_file(self.output_dir / "distances.csv", "w") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", "image", "seed", "latent_distance", "mse", *["ms_ssim"] * has_ms_ssim])
            for item in self.items:
                row = item["sources"][0]
                truth = self._latents([row])
                apart = self.generator.relative_error(item["latent"][None].to(truth.device), truth).sqrt().item()
                image, reference = made[item["name"]][None], own[row][None]
                values = [apart, (image - reference).square().mean().item()]
                values += [ms_ssim(image, reference).item()] if has_ms_ssim else []
                names = [self._file(item["name"]), self.embedding.items[row]["image"]]
                table.writerow([*names, item["seed"], *(f"{value:.6g}" for value in values)])


def _span(group: Sequence[int]) -> str:
    """Numbers as a text: 0-3, or 0, 2, 5."""
    is_range = len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1))
    return f"{group[0]}-{group[-1]}" if is_range else ", ".join(map(str, group))


def _enlarged(grid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rows (N, C, H, W) of images that a person can see: small ones by a whole factor."""
    factor = max(1, -(-SMALLEST_TILE // min(grid[0].shape[2:])))
    return [F.interpolate(row, scale_factor=factor, mode="nearest") for row in grid]
