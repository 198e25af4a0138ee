"""A training of milliseconds with all that is tracked; also as processes, which can be killed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.engines import Evaluator
from PIL import Image
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines import GenerativeTrainer
from medgen.handlers import TrainingCheckpoint, ValidationAtIntervals
from medgen.tracking import Tracker, TrainingTracking, ValidationTracking

IMAGES, BATCH = 8, 2


class Regression(GenerativeTrainer):
    """One weight follows noisy data."""

    def __init__(self, **kwargs: Any) -> None:
        self.network = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        super().__init__(components={"network": self.network, "optimizer": self.optimizer}, **kwargs)

    def _iteration(self, engine: Any, batch: dict) -> list[dict]:
        self.seed_step()
        loss = (self.network(batch["image"] + torch.randn(1)) - 2).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [{"loss": loss.detach(), "resolution": 4}]


class Validator(Evaluator):
    """Its metric is the number of validations."""

    def _iteration(self, engine: Any, batch: dict) -> dict:
        engine.state.metrics["val_error"] = 1 / engine.state.epoch
        return {}


def make(
    output_dir: Path,
    uri: str | None,
    epochs: int = 3,
    resume: bool = False,
    pause: float = 0.0,
    timeout: float = 120.0,
    name: str | None = None,
    **settings: Any,
) -> Regression:
    """The trainer; four steps an epoch, a checkpoint each second step, a picture each epoch.

    Args:
        output_dir: of the training.
        uri: of the tracker.
        epochs: of the training.
        resume: go on from the last checkpoint.
        pause: seconds that each step takes.
        timeout: seconds that its end waits for the tracker.
        name: of the run.
        settings: more of them.
    """
    torch.manual_seed(0)
    output_dir.mkdir(parents=True, exist_ok=True)
    model = output_dir / "model.pt"
    settings = {"resume": resume, "model_path": str(model), "lr": 0.1, "max_epochs": epochs, **settings}
    tracker = Tracker(output_dir, "tiny", name or f"tiny-{output_dir.name}", uri, settings, timeout=timeout)
    loader = ResumableDataLoader(Dataset([{"image": torch.ones(1) * i} for i in range(IMAGES)]), BATCH, seed=1)
    validator = Validator(torch.device("cpu"), [{}], val_handlers=[ValidationTracking(tracker)])
    trainer = Regression(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=loader,
        train_handlers=[
            TrainingCheckpoint(output_dir / "checkpoints", 2, resume),
            ValidationAtIntervals(1, validator),
            TrainingTracking(tracker, interval=1),
        ],
    )

    @trainer.on(Events.ITERATION_STARTED)
    def wait() -> None:
        time.sleep(pause)

    def draw(engine: Any) -> None:
        (output_dir / "images").mkdir(exist_ok=True)
        grey = Image.new("L", (8, 8), 10 * engine.state.epoch)
        grey.save(output_dir / "images" / f"samples_{engine.images_seen:09d}.png")
        torch.save(engine.network.state_dict(), model)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, draw)
    handlers = trainer._event_handlers[Events.EPOCH_COMPLETED]
    handlers.insert(0, handlers.pop())  # a bundle's pictures come before its tracking
    return trainer


def run(folder: Path, options: dict[str, Any]) -> None:
    """Train; stop and wait for a signal at the beginning of step ``hang_at``."""
    hang_at = options.pop("hang_at", 1000)
    trainer = make(folder, **options)

    @trainer.on(Events.ITERATION_STARTED(once=hang_at))
    def hang() -> None:
        while True:
            time.sleep(0.1)

    trainer.run()


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])  # folder -> options; processes that import MONAI once, together
    pids = {}
    for name, given in jobs.items():
        if (pid := os.fork()) == 0:
            run(Path(name), given)
            sys.exit()
        pids[name] = pid
    print(json.dumps(pids), flush=True)
    print(json.dumps({name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in pids.items()}))
