"""Gradient descent on a whole batch of images, each by itself: what the searches for latents have in common.

The parameters of the images are the rows of one tensor. Their losses are summed, Adam works number by number, and its
count of steps is the same for all: nothing of an image's result comes from the others of its batch, and an image that
is done leaves with its row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from monai.data import MetaTensor
from torch import nn

__all__ = ["ADAM_BETAS", "CHECK_INTERVAL", "keep_rows", "own_graph", "plain", "ramped_lr"]

ADAM_BETAS = (0.9, 0.999)
CHECK_INTERVAL = 10  # steps between looks at the plateau: each waits for the device


def ramped_lr(step: int, steps: int, initial_lr: float, ramp_up: float, ramp_down: float) -> float:
    """Learning rate of StyleGAN2's projection (arXiv 1912.04958, appendix D).

    Args:
        step: from 0, at which it is 0 but for ``ramp_up`` 0.
        steps: of the search.
        initial_lr: the highest.
        ramp_up: share of the steps in which it rises along a line.
        ramp_down: share of the steps in which it falls along a cosine, to 0 after the last.
    """
    t = step / steps
    rise = min(1.0, t / ramp_up) if ramp_up else 1.0
    fall = min(1.0, (1 - t) / ramp_down) if ramp_down else 1.0
    return initial_lr * (0.5 - 0.5 * math.cos(math.pi * fall)) * rise


def keep_rows(optimizer: torch.optim.Adam, kept: torch.Tensor) -> torch.Tensor:
    """Drop the other rows of an optimiser's only parameter, with their moments; returns the new parameter."""
    (old,) = optimizer.param_groups[0]["params"]
    new = old.detach()[kept].requires_grad_()
    state = optimizer.state.pop(old)
    optimizer.state[new] = {name: value[kept] if value.shape == old.shape else value for name, value in state.items()}
    optimizer.param_groups[0]["params"] = [new]
    return new


def plain(x: torch.Tensor) -> torch.Tensor:
    """A float32 copy without metadata: tensors made in inference mode cannot take part in a graph."""
    return (x.as_tensor() if isinstance(x, MetaTensor) else x).detach().float().clone()


@contextmanager
def own_graph(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """Gradients in float32, whatever the evaluator around has set, but none for the weights of these networks.

    Under ``torch.compile`` a backward pass computes the gradient of all that requires one, not just of what is asked
    for: twice the arithmetic. Without, the graph keeps activations that only the weights' gradients need.
    """
    wanted = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
