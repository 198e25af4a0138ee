"""A bundle's network as TorchScript, ``torch.export`` program or ONNX model, compared with itself before it is kept.

All networks of this collection go through all three formats, with a free batch size; the autoencoder, the segmentation
and the diffusion networks also with free height and width, the inversion encoders with those of their ``image_size``,
since they have one latent for the whole image. TorchScript is scripted where PyTorch's compiler takes the network (the
autoencoder and the segmentation) and traced where it does not.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from medgen.bundle_config import build_network
from medgen.convert.formats import FORMATS, TOLERANCE
from medgen.errors import UserError
from medgen.networks import DCGANGenerator, PGGANGenerator, StyleGAN2Generator
from medgen.settings import check_choice
from medgen.weights import load_weights

__all__ = ["Exported", "export_network"]

EXAMPLE_BATCH = 2  # with 1 the batch would be taken for a constant
CHECKED_BATCHES = (1, 3)
CONTEXT_TOKENS = 77  # of the text model that context comes from
EXAMPLE_FACTORS, CHECKED_FACTORS = (2, 3, 2), (4, 2, 3)  # of free sizes, in units of what they must be multiples of
ONNX_LIMIT = 2**31 - 2**26  # bytes of weights: a protobuf file ends at 2 GiB, and the graph is in it as well

_FREE_SIZE = re.compile(r"\*|(?:(\d+)\s*\*\s*)?n")  # "*", "n" and "8*n" of metadata.json


class _Input(NamedTuple):
    """One argument of a network.

    Attributes:
        sizes: without the batch; of a free one the number that it must be a multiple of.
        free: which of them are free.
        draw: random values of a shape.
    """

    sizes: tuple[int, ...]
    free: tuple[bool, ...]
    draw: Callable[..., torch.Tensor]

    def example(self, batch: int, factors: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        free = iter(factors)
        sizes = [size * next(free) if is_free else size for size, is_free in zip(self.sizes, self.free, strict=True)]
        return self.draw((batch, *sizes), generator=generator)

    def dynamic(self, batch: Any) -> dict[int, Any]:
        """The free dimensions, as ``torch.export`` has them."""
        names = iter(("height", "width") if sum(self.free) == 2 else ("depth", "height", "width"))
        sizes = enumerate(zip(self.sizes, self.free, strict=True), start=1)
        return {0: batch} | {place: size * torch.export.Dim(next(names)) for place, (size, free) in sizes if free}


class Exported(NamedTuple):
    """What was written, and how it compared.

    Attributes:
        files: the model, and what lies beside it.
        network: class of the network.
        how: ``scripted``, ``traced`` or ``exported``.
        inputs: names and shapes of the arguments, such as ``x (B, 1, 8*n, 8*n)``.
        difference: largest absolute difference from the network's own output.
        spread: highest minus lowest value of that output.
        compared: batches that were compared.
    """

    files: tuple[Path, ...]
    network: str
    how: str
    inputs: str
    difference: float
    spread: float
    compared: int


def export_network(
    bundle: str | Path,
    output: str | Path,
    file_format: str,
    overlays: Sequence[str | Path] = (),
    weights: str | Path | None = None,
    device: str = "cpu",
    check_inputs: int = 4,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a bundle's ``network_def`` with its weights in a format that needs none of its Python.

    Float32, in evaluation mode and as the bundle's ``inference.json`` calls it: StyleGAN2 with the noise stored in its
    weights, networks with dropout without it, the autoencoder with its posterior's mean. What is written is loaded
    again by its own runtime and compared with the network on random inputs of two batch sizes, other than the one that
    it was made with, and of other free sizes.

    Args:
        bundle: its folder; its config is code, whose expressions run.
        output: file to write, with the format's ending; it appears when it has passed, with ``.data`` beside an ONNX
            model of more than 2 GiB.
        file_format: a key of :data:`medgen.convert.formats.FORMATS`.
        overlays: JSON files over ``inference.json``: what the weights were trained with.
        weights: state dict; default: ``models/model.pt`` of the bundle.
        device: where the network runs, and where a traced one will: its constants stay there. ONNX is made on the CPU.
        check_inputs: random inputs for each batch size.
        tolerance: largest difference, relative to the range of the network's output.

    Returns:
        What was written.

    Raises:
        UserError: no such network or weights, a format that cannot hold it, or outputs that differ; nothing is written.
    """
    check_choice(list(FORMATS), file_format=file_format)
    output = Path(output)
    if output.suffix != FORMATS[file_format]:
        raise UserError(f"--output must be a file that ends in {FORMATS[file_format]} for {file_format}, got {output}")
    bundle = Path(bundle)
    network = _load(bundle, overlays, weights).to("cpu" if file_format == "onnx" else device)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    inputs = _inputs(network, metadata)
    generator = torch.Generator().manual_seed(0)
    place = next(network.parameters()).device

    def draw(batch: int, factors: Sequence[int]) -> dict[str, torch.Tensor]:
        return {name: given.example(batch, factors, generator).to(place) for name, given in inputs.items()}

    example = draw(EXAMPLE_BATCH, EXAMPLE_FACTORS)
    expected = _run(network, example)  # what cannot be run at all is told before an exporter speaks of it
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder, _quiet(), torch.no_grad():
            made = Path(folder) / output.name
            with _reasons(f"{type(network).__name__} cannot be written as {file_format}", file_format):
                how = _WRITERS[file_format](network, example, inputs, made, metadata)
                loaded = _LOADERS[file_format](made, place)
            batches = [
                draw(batch, EXAMPLE_FACTORS if number % 2 else CHECKED_FACTORS)
                for batch in CHECKED_BATCHES
                for number in range(check_inputs)
            ]
            difference, spread = 0.0, float(expected.max() - expected.min())
            for batch in batches:
                expected = _run(network, batch)
                with _reasons(f"{output.name} fails for a batch of {len(expected)}", file_format):
                    got = loaded(batch)
                if got.shape != expected.shape:
                    raise UserError(
                        f"{file_format} of {type(network).__name__} gives {tuple(got.shape)} where the network gives "
                        f"{tuple(expected.shape)}; nothing was written, use another --format"
                    )
                difference = max(difference, float((got - expected).abs().max()))
                spread = max(spread, float(expected.max() - expected.min()))
            # "not at most": NaN is above any tolerance
            if not difference <= tolerance * spread:
                raise UserError(
                    f"{file_format} of {type(network).__name__} must differ by at most {tolerance:g} of the output's "
                    f"range {spread:.4g}, got {difference:.3g} on {len(batches)} random batches; nothing was written, "
                    "use another --format"
                )
            # the weights first: a model without them would be no model
            parts = sorted(Path(folder).iterdir(), key=lambda path: path == made)
            files = tuple(output.with_name(path.name) for path in parts)
            for path, file in zip(parts, files, strict=True):
                os.replace(path, file)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error
    return Exported(files[::-1], type(network).__name__, how, _shown(inputs), difference, spread, len(batches))


