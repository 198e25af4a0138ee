"""SIGTERM at any moment: a checkpoint, the exit code that means "again", and the weights of an undisturbed training."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.engines import Evaluator
from torch import nn

from medgen.data import ResumableDataLoader, ShieldedDataLoader
from medgen.engines import GenerativeTrainer
from medgen.errors import UserError
from medgen.handlers import TrainingCheckpoint, ValidationAtIntervals, checkpoint
from medgen.preemption import AGAIN, Preempted, Termination

FORK = multiprocessing.get_context("fork")  # the children need no import of MONAI
IMAGES, EPOCHS = 8, 3


@pytest.fixture(autouse=True)
def own_handler():
    """What a test is told to do with SIGTERM is undone after it."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


class Regression(GenerativeTrainer):
    """One weight follows noisy data, averaged over the processes."""

    def __init__(self, **kwargs: Any) -> None:
        self.network = nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        self.images: list[list[float]] = []
        super().__init__(components={"network": self.network, "optimizer": self.optimizer}, **kwargs)

    def _iteration(self, engine: Any, batch: dict) -> list[dict]:
        self.seed_step()
        self.images.append(batch["image"].flatten().tolist())
        loss = (self.network(batch["image"]) - 2 * batch["image"] + self.noise()).square().mean()
        self.update(self.optimizer, self.network, loss)
        return [{"loss": loss.detach()}]

    def noise(self) -> torch.Tensor:
        """Drawn by the rank."""
        return torch.randn(1)


class Validator(Evaluator):
    """Measures the weight, and writes down which epochs it has measured to the end."""

    def __init__(self, network: nn.Module, length: int, journal: Path) -> None:
        self.network, self.journal = network, journal
        super().__init__(device="cpu", val_data_loader=torch.arange(length))
        self.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def _iteration(self, engine: Any, batch: Any) -> dict:
        return {}

    def write(self) -> None:
        weights = idist.all_gather(self.network.weight.detach())  # as metrics do: with those of the other processes
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps([self.state.epoch, *weights.flatten().tolist()]) + "\n")


def make(folder: Path, batch_size: int = 1, **settings: Any) -> tuple[Regression, Validator]:
    """A training of 24 images that is validated after each 8; shards of a validation differ in length."""
    torch.manual_seed(0)
    data = Dataset([{"image": torch.ones(1) * i / IMAGES} for i in range(IMAGES)])
    loader = ResumableDataLoader(data, batch_size, seed=1)
    trainer = Regression(
        device="cpu",
        max_epochs=EPOCHS,
        train_data_loader=loader,
        train_handlers=[TrainingCheckpoint(folder, **{"interval": 3, "resume": True, **settings})],
    )
    rank = idist.get_rank()
    validator = Validator(trainer.network, 3 - 2 * rank, folder / f"validations{rank}.jsonl")
    ValidationAtIntervals(1, validator).attach(trainer)
    return trainer, validator


def terminate(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def raise_error(_: Any, error: type[BaseException]) -> None:
    raise error


def final(folder: Path) -> tuple[dict, list[str]]:
    """State, and validations, of a training that is over."""
    state = torch.load(folder / "last.pt", weights_only=True)
    return state, [(folder / f"validations{rank}.jsonl").read_text() for rank in (0, 1)
                   if (folder / f"validations{rank}.jsonl").exists()]  # fmt: skip


def assert_same(a: Path, b: Path) -> None:
    """The same weights bit for bit, and the same validations, each of which was done once."""
    (first, journal), (second, other) = final(a), final(b)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert journal == other
    assert [json.loads(line)[0] for line in journal[0].splitlines()] == [1, 2, 3]


STEP = (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
MOMENTS = [
    *(("trainer", event(once=n)) for n in (1, 3, 7, 8, 9, 24) for event in STEP),
    *(("trainer", event) for event in (Events.STARTED, *(Events.EPOCH_COMPLETED(once=n) for n in (1, 2)))),
    *(("validator", event) for event in (Events.STARTED, Events.COMPLETED, *(event(once=2) for event in STEP))),
]


def test_sigterm_at_any_moment_ends_with_a_checkpoint_from_which_nothing_differs(tmp_path, caplog):
    undisturbed, _ = make(tmp_path / "undisturbed")
    undisturbed.run()
    for number, (who, event) in enumerate(MOMENTS):
        folder, caplog.records[:] = tmp_path / str(number), []
        trainer, validator = make(folder)
        {"trainer": trainer, "validator": validator}[who].add_event_handler(event, terminate)
        with pytest.raises(Preempted) as end:
            trainer.run()
        assert end.value.code == AGAIN == 75
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        seen = trainer.images_seen
        if not seen:
            assert line == "stopped by SIGTERM before the first step; nothing had to be saved"
        else:
            at = f"after a checkpoint at {seen} images"
            assert line == f"stopped by SIGTERM {at}; the same command goes on from there"
            assert torch.load(folder / "last.pt", weights_only=True)["images_seen"] == seen
        resumed, _ = make(folder)
        resumed.run()
        assert len(trainer.images) + len(resumed.images) == EPOCHS * IMAGES  # no step was made twice
        assert_same(tmp_path / "undisturbed", folder)


@pytest.mark.parametrize("epoch", [1, EPOCHS])
def test_validation_broken_off_again_and_again_is_made_once(epoch, tmp_path):
    undisturbed, _ = make(tmp_path / "undisturbed")
    undisturbed.run()
    for _ in range(3):
        trainer, validator = make(tmp_path / "told")
        validator.add_event_handler(
            Events.ITERATION_COMPLETED(event_filter=lambda engine, _: engine.state.epoch == epoch), terminate
        )
        with pytest.raises(Preempted):
            trainer.run()
        assert trainer.images_seen == epoch * IMAGES
    resumed, _ = make(tmp_path / "told")
    resumed.run()
    assert_same(tmp_path / "undisturbed", tmp_path / "told")


def test_training_whose_last_epoch_is_done_ends_well(tmp_path):
    trainer, _ = make(tmp_path)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=EPOCHS), terminate)
    trainer.run()
    assert trainer.images_seen == EPOCHS * IMAGES


