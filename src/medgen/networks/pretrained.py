"""Weights of a classifier trained elsewhere, as the beginning of a training."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import nn

from medgen.errors import UserError
from medgen.weights import check_same_shapes, read_state_dict

__all__ = ["load_pretrained"]

logger = logging.getLogger(__name__)

# names of other libraries, and those of MONAI's networks
RENAMED = (
    (re.compile(r"^module\."), ""),  # of torch.nn.DataParallel
    # torchvision's and torchxrayvision's DenseNet; older files have a dot before the number
    (re.compile(r"^(features\.denseblock\d+\.denselayer\d+)\.(norm|conv)\.?([12])\."), r"\1.layers.\2\3."),
    (re.compile(r"^classifier\."), "class_layers.out."),
)
STAGE = re.compile(r"^(_blocks)\.\d+\.")  # MONAI's EfficientNet groups the blocks, whose numbers run through
COUNTER = "num_batches_tracked"  # of batch normalisation; files older than it lack it, and nothing here reads it


def load_pretrained(network: nn.Module, path: str | Path | None) -> nn.Module:
    """Give a classifier the weights of a file, in MONAI's names, or in torchvision's for a DenseNet.

    The layer that gives the classes keeps its random weights where the file has another number of classes, or none;
    what was taken is logged. Images must be scaled as they were in the training of those weights.

    Args:
        network: classifier whose last layer with weights gives the classes.
        path: state dict, read with ``weights_only=True``; None leaves the network as it is.

    Returns:
        The network.

    Raises:
        UserError: no file of plain weights, or those of another architecture.
    """
    if path is None:
        return network
    own, given = network.state_dict(), read_state_dict(path)
    for pattern, replacement in RENAMED:
        given = {pattern.sub(replacement, name): value for name, value in given.items()}
    for name, value in own.items():
        if name not in given and (flat := STAGE.sub(r"\1.", name)) in given:
            given[name] = given.pop(flat)
        elif name not in given and name.endswith(COUNTER):
            given[name] = value
    head = next(reversed(own)).rpartition(".")[0] + "."
    body = {name: value for name, value in own.items() if not name.startswith(head)}
    if not any(name in given and value.ndim > 1 for name, value in body.items()):
        raise UserError(
            f"{path} holds no weights of this {type(network).__name__}: its entries are {', '.join(list(given)[:3])}; "
            "name a state dict of the same architecture with --pretrained"
        )
    of_body = {name: value for name, value in given.items() if not name.startswith(head)}
    # what is no tensor of a layer, such as thresholds that a library keeps beside them, has no dot in its name
    check_same_shapes(str(path), body, {name: value for name, value in of_body.items() if name in body or "." in name})
    classes = {name: given[name] for name in own if name.startswith(head) and name in given}
    is_same = all(name in classes and classes[name].shape == own[name].shape for name in own if name not in body)
    network.load_state_dict({**own, **{name: of_body[name] for name in body}, **(classes if is_same else {})})
    what = "all layers" if is_same else "all layers but that of the classes, which begins anew,"
    logger.info(f"{what} begin with the weights of {path}")
    return network
