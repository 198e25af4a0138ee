"""Services that take images: reconstruction, inversion, segmentation, classification, anomaly scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.utils import convert_to_numpy
from torch import nn

from medgen.data.stream import derive_seed
from medgen.errors import UserError
from medgen.inferers import AutoencoderKLInferer, InversionInferer, SegmentationInferer, StyleGAN2Projector
from medgen.networks import LatentEncoder, LatentGenerator
from medgen.output import plain_json
from medgen.serving.codec import encode_image, encode_picture
from medgen.serving.limits import check_time
from medgen.serving.parameters import LARGEST_SEED, Parameter
from medgen.serving.sampling import GeneratorService
from medgen.serving.service import FORMAT, ImageService
from medgen.transforms import bounding_box, draw_outlines
from medgen.transforms.outline import PREDICTED
from medgen.transforms.save_anomaly import SMALLEST_PICTURE, draw_overlay, scale_top, with_colour_bar, worst_patch
from medgen.transforms.save_region import MOST_UNCERTAIN

__all__ = [
    "AnomalyService",
    "ClassificationService",
    "InversionService",
    "ReconstructionService",
    "SegmentationService",
    "served_generator",
]

# which task of the detector a parameter belongs to; the others belong to both
TASKS = {"steps": "score", "num_samples": "sample", "truncation_psi": "sample"}


def _figures(image: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, float | None]:
    """Mean absolute error, and PSNR in dB, None where there is no error, of images (C, H, W) in [0, 1]."""
    difference = (image.double().cpu() - reconstruction.double().cpu()).flatten()
    mse = difference.square().mean().item()
    return {"l1": difference.abs().mean().item(), "psnr": -10 * math.log10(mse) if mse else None}


class ReconstructionService(ImageService):
    """What an autoencoder makes of an image, and if asked for its latent.

    Args:
        network: the autoencoder.
        preprocessing: see :class:`~medgen.serving.ImageService`.
        inferer: of the bundle's inference.
        max_images: see :class:`~medgen.serving.Service`.
        max_pixels: see :class:`~medgen.serving.Service`.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Any,
        inferer: AutoencoderKLInferer,
        max_images: int = 8,
        max_pixels: int = 2**24,
    ) -> None:
        super().__init__(network, preprocessing, [Parameter("latent", "switch", False), FORMAT], max_images, max_pixels)
        self.inferer = inferer

    def answer_one(self, image: MetaTensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``image`` (the reconstruction), ``l1``, ``psnr``; with ``latent`` also ``mean`` and ``std``, (C, h, w)."""
        prepared = self.prepare(image)
        found = self.inferer(self.as_batch(prepared), self.network)
        reconstruction = found["reconstruction"][0].float().clamp(0, 1)
        latents = {key: found[key][0].float().cpu().tolist() for key in ("mean", "std")} if settings["latent"] else {}
        return {
            "image": encode_image(reconstruction, settings["format"]),
            **_figures(prepared.as_tensor(), reconstruction),
            **latents,
        }


class InversionService(ImageService):
    """The latent that an encoder gives an image, and what the generator makes of it where that is at hand.

    Args:
        network: the encoder.
        preprocessing: see :class:`~medgen.serving.ImageService`.
        generator: that it inverts; None: latents alone.
        max_images: see :class:`~medgen.serving.Service`.
        max_pixels: see :class:`~medgen.serving.Service`.
    """

    def __init__(
        self,
        network: LatentEncoder,
        preprocessing: Any,
        generator: LatentGenerator | None = None,
        max_images: int = 8,
        max_pixels: int = 2**24,
    ) -> None:
        super().__init__(network, preprocessing, [FORMAT], max_images, max_pixels)
        self.generator = generator
        self.inferer = None if generator is None else InversionInferer(generator)

    def answer_one(self, image: MetaTensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``latent`` (L, D), ``space``; with the generator ``image`` (the reconstruction), ``l1`` and ``psnr``.

        In W and W+ also ``distance_from_mean``, the root mean square of the latent's numbers about the mean, in their
        deviation: of latents of the training about 1. In Z all latents lie on one sphere.
        """
        prepared = self.prepare(image)
        batch = self.as_batch(prepared)
        found = {"latent": self.network(batch).float()} if self.inferer is None else self.inferer(batch, self.network)
        latent = found["latent"][0]
        answer = {"latent": latent.cpu().tolist(), "space": self.network.space}
        if self.network.space != "z":
            deviation = (latent - self.network.latent_mean) / self.network.latent_std
            answer["distance_from_mean"] = deviation.square().mean().sqrt().item()
        if "reconstruction" in found:
            reconstruction = found["reconstruction"][0].float()
            answer |= {"image": encode_image(reconstruction, settings["format"])}
            answer |= _figures(prepared.as_tensor(), reconstruction)
        return answer


def served_generator(
    folder: str | Path, network: LatentEncoder, model_path: str | Path, space: str
) -> LatentGenerator | None:
    """The generator of a served encoder, where its bundle lies in the encoder's.

    Args:
        folder: of the generator's bundle.
        network: the encoder.
        model_path: weights of the encoder; ``trained_as.json`` beside them says which generator they are for.
        space: of the latents.

    Returns:
        The generator, or None where there is no such folder.

    Raises:
        UserError: it is another generator than the encoder's.
    """
    if not Path(folder).is_dir():
        return None
    from medgen.handlers import check_trained_as
    from medgen.sources import load_generator

    generator = load_generator(folder, space=space)
    network.check_generator(generator)
    check_trained_as(model_path, generator_sha256=generator.sha256, space=space)
    return generator


class SegmentationService(ImageService):
    """A mask, its outline and box, and how sure the network is of it.

    Args:
        network: the U-Net.
        preprocessing: see :class:`~medgen.serving.ImageService`.
        postprocessing: MONAI transform of a dictionary with ``image`` and the inferer's maps, which adds ``mask`` at
            the image's own size and brings the maps to it.
        margin: of the box, see :func:`~medgen.transforms.bounding_box`.
        min_area: least share of the image that the mask must cover, 0 to 1.
        mc_passes: default of a request, see :class:`~medgen.inferers.SegmentationInferer`.
        max_passes: most of a request.
        max_images: see :class:`~medgen.serving.Service`.
        max_pixels: see :class:`~medgen.serving.Service`.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Any,
        postprocessing: Any,
        margin: float = 0.05,
        min_area: float = 0.05,
        mc_passes: int = 0,
        max_passes: int = 50,
        max_images: int = 8,
        max_pixels: int = 2**24,
    ) -> None:
        parameters = [
            Parameter("mc_passes", "integer", mc_passes, 0, max_passes),
            Parameter("seed", "integer", 0, 0, LARGEST_SEED),
            FORMAT,
        ]
        super().__init__(network, preprocessing, parameters, max_images, max_pixels)
        self.postprocessing, self.margin, self.min_area = postprocessing, margin, min_area

    def answer_one(self, image: MetaTensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``mask``, ``box``, ``overlay``, ``area_fraction`` and ``reason``; with passes ``uncertainty`` and its mean.

        The box is top, left, bottom and right in pixels of the image, bottom and right exclusive; it is null, and
        ``reason`` says why, where no lung was found. ``uncertainty`` is a standard deviation, 255 in a PNG for 0.5.
        Pixels are those of the image as viewers show it: a JPEG that its EXIF says is turned is turned first.
        """
        prepared = self.prepare(image)
        inferer = SegmentationInferer(settings["mc_passes"])
        # through the collation of a DataLoader, which keeps what the maps are brought back to the image's size by
        batch = list_data_collate([{"image": prepared}])
        maps = inferer(batch["image"].to(self.device), self.network, seeds=[derive_seed(settings["seed"])])
        found = self.postprocessing(decollate_batch({**batch, "pred": maps})[0])
        mask = convert_to_numpy(found["mask"])[0] > 0
        if float(image.max()) == float(image.min()):  # a network draws something in any picture
            mask, reason = np.zeros_like(mask), "no lung found: the image is one grey level"
        else:
            area = mask.mean()
            is_enough = area >= self.min_area
            reason = "" if is_enough else f"no lung found: {area:.1%} of the image, min_area is {self.min_area:.1%}"
        box = None if reason else bounding_box(mask, self.margin)
        answer = {
            "mask": encode_image(mask[None].astype(np.float32), settings["format"]),
            "box": None if box is None else list(box),
            "overlay": encode_picture(draw_outlines(convert_to_numpy(image), {PREDICTED: mask}, box)),
            "area_fraction": float(mask.mean()),
            "reason": reason,
        }
        if "uncertainty" in found:
            deviation = convert_to_numpy(found["uncertainty"])
            answer["mean_uncertainty"] = float(deviation.mean(dtype=np.float64))
            shown = deviation if settings["format"] == "array" else deviation / MOST_UNCERTAIN
            answer["uncertainty"] = encode_image(shown, settings["format"])
        return answer


class ClassificationService(ImageService):
    """The class of an image, and the probability of each.

    Args:
        network: the classifier, image to logits (B, K).
        preprocessing: see :class:`~medgen.serving.ImageService`.
        class_names: of the K classes, in their order.
        max_images: see :class:`~medgen.serving.Service`.
        max_pixels: see :class:`~medgen.serving.Service`.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Any,
        class_names: Sequence[str],
        max_images: int = 8,
        max_pixels: int = 2**24,
    ) -> None:
        super().__init__(network, preprocessing, [], max_images, max_pixels)
        self.class_names = list(class_names)

    def answer_one(self, image: MetaTensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``class`` (the name of the likeliest), ``class_index`` and ``probabilities`` by name, their sum 1."""
        probabilities = self.network(self.as_batch(self.prepare(image)))[0].double().softmax(dim=0).cpu().tolist()
        index = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {
            "class": self.class_names[index],
            "class_index": index,
            "probabilities": dict(zip(self.class_names, probabilities, strict=True)),
        }


class AnomalyService(ImageService):
    """How, and where, an image differs from what the generator can make; or samples of the generator.

    Args:
        network: the generator.
        preprocessing: see :class:`~medgen.serving.ImageService`.
        projector: of the bundle's inference.
        scoring: MONAI transform of a dictionary with ``image`` and ``reconstruction``, which adds ``scores`` and the
            maps ``mse_map`` and ``wd_map`` at the image's own size.
        sampling: answers requests with ``task`` "sample".
        steps: of the projection, default of a request.
        max_steps: most of a request.
        limits: top of the maps' colour scales; None: each map's own maximum.
        max_images: see :class:`~medgen.serving.Service`.
        max_pixels: see :class:`~medgen.serving.Service`.
    """

    takes_images = "maybe"

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Any,
        projector: StyleGAN2Projector,
        scoring: Any,
        sampling: GeneratorService,
        steps: int = 50,
        max_steps: int = 1000,
        limits: Sequence[float | None] = (None, None),
        max_images: int = 4,
        max_pixels: int = 2**24,
    ) -> None:
        parameters = [
            Parameter("task", "text", "score", choices=("score", "sample")),
            Parameter("steps", "integer", steps, 1, max_steps),
            # without one, scores have the seed of the bundle's inference, and samples begin with the first
            *(replace(each, default=None) if each.name == "seed" else each for each in sampling.parameters),
        ]
        super().__init__(network, preprocessing, parameters, max_images, max_pixels)
        self.projector, self.scoring, self.sampling, self.limits = projector, scoring, sampling, limits

    def check(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """All parameters of a request, with the defaults of those that it lacks.

        Raises:
            UserError: names the first that there is not, that is not as it must be, or that the task does not use.
        """
        settings = super().check(params)
        task = settings["task"]
        for parameter in self.parameters:
            # MLflow fills in the defaults of what a request leaves out, so that one of those may not have been given
            if settings[parameter.name] != parameter.default and TASKS.get(parameter.name, task) != task:
                raise UserError(
                    f"{parameter.name} belongs to the task {TASKS[parameter.name]}, got it with the task {task}; leave "
                    "it out, or change params.task"
                )
        return settings

    def answer(self, images: Sequence[MetaTensor], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Scores of the images, or samples."""
        if settings["task"] == "sample":
            if images:
                raise UserError(f"the task sample takes no image, got {len(images)}; set params.task to score")
            return self.sampling.answer([], {**settings, "seed": settings["seed"] or 0})
        if not images:
            raise UserError(f"the task score takes images, got none; send {self.usage}, or set params.task to sample")
        if self.sampling.num_classes and settings["class_index"] is None:
            raise UserError(
                f"the task score needs the images' class, from 0 to {self.sampling.num_classes - 1}, for this network; "
                "set params.class_index"
            )
        return super().answer(images, settings)

    def answer_one(self, image: MetaTensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``scores``, ``distance``, ``reconstruction``, and of both measures map, top of its scale, and overlay.

        ``mse_map`` and ``wd_map`` have the pixels of the image as viewers show it (a JPEG that its EXIF says is turned
        is turned first): in a PNG white is ``mse_top`` or ``wd_top``, in an array the values stand themselves, null
        where nothing was scored.
        """
        prepared = self.prepare(image)
        projector = copy.copy(self.projector)  # with the same statistics of w, which take a second to draw
        projector.steps, projector.on_step = settings["steps"], lambda *_: check_time()
        if settings["seed"] is not None:
            projector.seed = settings["seed"]
        labels = None
        if self.sampling.num_classes:
            labels = torch.tensor([settings["class_index"]], device=self.device)
        found = projector(self.as_batch(prepared), self.network, labels)
        distance = found["distance"][0].item()
        if not math.isfinite(distance):
            raise UserError("the projection of the image diverged; lower params.steps, or see that it is a radiograph")
        reconstruction = found["reconstruction"][0].cpu()
        scored = self.scoring({"image": prepared, "reconstruction": reconstruction})
        answer = {
            "scores": plain_json(scored["scores"]),
            "distance": distance,
            "reconstruction": encode_image(reconstruction, settings["format"]),
        }
        source = convert_to_numpy(image).mean(axis=0)
        factor = -(-SMALLEST_PICTURE // min(source.shape))
        for measure, limit in zip(("mse", "wd"), self.limits, strict=True):
            heat = convert_to_numpy(scored[f"{measure}_map"])
            top = scale_top(heat, limit)
            box = worst_patch(scored["scores"], measure, scored["image"])
            shown = heat if settings["format"] == "array" else heat / top
            picture = with_colour_bar(draw_overlay(source, heat[0], top, box, factor), top, measure.upper())
            answer |= {
                f"{measure}_map": encode_image(shown, settings["format"]),
                f"{measure}_top": top,
                f"{measure}_overlay": encode_picture(picture),
            }
        return answer

    def example_request(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """A phantom radiograph, in a few steps."""
        return super().example_request()[0], {"steps": 20, **({"class_index": 0} if self.sampling.num_classes else {})}

    def more_inputs(self) -> dict[str, torch.Tensor]:
        """A class, where there are any."""
        return self.sampling.more_inputs()