def _load(bundle: Path, overlays: Sequence[str | Path], weights: str | Path | None) -> nn.Module:
    """The network with its weights, to be run."""
    path = bundle / "models" / "model.pt" if weights is None else Path(weights)
    if not path.is_file():
        raise UserError(f"no weights at {path}; train the bundle first, or name a file with --weights")
    network = build_network(bundle, overlays=overlays)
    load_weights(network, path, option="--overlay")
    return network.float().eval().requires_grad_(False)


def _inputs(network: nn.Module, metadata: Mapping[str, Any]) -> dict[str, _Input]:
    """Arguments of a network by name: what ``metadata.json`` says, with what it has no words for."""
    first = next(iter(inspect.signature(network.forward).parameters))
    if isinstance(network, DCGANGenerator | PGGANGenerator | StyleGAN2Generator):
        inputs = {first: _Input((network.latent_dim,), (False,), torch.randn)}
        if network.num_classes:
            # weights of the classes rather than an index, which takes no mixture
            inputs["labels"] = _Input((network.num_classes,), (False,), torch.rand)
        return inputs
    try:
        declared = next(iter(metadata["network_data_format"]["inputs"].values()))
        sizes, is_latent = declared["spatial_shape"], declared["format"] == "latent"
    except (KeyError, StopIteration, AttributeError, TypeError) as error:
        raise UserError(
            f"configs/metadata.json must describe an input in network_data_format ({type(error).__name__}: {error}); "
            "complete it"
        ) from error
    convolution = next((m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if convolution is None:
        raise UserError(f"expected a network for images or latents of this collection, got {type(network).__name__}")
    if all(isinstance(size, int) for size in sizes):
        # a size that is fixed is the default config's; the overlays may have another
        fixed = tuple(getattr(network, "image_size", sizes))
        shape, free = fixed, (False,) * len(fixed)
    else:
        found = [_FREE_SIZE.fullmatch(str(size).strip()) for size in sizes]
        if None in found:
            raise UserError(f"expected sizes such as 64, * or 8*n in configs/metadata.json, got {sizes}; correct them")
        shape, free = tuple(int(match[1] or 1) for match in found), (True,) * len(found)
    draw = torch.randn if is_latent else torch.rand
    inputs = {first: _Input((convolution.in_channels, *shape), (False, *free), draw)}
    if isinstance(network, DiffusionModelUNet):
        inputs["timesteps"] = _Input((), (), _timesteps)
        if network.with_conditioning:
            width = next(m for n, m in network.named_modules() if n.endswith("attn2.to_k")).in_features
            inputs["context"] = _Input((CONTEXT_TOKENS, width), (False, False), torch.randn)
        if network.num_class_embeds is not None:
            inputs["class_labels"] = _Input((), (), _class_labels(network.num_class_embeds))
    return inputs


def _timesteps(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    # as floats, which a rectified flow has between the whole numbers
    return 999 * torch.rand(shape, generator=generator)


def _class_labels(classes: int) -> Callable[..., torch.Tensor]:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randint(classes, shape, generator=generator)

    return draw


def _shown(inputs: Mapping[str, _Input]) -> str:
    def sizes(given: _Input) -> str:
        texts = [f"{size}*n" if free else str(size) for size, free in zip(given.sizes, given.free, strict=True)]
        return ", ".join(["B", *texts])

    return ", ".join(f"{name} ({sizes(given)})" for name, given in inputs.items())


def _called(network: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> Any:
    """What a network makes of its inputs, the first of them by its place, as everybody calls it."""
    first, *others = inputs
    return network(inputs[first], **{name: inputs[name] for name in others})


def _run(network: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    try:
        # full precision on a GPU as well: it is what the formats are compared with
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = _called(network, inputs)
    # whatever a network's code raises
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} cannot be run on {', '.join(inputs)} as configs/metadata.json has them "
            f"({_reason(error)}); correct network_data_format, or the overlays"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise UserError(f"network_def must return one tensor, got {type(output).__name__}; such is not exported")
    if not torch.isfinite(output).all():
        raise UserError(f"{type(network).__name__} gives NaN or infinite values with these weights; name others")
    return output


# ---------------------------------------------------------------------------------------------------------------------
# writing and loading: network, example, inputs, file, metadata -> how it was made; file, device -> callable


def _write_torchscript(
    network: nn.Module,
    example: Mapping[str, torch.Tensor],
    inputs: Mapping[str, _Input],
    path: Path,
    metadata: Mapping[str, Any],
) -> str:
    from monai.data import save_net_with_metadata

    how = "scripted"
    try:
        made = torch.jit.script(network)
    # the compiler raises whatever it stumbles upon
    except Exception:
        how = "traced"
        made = torch.jit.trace(network, example_kwarg_inputs=dict(example), check_trace=False)
    save_net_with_metadata(made, str(path), meta_values=dict(metadata))
    return how


def _program(
    network: nn.Module, example: Mapping[str, torch.Tensor], inputs: Mapping[str, _Input]
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = {name: given.dynamic(batch) for name, given in inputs.items()}
    (_, first), *others = example.items()
    return torch.export.export(network, (first,), dict(others), dynamic_shapes=shapes)


def _write_program(
    network: nn.Module,
    example: Mapping[str, torch.Tensor],
    inputs: Mapping[str, _Input],
    path: Path,
    metadata: Mapping[str, Any],
) -> str:
    files = {"metadata.json": json.dumps(metadata)}
    torch.export.save(_program(network, example, inputs), path, extra_files=files)
    return "exported"


def _write_onnx(
    network: nn.Module,
    example: Mapping[str, torch.Tensor],
    inputs: Mapping[str, _Input],
    path: Path,
    metadata: Mapping[str, Any],
) -> str:
    # the program's own constants do not keep their names
    program = torch.onnx.export(
        _program(network, example, inputs), input_names=list(inputs), output_names=["pred"], verbose=False
    )
    program.model.metadata_props.update({"metadata.json": json.dumps(metadata)})
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    program.save(path, external_data=size > ONNX_LIMIT)
    return "exported"


def _load_torchscript(path: Path, device: torch.device) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    loaded = torch.jit.load(path, map_location=device)
    return lambda inputs: _called(loaded, inputs)


def _load_program(path: Path, device: torch.device) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    loaded = torch.export.load(path).module()
    return lambda inputs: _called(loaded, inputs)


def _load_onnx(path: Path, device: torch.device) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("an ONNX model is compared by onnxruntime, which is not there; install it") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (output,) = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
        return torch.from_numpy(output)

    return run


_WRITERS = {"torchscript": _write_torchscript, "torch_export": _write_program, "onnx": _write_onnx}
_LOADERS = {"torchscript": _load_torchscript, "torch_export": _load_program, "onnx": _load_onnx}


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters' own warnings and progress, none of which asks for anything to be done."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _reasons(what: str, file_format: str) -> Iterator[None]:
    """Whatever an exporter or a runtime raises, as one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        others = " or ".join(name for name in FORMATS if name != file_format)
        raise UserError(f"{what} ({_reason(error)}); nothing was written, use --format {others}") from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
