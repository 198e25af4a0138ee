"""What it costs to be ready to be told to end: the look after each step, and the check of a checkpoint on loading."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from medgen.preemption import Termination
from medgen.weights import check_whole_file

STEPS, ROUNDS, LOOKS = 50, 3, 500


def steps_per_second(termination: Termination | None, size: int) -> float:
    """Of a network that is stepped, averaged over the processes as the trainers do it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Conv2d(size, size, 3, padding=1) for _ in range(4)))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    image = torch.randn(2, size, 32, 32)
    begun = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        network(image).square().mean().backward()
        if torch.distributed.is_initialized():
            flat = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
            torch.distributed.all_reduce(flat)
        optimizer.step()
        if termination is not None:
            assert not termination.agreed()
    return STEPS / (time.perf_counter() - begun)


def measure() -> tuple[float, float, float]:
    """Steps a second without the look, with it (medians of rounds in turn), and milliseconds of a look alone."""
    with Termination() as termination:
        rates = [[steps_per_second(look, 16) for look in (None, termination)] for _ in range(ROUNDS)]
        begun = time.perf_counter()
        for _ in range(LOOKS):
            termination.agreed()
        alone = 1000 * (time.perf_counter() - begun) / LOOKS
    without, with_look = (statistics.median(column) for column in zip(*rates, strict=True))
    return without, with_look, alone


def report(processes: int) -> None:
    """Print the figures."""
    without, with_look, alone = measure()
    print(
        f"{processes} process(es): {without:.1f} steps/s without, {with_look:.1f} with the look after each step, "
        f"ratio {with_look / without:.3f}; a look alone {alone:.4f} ms"
    )


def in_a_group(rank: int, rendezvous: str) -> None:
    """One of two gloo processes; rank 0 prints."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    if rank == 0:
        report(2)
    else:
        measure()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Measure all."""
    torch.set_num_threads(1)
    report(1)
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork.Process(target=in_a_group, args=(rank, f"file://{folder}/rendezvous")) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()

        path = Path(folder, "state.pt")
        torch.save({"components": {str(i): torch.randn(10_000_000) for i in range(5)}}, path)
        gigabytes = path.stat().st_size / 1e9
        for name, read in {
            "checksums of every entry": check_whole_file,
            "torch.load, for comparison": lambda path: torch.load(path, weights_only=True),
        }.items():
            seconds = []
            for _ in range(ROUNDS):
                begun = time.perf_counter()
                read(path)
                seconds.append(time.perf_counter() - begun)
            print(f"checkpoint of {gigabytes:.2f} GB: {name} {gigabytes / min(seconds):.2f} GB/s")
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        torch.load(path, weights_only=True)
        try:
            check_whole_file(path)
        except zipfile.BadZipFile as error:
            print(f"one flipped bit: torch.load says nothing, the checksums say: {error}")


if __name__ == "__main__":
    main()