def test_signal_in_the_middle_of_a_save_and_a_second_one_change_nothing(tmp_path, monkeypatch):
    undisturbed, _ = make(tmp_path / "undisturbed")
    undisturbed.run()
    rename = os.replace

    def told_while_saving(source: Path, target: Path) -> None:
        if target.suffix == ".pt":
            terminate()
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", told_while_saving)
    trainer, _ = make(tmp_path / "told")
    with pytest.raises(Preempted):
        trainer.run()
    monkeypatch.undo()
    assert trainer.images_seen == 3
    terminate()  # a launcher repeats itself while the process ends
    resumed, _ = make(tmp_path / "told")
    resumed.run()
    assert_same(tmp_path / "undisturbed", tmp_path / "told")


def test_without_resume_the_line_says_how_to_go_on(tmp_path, caplog):
    trainer, _ = make(tmp_path, resume=False)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=2), terminate)
    with pytest.raises(Preempted):
        trainer.run()
    assert "at 2 images; the same command with --resume true goes on from there" in caplog.text


def test_handler_of_before_is_back_after_every_other_end(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    for number, end in enumerate((None, KeyboardInterrupt, ValueError)):
        trainer, _ = make(tmp_path / str(number))
        if end is not None:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=2), raise_error, end)
        with pytest.raises(end) if end else contextlib.nullcontext():
            trainer.run()
        assert signal.getsignal(signal.SIGTERM) is before


def test_training_after_one_that_was_told_puts_the_first_handler_back():
    before = signal.getsignal(signal.SIGTERM)
    told = Termination()
    for training in (told, told):
        with pytest.raises(Preempted), training:
            raise Preempted
        assert signal.getsignal(signal.SIGTERM) == told._note
    with Termination():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_that_cannot_meet_are_told_what_to_set_and_keep_their_handler(monkeypatch):
    def fail(**_: Any) -> None:
        raise RuntimeError("Connect timeout [127.0.1.1]:4321\nException raised from ...")

    for name, value in {"is_initialized": lambda: True, "get_world_size": lambda: 2, "new_group": fail}.items():
        monkeypatch.setattr(torch.distributed, name, value)
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(UserError, match=r"over gloo \(Connect timeout .*:4321\); set GLOO_SOCKET_IFNAME"),
        Termination(),
    ):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------------------------------------------------------
# several processes


def _train_in_a_group(rank: int, world_size: int, folder: Path, told: int, place: str, batch_size: int) -> None:
    """One of the processes; that of rank ``told`` gets a signal."""
    logging.disable()
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    trainer, validator = make(folder, batch_size)
    if rank == told:
        if place == "step":
            trainer.add_event_handler(Events.ITERATION_STARTED(once=6), terminate)
        elif place == "validation":
            validator.add_event_handler(Events.ITERATION_STARTED(once=1), terminate)
        elif place == "loss in a step":
            trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: os.kill(os.getpid(), signal.SIGKILL))
        elif place == "loss":  # of the process
            validator.add_event_handler(Events.ITERATION_STARTED(once=1), lambda: os.kill(os.getpid(), signal.SIGKILL))
    code = 0
    try:
        trainer.run()
    except SystemExit as end:
        code = end.code
    (folder / f"images{rank}.json").write_text(json.dumps(trainer.images))
    sys.stdout.flush()
    os._exit(code)


