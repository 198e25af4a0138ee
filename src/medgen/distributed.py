"""Joining a group of processes started by torchrun: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sized

import torch
import torch.distributed as dist

from medgen.errors import UserError

__all__ = ["check_alone", "check_shards", "local_device", "start"]


def start() -> None:
    """Join torchrun's process group; all but rank 0 log warnings only.

    Raises:
        UserError: not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise UserError(
            "multi_gpu_train.json expects the environment that torchrun sets, got none; start it with "
            "torchrun --nproc_per_node=N -m monai.bundle run --config_file \"['configs/train.json',"
            "'configs/multi_gpu_train.json']\""
        )
    # torch 2.15 calls it forward_sync_buffers, of which older ones do not know
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")
    if not dist.is_initialized():
        # torchrun keeps one store for all its attempts: processes that it has started anew would find the addresses of
        # those that have gone, and wait for them
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, processes = next(dist.rendezvous("env://"))
        store.set_timeout(dist.default_pg_timeout)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=processes,
        )
    if dist.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def check_alone(multi_gpu: bool) -> None:
    """See that a training that joins no process group is the only one: several would write into one folder.

    Args:
        multi_gpu: whether the training joins one; ``multi_gpu_train.json`` sets it.

    Raises:
        UserError: torchrun started several processes that would not join.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not multi_gpu:
        raise UserError(
            f"torchrun started {processes} processes, but the config makes each train alone; add "
            "configs/multi_gpu_train.json to --config_file"
        )


def check_shards(**datasets: Sized) -> None:
    """See that every process gets at least one item: one without would leave the others waiting for its metrics.

    Raises:
        UserError: a dataset holds fewer items than there are processes.
    """
    for name, dataset in datasets.items():
        if len(dataset) < dist.get_world_size():
            raise UserError(
                f"the {name} split holds {len(dataset)} images for {dist.get_world_size()} processes; start fewer "
                "processes or enlarge the split"
            )


def local_device() -> torch.device:
    """This process's own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
