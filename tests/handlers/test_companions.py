"""Weights and what they cannot be used without belong to one training, whenever the run is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from medgen.data import file_sha256
from medgen.errors import UserError
from medgen.handlers import BestModelSaver, ModelCompanions, check_trained_as, checkpoint, companions


class KilledError(Exception):
    pass


def training(folder: Path, name: str, prediction_type: str = "v_prediction") -> BestModelSaver:
    """The saver of a training; its autoencoder's file and its only weight hold its name."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "ae.pt").write_bytes(name.encode())
    (folder / name / "scaling.json").write_text(name)
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(ord(name))
    path = folder / "models" / "model.pt"
    files = {"autoencoder.pt": folder / name / "ae.pt", "scaling.json": folder / name / "scaling.json"}
    about = {"prediction_type": prediction_type, "scale": (0.5,)}
    return BestModelSaver(network, path, companions=ModelCompanions(path, files, about, {"dataset": name}))


def validate(saver: BestModelSaver, value: float) -> None:
    engine = Engine(lambda *_: None)
    engine.state.key_metric_name, engine.state.metrics = "val_loss", {"val_loss": value}
    saver(engine)


def names(folder: Path) -> dict[str, str]:
    """Which training each file of a folder of models is from."""
    found = {
        name: (folder / name).read_text() for name in ("autoencoder.pt", "scaling.json") if (folder / name).exists()
    }
    if (folder / "trained_on.json").exists() and (folder / "model.pt").exists():
        record = json.loads((folder / "trained_on.json").read_text())
        if file_sha256(folder / "model.pt") in record["weights_sha256"]:  # of others it says nothing
            found["trained_on.json"] = record["dataset"]
    if (folder / "model.pt").exists():
        found["model.pt"] = chr(int(torch.load(folder / "model.pt", weights_only=True)["weight"].item()))
    return found


ALL = ("autoencoder.pt", "scaling.json", "trained_on.json", "model.pt")


def test_companions_come_with_the_first_weights_and_go_with_the_old(tmp_path):
    models = tmp_path / "models"
    saver = training(tmp_path, "a")
    assert not models.exists()
    validate(saver, 1.0)
    assert names(models) == dict.fromkeys(ALL, "a")

    other = training(tmp_path, "b", "epsilon")  # and killed before its first validation
    check_trained_as(models / "model.pt", prediction_type="v_prediction", scale=[0.5])
    assert names(models) == dict.fromkeys(ALL, "a")

    validate(other, 2.0)
    assert names(models) == dict.fromkeys(ALL, "b")
    assert names(models / "previous") == dict.fromkeys(ALL, "a")
    check_trained_as(models / "model.pt", prediction_type="epsilon")
    check_trained_as(models / "previous" / "model.pt", prediction_type="v_prediction", scale=(0.5,))
    with pytest.raises(UserError, match="prediction_type must be epsilon as in the training of"):
        check_trained_as(models / "model.pt", prediction_type="v_prediction")


def test_later_weights_leave_the_companions_alone(tmp_path):
    saver = training(tmp_path, "a")
    validate(saver, 1.0)
    before = (tmp_path / "models" / "trained_as.json").stat().st_mtime_ns
    saver.network.weight.data.fill_(ord("c"))

    validate(saver, 0.5)

    assert names(tmp_path / "models") == {**dict.fromkeys(ALL, "a"), "model.pt": "c"}  # vouched for, as the first
    assert (tmp_path / "models" / "trained_as.json").stat().st_mtime_ns == before
    assert not (tmp_path / "models" / "previous").exists()


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_leaves_no_weights_with_the_companions_of_others(tmp_path, monkeypatch, moment):
    models = tmp_path / "models"
    validate(training(tmp_path, "z"), 3.0)
    validate(training(tmp_path, "a"), 3.0)
    calls = 0

    def killed(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KilledError
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(companions, "_copy", killed(companions._copy))
        patch.setattr(companions, "atomic_write_text", killed(companions.atomic_write_text))
        patch.setattr(checkpoint, "atomic_save", killed(checkpoint.atomic_save))
        with pytest.raises(KilledError):
            validate(training(tmp_path, "b", "epsilon"), 1.0)

    for folder in (models, models / "previous"):
        found = names(folder)
        assert "model.pt" not in found or len(set(found.values())) == 1
        if "model.pt" in found and (folder / "trained_as.json").exists():
            check_trained_as(
                folder / "model.pt", prediction_type="epsilon" if found["model.pt"] == "b" else "v_prediction"
            )
    assert "a" in (names(models).get("model.pt"), names(models / "previous").get("model.pt"))
    validate(training(tmp_path, "b", "epsilon"), 1.0)
    assert names(models) == dict.fromkeys(ALL, "b")
    check_trained_as(models / "model.pt", prediction_type="epsilon")


def test_a_kill_between_later_weights_and_their_record_leaves_them_without_a_word(tmp_path, monkeypatch):
    saver = training(tmp_path, "a")
    validate(saver, 1.0)
    saver.network.weight.data.fill_(ord("c"))
    with monkeypatch.context() as patch:
        patch.setattr(companions, "atomic_write_text", lambda *_: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            validate(saver, 0.5)
    assert "trained_on.json" not in names(tmp_path / "models")
    assert names(tmp_path / "models")["model.pt"] == "c"

    saver.best = 1.0  # the validation is repeated when the training goes on
    validate(saver, 0.5)
    assert names(tmp_path / "models") == {**dict.fromkeys(ALL, "a"), "model.pt": "c"}


def test_resumed_training_of_an_older_version_leaves_its_record_with_its_next_weights(tmp_path):
    older = BestModelSaver(nn.Linear(1, 1, bias=False), tmp_path / "models" / "model.pt")
    validate(older, 1.0)
    resumed = training(tmp_path, "a")
    resumed.load_state_dict(older.state_dict())

    validate(resumed, 0.5)

    assert names(tmp_path / "models") == dict.fromkeys(ALL, "a")
    assert not (tmp_path / "models" / "previous").exists()


def test_only_what_a_training_knows_of_itself_lies_beside_its_weights(tmp_path):
    validate(training(tmp_path, "a"), 1.0)
    path = tmp_path / "models" / "model.pt"
    network = nn.Linear(1, 1, bias=False)

    validate(BestModelSaver(network, path, companions=ModelCompanions(path, trained_on={"dataset": "b"})), 1.0)
    assert not path.with_name("trained_as.json").exists()
    assert names(path.parent)["trained_on.json"] == "b"
    check_trained_as(path.parent / "previous" / "model.pt", prediction_type="v_prediction")

    validate(BestModelSaver(network, path, companions=ModelCompanions(path, record={"space": "z"})), 1.0)
    assert not path.with_name("trained_on.json").exists()
    assert not (path.parent / "previous" / "trained_as.json").exists()
    assert names(path.parent / "previous")["trained_on.json"] == "b"


def test_the_autoencoder_may_lie_beside_the_weights_already(tmp_path):
    saver = training(tmp_path, "a")
    saver.companions.files["autoencoder.pt"] = tmp_path / "models" / "autoencoder.pt"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "autoencoder.pt").write_bytes(b"a")

    validate(saver, 1.0)

    assert names(tmp_path / "models") == dict.fromkeys(ALL, "a")


@pytest.mark.parametrize("content", [None, [1], "text"])
def test_a_record_of_something_else_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "trained_as.json").write_text(json.dumps(content))

    with pytest.raises(UserError, match=r"trained_as\.json must hold the settings of a training") as caught:
        check_trained_as(tmp_path / "model.pt", conditioning="none")

    assert "\n" not in str(caught.value)
