"""Checkpoints: whole or not at all, the older one when the newest is broken, the best model remembered."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import time

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines import GenerativeTrainer
from medgen.engines.trainer import TrainingEvents
from medgen.errors import UserError
from medgen.handlers import BestModelSaver, TrainingCheckpoint, WeightsLoader, atomic_save, checkpoint


class Regression(GenerativeTrainer):
    """The smallest trainer there is: one weight follows noisy data."""

    def __init__(self, **kwargs):
        self.network = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        super().__init__(components={"network": self.network, "optimizer": self.optimizer}, **kwargs)

    def _iteration(self, engine, batch):
        self.seed_step()
        x = batch["image"] + torch.randn(1)
        self.optimizer.zero_grad()
        loss = (self.network(x) - 2 * x).square().mean()
        loss.backward()
        self.optimizer.step()
        return [{"loss": loss.detach()}]


def trainer(folder, interval=2, resume=False, max_epochs=3, handlers=(), batch_size=1, **kwargs):
    torch.manual_seed(0)
    loader = ResumableDataLoader(Dataset([{"image": torch.ones(1) * i} for i in range(5)]), batch_size, seed=1)
    saver = TrainingCheckpoint(folder, interval, resume, **kwargs)
    return Regression(device="cpu", max_epochs=max_epochs, train_data_loader=loader, train_handlers=[saver, *handlers])


class KilledError(Exception):
    pass


class KillAt:
    """Ends a training in the middle of a step, as kill -9 would: nothing is tidied up."""

    def __init__(self, iteration):
        self.iteration = iteration

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.iteration), self)

    def __call__(self, engine):
        raise KilledError


@pytest.mark.parametrize("killed_at", [1, 3, 5, 6, 11, 15])
def test_training_killed_anywhere_and_resumed_gives_the_same_weights(killed_at, tmp_path):
    undisturbed = trainer(tmp_path / "a")
    undisturbed.run()
    with pytest.raises(KilledError):
        trainer(tmp_path / "b", handlers=[KillAt(killed_at)]).run()
    resumed = trainer(tmp_path / "b", resume=True)
    resumed.run()
    assert torch.equal(undisturbed.network.weight, resumed.network.weight)
    assert resumed.state.iteration == 15


def test_unreadable_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    undisturbed = trainer(tmp_path)
    undisturbed.run()
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    resumed = trainer(tmp_path, resume=True)
    resumed.run()
    assert "last.pt cannot be read" in caplog.text
    assert torch.equal(undisturbed.network.weight, resumed.network.weight)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
def test_volume_that_fails_says_nothing_about_its_files(error, tmp_path, monkeypatch):
    def fail(path):
        raise error

    trainer(tmp_path).run()
    saver = BestModelSaver(nn.Linear(1, 1), tmp_path / "last.pt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "check_whole_file", fail)
    with pytest.raises(type(error)) as caught:
        trainer(tmp_path, resume=True).run()
    assert "last.pt could not be read, and is left as it is; try the same command again" in caught.value.__notes__[0]
    with pytest.raises(type(error)):
        saver.load_state_dict({"best": 0.1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("interval", "validated", "expected"),
    [
        (4, 0, [4, 8, 12, 15]),
        (7, 0, [7, 14, 15]),
        (5, 0, [5, 10, 15]),
        (100, 0, [15]),
        (0, 0, [5, 10, 15]),
        (4, 2, [4, 8, 10, 10, 14, 15]),
        (100, 2, [10, 10, 15]),
    ],
)
def test_saves_at_most_so_many_iterations_apart_and_around_a_validation(interval, validated, expected, tmp_path):
    class Validation:
        def attach(self, engine):
            event = Events.EPOCH_COMPLETED(event_filter=lambda _, epoch: epoch == validated)
            engine.add_event_handler(event, lambda: engine.fire_event(TrainingEvents.VALIDATION_DUE))

    class Journal:
        def attach(self, engine):
            saved, save = [], engine.training_state
            engine.training_state = lambda: saved.append(engine.state.iteration) or save()
            self.saved = saved

    journal = Journal()
    trainer(tmp_path, interval, handlers=[Validation(), journal]).run()
    assert journal.saved == expected


def test_checkpoint_holds_no_more_images_than_pictures_show(tmp_path):
    engine = trainer(tmp_path)
    engine.state.output, engine.epoch_end_due = [{"image": torch.arange(20)}], True
    assert engine.training_state()["images"].tolist() == list(range(8))
    engine.epoch_end_due = False
    assert engine.training_state()["images"] is None


def test_of_two_trainings_in_a_folder_the_one_that_began_last_goes_on(tmp_path):
    class OtherBegins:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_STARTED(once=8), self)

        def __call__(self):
            trainer(tmp_path, resume=True, max_epochs=4).run()

    first = trainer(tmp_path, resume=True, handlers=[OtherBegins()])
    with pytest.raises(UserError, match=r"another training has begun in .* end one of them, or give one another --out"):
        first.run()
    assert first.images_seen == 8
    assert torch.load(tmp_path / "last.pt", weights_only=True)["images_seen"] == 20


def test_start_removes_what_a_kill_has_left_but_not_what_another_writes(tmp_path):
    for name, age in (("left", 7200), ("growing", 60)):
        (tmp_path / f".{name}.part").write_bytes(b"0")
        os.utime(tmp_path / f".{name}.part", (time.time() - age,) * 2)
    trainer(tmp_path).run()
    assert [path.name for path in tmp_path.glob("*.part")] == [".growing.part"]


def test_new_training_does_not_begin_among_the_checkpoints_of_another(tmp_path):
    first = trainer(tmp_path)
    first.run()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="holds the checkpoints of an earlier training; continue it with --resume true"):
        trainer(tmp_path).run()
    assert (tmp_path / "last.pt").read_bytes() == before


def test_no_readable_checkpoint_at_all_is_an_error_not_a_silent_start_from_zero(tmp_path):
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"previous\.pt cannot be read .* no older checkpoint"):
        trainer(tmp_path, resume=True).run()


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    first = trainer(tmp_path, resume=True)
    first.run()
    assert first.state.iteration == 15


def test_checkpoint_of_other_data_is_refused(tmp_path):
    trainer(tmp_path, fingerprint={"datalist": "abc"}).run()
    with pytest.raises(UserError, match="made with datalist abc, this run has xyz"):
        trainer(tmp_path, resume=True, fingerprint={"datalist": "xyz"}).run()


def test_new_folder_continues_another_training_bit_for_bit(tmp_path):
    undisturbed = trainer(tmp_path / "a")
    undisturbed.run()
    with pytest.raises(KilledError):
        trainer(tmp_path / "b", handlers=[KillAt(8)]).run()
    source = tmp_path / "b/last.pt"
    before = source.read_bytes()

    continued = trainer(tmp_path / "c", resume_from=source)
    continued.run()

    assert continued.state.iteration == 15
    assert torch.equal(undisturbed.network.weight, continued.network.weight)
    assert source.read_bytes() == before
    assert (tmp_path / "c/last.pt").is_file()
    # its own checkpoints win over the other training's, which may be gone by then
    source.unlink()
    resumed = trainer(tmp_path / "c", resume=True, resume_from=source, max_epochs=4)
    resumed.run()
    assert resumed.state.iteration == 20


def test_source_of_another_training_is_looked_for_only_by_who_begins_with_it(tmp_path):
    trainer(tmp_path / "a").run()
    asked = []

    def find():
        asked.append(1)
        return tmp_path / "a/last.pt"

    begun = trainer(tmp_path / "b", resume=True, resume_from=find, max_epochs=4)
    begun.run()
    assert (begun.state.iteration, len(asked)) == (20, 1)
    resumed = trainer(tmp_path / "b", resume=True, resume_from=find, max_epochs=5)
    resumed.run()
    assert (resumed.state.iteration, len(asked)) == (25, 1)
    assert trainer(tmp_path / "c", resume_from=lambda: None)  # the setting is null


def test_complete_training_leaves_nothing_to_begin_with(tmp_path):
    trainer(tmp_path / "a").run()
    with pytest.raises(
        UserError, match=r"of .*last\.pt has seen 15 images, .* no step .*, 3 epochs .*; raise --max_epochs"
    ):
        trainer(tmp_path / "b", resume_from=tmp_path / "a/last.pt").run()
    assert not (tmp_path / "b").exists()
    # its own folder is another matter: resumed once more than needed, nothing happens
    trainer(tmp_path / "a", resume=True).run()


def test_state_of_another_training_with_other_data_is_refused(tmp_path):
    trainer(tmp_path / "a", fingerprint={"datalist": "abc"}).run()
    for wrong, message in (
        (
            {"fingerprint": {"datalist": "xyz"}},
            r"last\.pt was made with datalist abc, this run has xyz; --resume_from goes on",
        ),
        ({"resume_from": tmp_path / "none"}, r"no checkpoint at .*none; name OUT/checkpoints/last\.pt, or the output"),
        ({"resume_from": __file__}, r"is no checkpoint of a training \(\w+\); name OUT/checkpoints/last\.pt, or"),
    ):
        settings = {"resume_from": tmp_path / "a/last.pt", "fingerprint": {"datalist": "abc"}, **wrong}
        with pytest.raises(UserError, match=message):
            trainer(tmp_path / "b", **settings).run()


@pytest.mark.parametrize(("before", "after"), [(1, 5), (5, 1), (1, 2)])
def test_another_batch_size_continues_at_the_same_image(before, after, tmp_path):
    with pytest.raises(KilledError):
        trainer(tmp_path, batch_size=before, handlers=[KillAt(10 // before + 1)]).run()
    resumed = trainer(tmp_path, resume=True, batch_size=after)
    resumed.run()
    per_epoch = 5 // after * after
    assert resumed.images_seen == 3 * per_epoch
    assert resumed.state.epoch == 3


def test_loss_that_is_not_a_number_stops_the_training_and_is_never_saved(tmp_path):
    class Spoil:
        def attach(self, engine):
            engine.add_event_handler(
                Events.ITERATION_STARTED(once=7), lambda: engine.network.weight.data.fill_(torch.nan)
            )

    with pytest.raises(UserError, match="loss became nan at iteration 7; resume from the last checkpoint"):
        trainer(tmp_path, interval=1, handlers=[Spoil()]).run()
    resumed = trainer(tmp_path, resume=True)
    resumed.run()
    assert torch.isfinite(resumed.network.weight).all()


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    (tmp_path / "last.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="cannot be read"):
        TrainingCheckpoint(tmp_path, resume=True).load()
    assert not (tmp_path / "trapped").exists()


def test_save_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path):
    atomic_save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="pickle"):
        atomic_save({"a": torch.zeros(1), "b": lambda: None}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def evaluation(saver, value):
    engine = Engine(lambda *_: None)
    engine.state.key_metric_name = "l1"
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(l1=value))
    saver.attach(engine)
    engine.run([0])


def test_best_model_of_a_growing_network_is_one_of_its_last_stage(tmp_path):
    network, path, side = nn.Linear(1, 1, bias=False), tmp_path / "model.pt", [4]
    saver = BestModelSaver(network, path, stage=lambda: side[0])
    for weight, value, side[0] in ((1.0, 0.1, 4), (2.0, 0.5, 8), (3.0, 0.6, 8), (4.0, 0.4, 8), (5.0, 0.7, 8)):
        network.weight.data.fill_(weight)
        evaluation(saver, value)
    assert torch.load(path, weights_only=True)["weight"].item() == 4
    assert not (tmp_path / "model.previous.pt").exists()
    restarted = BestModelSaver(network, path, stage=lambda: side[0])
    restarted.load_state_dict(saver.state_dict())
    evaluation(restarted, 0.45)
    assert torch.load(path, weights_only=True)["weight"].item() == 4
    side[0] = 16
    evaluation(restarted, 9.0)
    assert torch.load(path, weights_only=True)["weight"].item() == 5


def test_best_model_is_kept_also_across_a_restart(tmp_path):
    network, path = nn.Linear(1, 1, bias=False), tmp_path / "model.pt"
    saver = BestModelSaver(network, path)
    for weight, value in ((1.0, 0.5), (2.0, 0.3), (3.0, 0.4)):
        network.weight.data.fill_(weight)
        evaluation(saver, value)
    assert torch.load(path, weights_only=True)["weight"].item() == 2
    restarted = BestModelSaver(network, path)
    restarted.load_state_dict(saver.state_dict())
    evaluation(restarted, 0.35)
    assert torch.load(path, weights_only=True)["weight"].item() == 2
    evaluation(restarted, 0.2)
    assert torch.load(path, weights_only=True)["weight"].item() == 3


def test_metric_that_is_not_a_number_is_never_the_best(tmp_path):
    network, path = nn.Linear(1, 1, bias=False), tmp_path / "model.pt"
    saver = BestModelSaver(network, path)
    evaluation(saver, float("nan"))
    assert not path.exists()
    evaluation(saver, 0.5)
    evaluation(saver, float("nan"))
    assert saver.best == 0.5


def test_model_of_another_training_is_kept_beside(tmp_path):
    network, path = nn.Linear(1, 1, bias=False), tmp_path / "model.pt"
    path.write_bytes(b"earlier")
    saver = BestModelSaver(network, path)
    evaluation(saver, 0.5)
    evaluation(saver, 0.4)
    assert (tmp_path / "model.previous.pt").read_bytes() == b"earlier"


def test_lost_file_of_the_best_model_is_made_anew(tmp_path):
    saver = BestModelSaver(nn.Linear(1, 1), tmp_path / "model.pt")
    saver.load_state_dict({"best": 0.1})
    evaluation(saver, 0.5)
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"network": {"weight": torch.zeros(1)}},
            "one flat state dict of tensors, got network; a checkpoint holds more",
        ),
        (None, "no weights at .*model.pt; train the bundle first"),
        (b"text", "not a file of plain weights"),
        (nn.Linear(2, 1).state_dict(), r"another architecture: this network has shape \(1, 3\) at weight, got shape"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    engine = Engine(lambda *_: None)
    WeightsLoader(nn.Linear(3, 1), path).attach(engine)
    with pytest.raises(UserError, match=message):
        engine.run([0])


def test_record_says_which_weights_the_best_file_holds(tmp_path):
    network, path, seen = nn.Linear(1, 1), tmp_path / "model.pt", [100]
    saver = BestModelSaver(network, path, record=tmp_path / "best.json", position=lambda: {"images_seen": seen[0]})
    evaluation(saver, 0.5)
    seen[0] = 200
    evaluation(saver, 0.6)
    record = json.loads((tmp_path / "best.json").read_text())
    assert record == {
        "metric": "l1",
        "value": 0.5,
        "epoch": 1,
        "images_seen": 100,
        "model": str(path),
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