def train_in_a_group(folder: Path, told: int = -1, place: str = "", world_size: int = 2, batch_size: int = 1) -> list:
    """Exit codes of the processes."""
    folder.mkdir(exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    processes = [
        FORK.Process(target=_train_in_a_group, args=(rank, world_size, folder, told, place, batch_size))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def test_processes_of_which_one_was_told_leave_after_the_same_step(tmp_path):
    assert train_in_a_group(tmp_path / "undisturbed") == [0, 0]
    for place in ("step", "validation"):
        for told in (0, 1):
            folder = tmp_path / f"{place}{told}"
            assert train_in_a_group(folder, told, place) == [AGAIN, AGAIN]
            position = torch.load(folder / "last.pt", weights_only=True)
            assert (position["images_seen"], position["epoch_end_due"]) == {
                "step": (12, False),
                "validation": (8, True),
            }[place]
            assert train_in_a_group(folder) == [0, 0]
            assert_same(tmp_path / "undisturbed", folder)


def test_validation_that_lost_a_process_loses_no_training(tmp_path):
    assert train_in_a_group(tmp_path / "undisturbed") == [0, 0]
    for lost in (0, 1):  # rank 0 saves
        folder = tmp_path / f"lost{lost}"
        codes = [AGAIN, AGAIN]
        codes[lost] = -signal.SIGKILL
        assert train_in_a_group(folder, lost, "loss") == codes
        assert torch.load(folder / "last.pt", weights_only=True)["images_seen"] == 8
        assert train_in_a_group(folder) == [0, 0]
        assert_same(tmp_path / "undisturbed", folder)


def test_over_nccl_a_lost_process_ends_the_others_without_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Regression, "update", lambda *_: None)  # the sum of gradients, which NCCL waits for unseen
    for backend, images in (("gloo", 12), ("nccl", 8)):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda _group=None, name=backend: name)
        assert train_in_a_group(tmp_path / backend, 1, "loss in a step") == [AGAIN, -signal.SIGKILL]
        state = torch.load(tmp_path / backend / "last.pt", weights_only=True)
        assert (state["images_seen"], state["epoch_end_due"]) == (images, False)


def test_another_number_of_processes_sees_the_same_images_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(Regression, "noise", lambda _: torch.zeros(1))  # what a rank draws is its own

    def train(folder: Path, processes: int, place: str = "") -> list[list[float]]:
        told = 0 if place else -1
        assert set(train_in_a_group(folder, told, place, processes, batch_size=4 // processes)) == {
            AGAIN if place else 0
        }
        shares = [json.loads((folder / f"images{rank}.json").read_text()) for rank in range(processes)]
        # of the four images of a step each process takes every second
        return [[image for column in zip(*step, strict=True) for image in column] for step in zip(*shares, strict=True)]

    whole = train(tmp_path / "one", 1)
    there = train(tmp_path / "changing", 2, "validation")
    back = train(tmp_path / "changing", 1)
    assert there + back == whole
    first, _ = final(tmp_path / "one")
    second, _ = final(tmp_path / "changing")
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)  # sums of gradients are rounded otherwise


# ---------------------------------------------------------------------------------------------------------------------
# workers


class Slow(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> int:
        time.sleep(0.01)
        return place


class Hanging(Slow):
    def __getitem__(self, place: int) -> int:
        time.sleep(600)
        return place


def _leave_a_worker_that_hangs() -> None:
    Hanging.batches = iter(ShieldedDataLoader(Hanging(), batch_size=4, num_workers=1))  # not ended by its end


def test_worker_that_hangs_does_not_keep_its_process_from_ending():
    process = FORK.Process(target=_leave_a_worker_that_hangs)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def test_workers_survive_a_signal_to_all_processes_and_end_with_their_loader():
    batches = iter(ShieldedDataLoader(Slow(), batch_size=4, num_workers=2))
    workers = [worker.pid for worker in multiprocessing.active_children()]
    assert len(workers) == 2
    seen = []
    for pid in workers:  # at once, before one has come to its first item, and later
        os.kill(pid, signal.SIGTERM)
    for batch in batches:
        seen.extend(batch.tolist())
        for pid in workers if len(seen) < 20 else ():
            os.kill(pid, signal.SIGTERM)
    assert seen == list(range(40))
    del batches
    assert not multiprocessing.active_children()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
