"""What tracking costs a training step: into a SQLite file, to a server, and to one that never answers.

At most 2 % is wanted. Steps with and without tracking alternate in blocks within one process, so that both see the same
machine; a point of eight curves is logged every tenth step, as the bundles do.
"""

from __future__ import annotations

import logging
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines import GenerativeTrainer
from medgen.tracking import Tracker, TrainingTracking

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlflow_servers import mlflow_server

SIDE, BATCH = 64, 4
BLOCK, BLOCKS, INTERVAL = 20, 30, 10  # steps of a block, blocks of each kind, steps between points


class Convolutions(GenerativeTrainer):
    """A step of tens of milliseconds on one CPU core."""

    def __init__(self, **kwargs: Any) -> None:
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Conv2d(32, 1, 3, padding=1))
        self.optimizer = torch.optim.Adam(self.network.parameters())
        super().__init__(components={"network": self.network}, **kwargs)

    def _iteration(self, engine: Any, batch: dict) -> list[dict]:
        self.seed_step()
        loss = (self.network(batch["image"]) - batch["image"]).abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [{"loss": loss.detach(), **{f"scalar_{number}": loss.detach() for number in range(7)}}]


def trainer(tracking: list[TrainingTracking]) -> Convolutions:
    """One that trains a block of steps each time that it is run."""
    data = Dataset([{"image": torch.rand(1, SIDE, SIDE)} for _ in range(BLOCK * BATCH)])
    return Convolutions(
        device="cpu",
        max_epochs=1,
        train_data_loader=ResumableDataLoader(data, BATCH, seed=0),
        train_handlers=tracking,
    )


def block(engine: Convolutions) -> float:
    """Seconds of a step."""
    engine.state.max_epochs = engine.state.epoch + 1
    start = time.perf_counter()
    engine.run()
    return (time.perf_counter() - start) / BLOCK


class KeptOpen(TrainingTracking):
    """Without the end, which waits: blocks follow one another."""

    def end(self, status: str) -> None:
        """The run goes on."""


def measure(uri: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of a step without tracking, with it over without, and seconds that the end takes."""
    tracker = Tracker(folder, "bench", "bench", uri, {"model_path": folder / "none.pt"}, timeout=5)
    engines = {"plain": trainer([]), "tracked": trainer([KeptOpen(tracker, INTERVAL)])}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(BLOCKS + 2):
        for name in sorted(engines, reverse=number % 2 == 1):
            seconds = block(engines[name])
            if number > 1:  # the first begin the run, and make the tables
                times[name].append(seconds)
    start = time.perf_counter()
    tracker.finish()
    end = time.perf_counter() - start
    ratios = [with_ / without for with_, without in zip(times["tracked"], times["plain"], strict=True)]
    return statistics.median(times["plain"]), statistics.median(ratios), end


@contextmanager
def black_hole() -> Iterator[str]:
    """A socket that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def main() -> None:
    """Measure the three."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with mlflow_server(folder) as running, black_hole() as silent:
            for what, uri in (
                ("SQLite file", f"sqlite:///{folder}/mlflow.db"),
                ("server on loopback", running.uri),
                ("server that never answers", silent),
            ):
                (folder / what).mkdir()
                plain, ratio, end = measure(uri, folder / what)
                print(f"{what:26} step {plain * 1e3:5.1f} ms, with tracking x {ratio:.3f}, end {end:.1f} s (limit 5)")


if __name__ == "__main__":
    main()
