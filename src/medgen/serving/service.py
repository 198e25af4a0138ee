"""What a served bundle has in common, whatever it computes: a request's images and parameters in, plain values out."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn

from medgen.errors import UserError
from medgen.serving.codec import FORMATS, decode_image
from medgen.serving.limits import check_time, seconds_left
from medgen.serving.parameters import Parameter, check_parameters

__all__ = ["FORMAT", "ImageService", "Service", "request_images"]

FORMAT = Parameter("format", "text", "png", choices=FORMATS)
PHANTOM_SEED = 8  # of the radiograph in a model's example


class Service(ABC):
    """Answers requests to a bundle's network, one at a time.

    Nothing is kept from one request to the next, and all that is drawn comes from the request's seed: equal requests
    have equal answers, whatever came between them.

    Args:
        network: its weights are loaded by :func:`medgen.serving.load_service`.
        parameters: of a request.
        max_images: in a request.
        max_pixels: of an image, height times width.

    Attributes:
        takes_images: "no", "yes" or "maybe".
        column: the only name that inputs may have.
    """

    takes_images = "no"
    column = "image"

    def __init__(
        self, network: nn.Module, parameters: Sequence[Parameter], max_images: int = 0, max_pixels: int = 0
    ) -> None:
        self.network, self.parameters = network, tuple(parameters)
        self.max_images, self.max_pixels = max_images, max_pixels
        # the scoring server calls from threads: two at once would share the device's memory, and caches
        self._lock = threading.Lock()
        # between the steps of a sampler, and the passes of a network with dropout
        network.register_forward_pre_hook(lambda *_: check_time())

    @property
    def usage(self) -> str:
        """What a request looks like, for messages."""
        if self.takes_images == "no":
            return '{"inputs": [], "params": {...}}'
        return '{"inputs": {"image": ["<base64 PNG>"]}}'

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self.network.parameters()).device

    def check(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """All parameters of a request, with the defaults of those that it lacks.

        Raises:
            UserError: names the first that there is not, or that is not as it must be.
        """
        return check_parameters(self.parameters, params)

    def __call__(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Answer a request.

        Args:
            model_input: as MLflow hands it over; its images are under ``image``.
            params: of the request.

        Returns:
            One dictionary of plain values for each image or sample.

        Raises:
            UserError: the request is not as it must be, or its time is up.
        """
        settings = self.check(params)
        values = request_images(model_input)
        if values and self.takes_images == "no":
            raise UserError(f"this model makes images and takes none, got {len(values)}; leave the inputs empty: []")
        if not values and self.takes_images == "yes":
            raise UserError(f"this model takes images, got none; send {self.usage}")
        if len(values) > self.max_images and self.takes_images != "no":
            raise UserError(f"a request may have at most {self.max_images} images, got {len(values)}; send several")
        names = ["image"] if len(values) == 1 else [f"image {n} of {len(values)}" for n in range(1, len(values) + 1)]
        images = [decode_image(value, self.max_pixels, name) for value, name in zip(values, names, strict=True)]
        with self._turn(), torch.no_grad():
            return self.answer(images, settings)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the requests before this one, no longer than its own client waits."""
        while not self._lock.acquire(timeout=seconds_left()):
            check_time()
        try:
            check_time()
            yield
        finally:
            self._lock.release()

    @abstractmethod
    def answer(self, images: Sequence[MetaTensor], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Answer a request whose images (C, H, W) in [0, 1] and parameters were checked."""

    def more_inputs(self) -> dict[str, torch.Tensor]:
        """Arguments that the network takes beside its input, for a batch of one."""
        return {}

    def example_request(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """A request whose answer shows what the model does, without an image of a patient: images and parameters."""
        return [], {}


class ImageService(Service):
    """Answers for images, each by itself.

    Args:
        network: see :class:`Service`.
        preprocessing: MONAI transform of a dictionary with ``image`` (C, H, W) in [0, 1] at its own size.
        parameters: see :class:`Service`.
        max_images: see :class:`Service`.
        max_pixels: see :class:`Service`.
    """

    takes_images = "yes"

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Any,
        parameters: Sequence[Parameter],
        max_images: int = 8,
        max_pixels: int = 2**24,
    ) -> None:
        super().__init__(network, parameters, max_images, max_pixels)
        self.preprocessing = preprocessing

    def answer(self, images: Sequence[MetaTensor], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One answer for each image, which does not depend on the others."""
        found = []
        for image in images:
            check_time()
            found.append(self.answer_one(image, settings))
        return found

    @abstractmethod
    def answer_one(self, image: MetaTensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Answer for one image (C, H, W) in [0, 1] at its own size."""

    def prepare(self, image: MetaTensor) -> MetaTensor:
        """The image (C, H, W) as the network takes it."""
        return self.preprocessing({"image": image})["image"]

    def as_batch(self, image: MetaTensor) -> torch.Tensor:
        """(1, C, H, W) on the network's device, without metadata."""
        return image.as_tensor()[None].to(self.device)

    def example_request(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """A phantom radiograph (H, W) of 256 pixels."""
        from medgen.data.phantom import make_thorax

        return [make_thorax(np.random.default_rng(PHANTOM_SEED), 256).image], {}


def request_images(model_input: Any) -> list[Any]:
    """The images of a request as they came, whichever of MLflow's forms it had.

    A list holds one image in each entry; a list of rows of numbers is one image by itself.

    Args:
        model_input: a table, a dictionary or list of dictionaries with ``image``, a list of images or a single one.

    Raises:
        UserError: something else stands in the place of ``image``.
    """
    if hasattr(model_input, "columns"):  # a pandas table
        columns = list(model_input.columns)
        if not columns or model_input.empty:
            return []
        if "image" not in columns and len(columns) > 1:
            raise UserError(f"the inputs must have a column image, got {', '.join(map(str, columns))[:80]}; name it so")
        return _entries(list(model_input["image" if "image" in columns else columns[0]]))
    if isinstance(model_input, Mapping):
        if model_input and "image" not in model_input:
            names = ", ".join(map(str, model_input))
            raise UserError(f"the inputs must have a key image, got {names[:80]}; name it so")
        return _entries(model_input.get("image"))
    if isinstance(model_input, list | tuple) and any(isinstance(entry, Mapping) for entry in model_input):
        return [image for entry in model_input for image in (request_images(entry) or [None])]
    return _entries(model_input)


def _entries(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = list(value) if value.ndim else value.item()
    if value is None or (isinstance(value, list | tuple) and not len(value)):
        return []
    if not isinstance(value, list | tuple):
        return [value]
    if all(isinstance(entry, list | tuple | np.ndarray) and not len(entry) for entry in value):
        return []  # MLflow makes a table with one cell of an empty list
    if all(_is_row(entry) for entry in value):
        return [value]
    found: list[Any] = []
    for entry in value:
        # MLflow puts a whole column of texts into one cell
        several = isinstance(entry, list | tuple | np.ndarray) and len(entry) and isinstance(entry[0], str)
        found.extend(entry if several else [entry])
    return found


def _is_row(entry: Any) -> bool:
    return (
        isinstance(entry, list | tuple | np.ndarray)
        and len(entry) > 0
        and np.ndim(entry[0]) == 0
        and (not isinstance(entry[0], str | bytes | Mapping) and entry[0] is not None)
    )
