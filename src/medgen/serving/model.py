"""A bundle as an MLflow model: signature, sources, metadata that are true, pictures."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType
from monai.bundle.scripts import _get_fake_spatial_shape  # how MONAI's verify_net_in_out reads a declared shape
from PIL import Image
from torch import nn

import medgen
from medgen import _pyfunc
from medgen.errors import UserError
from medgen.serving.codec import encode_image
from medgen.serving.limits import UnavailableError
from medgen.serving.load import load_service
from medgen.serving.parameters import param_schema
from medgen.serving.service import ImageService, Service
from medgen.serving.tensors import TensorFormat, TensorService

__all__ = ["describe", "example", "save_model"]

logger = logging.getLogger(__name__)

SMALLEST_PROBE = 16  # pixels of a side that is free
PICTURE_GAP = 2  # pixels between the samples of a picture


def describe(bundle: str | Path) -> None:
    """Make ``network_data_format`` of a bundle's ``configs/metadata.json`` true to its network, by running that once.

    Sizes that are fixed become those of this network, a registered one perhaps of 64 pixels where the bundle's own has
    512; sizes that are free (``8*n``) stay.

    Args:
        bundle: folder of a bundle with weights; its metadata.json is rewritten if need be.

    Raises:
        UserError: the network does not do what is declared.
    """
    path = Path(bundle) / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    for side in ("inputs", "outputs"):
        TensorFormat.from_metadata(metadata, side)
    service = load_service(bundle, "cpu")
    if isinstance(service, TensorService):
        return
    (given,), (returned,) = (metadata["network_data_format"][side].values() for side in ("inputs", "outputs"))
    before = json.dumps(metadata)
    network = service.network
    channels, sizes = _input_size(network, given)
    fixed = all(isinstance(size, int) for size in given["spatial_shape"])
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, channels, *sizes), **service.more_inputs())
    # whatever a network raises that is given another shape than its own
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"the network must take the input that configs/metadata.json declares, got {type(error).__name__} for "
            f"{(1, channels, *sizes)} ({said:.120}); correct network_data_format.inputs"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise UserError(f"network_def must return one tensor, got {type(output).__name__}; correct the network")
    made = list(output.shape[2:])
    given["num_channels"], returned["num_channels"] = channels, output.shape[1]
    if fixed:
        given["spatial_shape"], returned["spatial_shape"] = list(sizes), made
    elif made != list(_sizes(returned["spatial_shape"], sizes[0], given["spatial_shape"])):
        raise UserError(
            f"the network must return {returned['spatial_shape']} for {given['spatial_shape']}, as network_data_format "
            f"in configs/metadata.json declares, got {made} for {list(sizes)}; correct that"
        )
    for spec in (given, returned):  # a line for each channel, which the network may have more or fewer of
        names = spec.get("channel_def")
        if names and len(names) not in (1, spec["num_channels"]):
            spec["channel_def"] = {str(n): names.get(str(n), names["0"]) for n in range(spec["num_channels"])}
    if json.dumps(metadata) != before:
        path.write_text(json.dumps(metadata, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _input_size(network: nn.Module, given: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Channels and sizes of a network's input, by its own attributes, or the declared ones where they are free."""
    declared = given["spatial_shape"]
    if not declared:
        return int(getattr(network, "latent_dim", given["num_channels"])), ()
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(network, "in_channels", first.in_channels if first is not None else given["num_channels"])
    if all(isinstance(size, int) for size in declared):
        size = getattr(network, "image_size", tuple(declared))
        return channels, (size, size) if isinstance(size, int) else tuple(size)
    factor = _get_fake_spatial_shape(declared, p=1, n=1, any=1)[0]
    return channels, _get_fake_spatial_shape(declared, p=1, n=max(1, SMALLEST_PROBE // factor), any=SMALLEST_PROBE)


def _sizes(declared: Sequence[int | str], size: int, of: Sequence[int | str]) -> tuple[int, ...]:
    """Declared sizes of an output, where the input ``of`` those expressions has this size."""
    factor = _get_fake_spatial_shape(of, p=1, n=1, any=1)[0]
    return tuple(_get_fake_spatial_shape(declared, p=1, n=size // factor, any=size))


def save_model(
    stage: Path, metadata: Mapping[str, Any], about: Mapping[str, str], requirements: Sequence[str]
) -> Model:
    """Make an MLflow model in ``stage/model`` of the bundle in ``stage/bundle``, for ``mlflow models serve``.

    This package's sources travel with it, so that it goes on answering where another version is installed, or none.

    Args:
        stage: folder that holds ``bundle``.
        metadata: content of the bundle's ``configs/metadata.json``.
        about: what else the model's description is to say.
        requirements: of pip.

    Returns:
        The description of the model, without a path of this machine.

    Raises:
        UserError: the bundle cannot be served.
    """
    service = load_service(stage / "bundle", "cpu")
    signature = _signature(service, metadata)
    code = Path(shutil.copyfile(_pyfunc.__file__, stage / "bundle_pyfunc.py"))
    package = Path(medgen.__file__).parent
    shutil.copytree(package, stage / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    request = None
    if isinstance(service, ImageService):
        images, _ = service.example_request()
        request = {"image": [encode_image(image[None], "png") for image in images]}
    # MLflow writes the paths that it is given into the model; relative ones keep this machine's out of it
    with contextlib.chdir(stage), warnings.catch_warnings():
        # MLflow would infer a signature from an example; ours is what the service takes
        warnings.filterwarnings("ignore", message=".*An input example was not provided")
        mlflow.pyfunc.save_model(
            path="model",
            python_model=code.name,
            artifacts={"bundle": "bundle"},
            code_paths=[package.name],
            signature=signature,
            input_example=request,
            pip_requirements=list(requirements),
            metadata={**about, "medgen_version": medgen.__version__},
        )
    model = Model.load(stage / "model")
    # the one path that MLflow makes absolute; loading uses its last part alone
    model.flavors["python_function"]["model_code_path"] = code.name
    return model


def _signature(service: Service | TensorService, metadata: Mapping[str, Any]) -> ModelSignature:
    if isinstance(service, TensorService):
        sides = (TensorFormat.from_metadata(metadata, side).shape for side in ("inputs", "outputs"))
        return ModelSignature(*(Schema([TensorSpec(np.dtype(np.float32), shape)]) for shape in sides))
    # of any type, base64 or array, and not required: what is wrong with an image is for the service to say, since
    # MLflow says it with all of the image
    inputs = None if service.takes_images == "no" else Schema([ColSpec(AnyType(), "image", required=False)])
    return ModelSignature(inputs=inputs, params=param_schema(service.parameters))


def example(bundle: str | Path) -> list[Image.Image]:
    """Pictures of what a bundle does, without an image of a patient.

    Args:
        bundle: folder of a bundle with weights.

    Returns:
        Of a generator one grid of samples; of a model that takes images a phantom radiograph and each picture that is
        made of it; none where the bundle has no ``configs/serve.json``, or needs a text model that is not there.

    Raises:
        UserError: the bundle cannot be served.
    """
    service = load_service(bundle)
    if isinstance(service, TensorService):
        return []
    images, settings = service.example_request()
    try:
        answers = service({"image": images}, settings)
    except UnavailableError as error:
        logger.warning("no example picture: %s", error)
        return []
    found = [[_decoded(value) for key, value in answer.items() if _is_picture(key, value)] for answer in answers]
    if images:
        return [*(Image.fromarray(np.rint(image * 255).astype(np.uint8)) for image in images), *found[0]]
    return [_grid([pictures[0] for pictures in found])]


def _is_picture(key: str, value: Any) -> bool:
    return isinstance(value, str) and key not in ("class", "reason", "space")


def _decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def _grid(pictures: Sequence[Image.Image]) -> Image.Image:
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    width, height = (side + PICTURE_GAP for side in pictures[0].size)
    sheet = Image.new(pictures[0].mode, (columns * width - PICTURE_GAP, rows * height - PICTURE_GAP), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet
