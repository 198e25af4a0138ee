"""Services that make images: from seeds, classes and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import nn

from medgen.errors import UserError
from medgen.inferers import LatentDiffusionSampler, SeedInferer
from medgen.networks.conditioning import make_conditioner
from medgen.serving.codec import encode_image
from medgen.serving.limits import UnavailableError, check_time
from medgen.serving.parameters import LARGEST_SEED, Parameter
from medgen.serving.service import FORMAT, Service

__all__ = ["DiffusionService", "GeneratorService", "served_conditioner"]

LONGEST_PROMPT = 2000  # characters; CLIP reads 77 tokens of them


class _SamplingService(Service):
    """Images of consecutive seeds: each its own, whatever others the request asks for.

    Args:
        network: see :class:`~medgen.serving.Service`.
        parameters: beside seed, number and format.
        num_classes: of the network; 0 for none.
        max_samples: images of a request.
        batch_size: images that are made at once.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[Parameter],
        num_classes: int = 0,
        max_samples: int = 16,
        batch_size: int = 8,
    ) -> None:
        own = [
            Parameter("seed", "integer", 0, 0, LARGEST_SEED),
            Parameter("num_samples", "integer", 1, 1, max_samples),
        ]
        if num_classes:
            own.append(Parameter("class_index", "integer", None, 0, num_classes - 1))
        super().__init__(network, [*own, *parameters, FORMAT])
        self.num_classes, self.max_samples, self.batch_size = num_classes, max_samples, batch_size

    def answer(self, images: Sequence[MetaTensor], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``seed`` and ``image`` of each sample, and its ``class_index`` where there are classes."""
        first, number = settings["seed"], settings["num_samples"]
        if first + number - 1 > LARGEST_SEED:
            raise UserError(f"seeds must be at most {LARGEST_SEED}, got {number} from {first}; change params.seed")
        found: list[dict[str, Any]] = []
        for start in range(first, first + number, self.batch_size):
            check_time()
            seeds = list(range(start, min(start + self.batch_size, first + number)))
            labels = None
            if self.num_classes:
                index = settings["class_index"]
                # classes take turns, as in the bundle's own generation
                labels = [seed % self.num_classes if index is None else index for seed in seeds]
            made = self.generate(seeds, labels, settings)
            for place, (seed, image) in enumerate(zip(seeds, made, strict=True)):
                label = {} if labels is None else {"class_index": labels[place]}
                found.append({"seed": seed, **label, "image": encode_image(image, settings["format"])})
        return found

    @abstractmethod
    def generate(self, seeds: Sequence[int], labels: list[int] | None, settings: Mapping[str, Any]) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1]."""

    def example_request(self) -> tuple[list[Any], dict[str, Any]]:
        """The first seeds."""
        return [], {"seed": 0, "num_samples": min(16, self.max_samples)}


class GeneratorService(_SamplingService):
    """Samples of a generative adversarial network.

    Args:
        network: the generator.
        inferer: makes a :class:`~medgen.inferers.SeedInferer` of a truncation.
        truncation_psi: default of a request.
        num_classes: of the network; 0 for none.
        max_samples: images of a request.
        batch_size: images that are made at once.
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: Callable[..., SeedInferer],
        truncation_psi: float = 1.0,
        num_classes: int = 0,
        max_samples: int = 16,
        batch_size: int = 8,
    ) -> None:
        parameters = [Parameter("truncation_psi", "number", float(truncation_psi), 0, 2)]
        super().__init__(network, parameters, num_classes, max_samples, batch_size)
        self.inferer = inferer

    def generate(self, seeds: Sequence[int], labels: list[int] | None, settings: Mapping[str, Any]) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        inferer = self.inferer(truncation_psi=settings["truncation_psi"])
        return inferer(seeds, self.network, labels=None if labels is None else torch.tensor(labels))

    def more_inputs(self) -> dict[str, torch.Tensor]:
        """A class, where there are any."""
        return {"labels": torch.zeros(1, dtype=torch.long, device=self.device)} if self.num_classes else {}


class DiffusionService(_SamplingService):
    """Samples of a latent diffusion model: of a prompt, of a class, or of nothing.

    Args:
        network: the denoising network.
        inferer: makes a :class:`~medgen.inferers.LatentDiffusionSampler` of the settings of a request.
        conditioning: "text", "label" or "none".
        conditioner: of the inferer.
        num_classes: of the network, for labels.
        context_dim: width of the network's cross-attention, for text.
        num_steps: default of a request.
        max_steps: most of a request.
        guidance_scale: default of a request.
        max_samples: images of a request.
        batch_size: images that are made at once.
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: Callable[..., LatentDiffusionSampler],
        conditioning: str,
        conditioner: Any,
        num_classes: int = 0,
        context_dim: int = 1024,
        num_steps: int = 20,
        max_steps: int = 100,
        guidance_scale: float = 7.0,
        max_samples: int = 8,
        batch_size: int = 4,
    ) -> None:
        parameters = [Parameter("num_steps", "integer", num_steps, 1, max_steps)]
        if conditioning != "none":
            parameters.append(Parameter("guidance_scale", "number", float(guidance_scale), 0, 50))
        if conditioning == "text":
            parameters += [
                Parameter("prompt", "text", "", high=LONGEST_PROMPT),
                Parameter("negative_prompt", "text", "", high=LONGEST_PROMPT),
            ]
        classes = num_classes if conditioning == "label" else 0
        super().__init__(network, parameters, classes, max_samples, batch_size)
        self.inferer, self.conditioner, self.conditioning = inferer, conditioner, conditioning
        self.context_dim, self.guidance_scale = context_dim, guidance_scale

    def generate(self, seeds: Sequence[int], labels: list[int] | None, settings: Mapping[str, Any]) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        prompt, negative = settings.get("prompt"), settings.get("negative_prompt")
        if negative and not prompt:
            raise UserError("negative_prompt needs a prompt to guide away from it, got none; set params.prompt, too")
        given = {"prompts": prompt, "negative_prompts": negative, "labels": labels}
        guidance = settings.get("guidance_scale", self.guidance_scale)
        inferer = self.inferer(num_steps=settings["num_steps"], guidance_scale=guidance)
        return inferer(seeds, self.network, **{name: value for name, value in given.items() if value})

    def more_inputs(self) -> dict[str, torch.Tensor]:
        """A timestep, and what the network is conditioned on."""
        timesteps = torch.zeros(1, device=self.device)
        if self.conditioning == "none":
            return {"timesteps": timesteps}
        if self.conditioning == "label":
            return {"timesteps": timesteps, **self.conditioner.null(1)}
        # zeros in the place of a text, which would take the text model, and that may lie elsewhere
        return {"timesteps": timesteps, "context": torch.zeros(1, 1, self.context_dim, device=self.device)}

    def example_request(self) -> tuple[list[Any], dict[str, Any]]:
        """The first four seeds: at 512 pixels each takes its time."""
        return [], {"seed": 0, "num_samples": min(4, self.max_samples)}


class _AbsentTextModel:
    """In the place of a text model that does not lie on this machine; says so when a request needs it."""

    key = "caption"

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder

    def __call__(self, captions: Any) -> dict[str, torch.Tensor]:
        """Refuse.

        Raises:
            UnavailableError: always.
        """
        raise UnavailableError(
            f"this model's text model does not lie on the server, in {Path(self.folder).name}; start the server with "
            "MEDGEN_TEXT_ENCODER set to the folder of the one that it was trained with"
        )

    null = __call__


def served_conditioner(conditioning: str, text_encoder: str | Path | None = None, **settings: Any) -> Any:
    """The conditioner of a served model; of text, also where its text model, which is no part of the bundle, is absent.

    Args:
        conditioning: "none", "label" or "text".
        text_encoder: local folder of the CLIP text model.
        settings: of :func:`medgen.networks.make_conditioner`.

    Returns:
        The conditioner, or None.

    Raises:
        UserError: a setting that does not fit.
    """
    if conditioning == "text" and not (text_encoder and Path(text_encoder).is_dir()):
        return _AbsentTextModel(text_encoder or "models/text_encoder")
    return make_conditioner(conditioning, text_encoder, **settings)
