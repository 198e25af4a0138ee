"""A checkpoint that is broken anywhere is refused, or gives what was saved; what is left is found."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines import GenerativeTrainer
from medgen.errors import UserError
from medgen.handlers import BestModelSaver, TrainingCheckpoint, checkpoint

PAGE = 512


class Regression(GenerativeTrainer):
    """A small training with all kinds of state: weights, moments, numbers, texts."""

    def __init__(self, **kwargs):
        self.network = nn.Sequential(nn.Linear(1, 40), nn.Linear(40, 1))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        super().__init__(components={"network": self.network, "optimizer": self.optimizer}, **kwargs)

    def _iteration(self, engine, batch):
        self.seed_step()
        loss = (self.network(batch["image"] + torch.randn(1)) - batch["image"]).square().mean()
        self.update(self.optimizer, self.network, loss)
        return [{"loss": loss.detach()}]


def trainer(folder, resume=True, max_epochs=2):
    torch.manual_seed(0)
    loader = ResumableDataLoader(Dataset([{"image": torch.ones(1) * i} for i in range(5)]), 1, seed=1)
    handlers = [TrainingCheckpoint(folder, 2, resume, {"datalist": "0123abcd", "lr": 0.1})]
    return Regression(device="cpu", max_epochs=max_epochs, train_data_loader=loader, train_handlers=handlers)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder).run()
    return folder


def read(folder):
    """What a training in the folder would go on from."""
    return TrainingCheckpoint(folder, resume=True).load()


def same(a, b):
    """Whether two states are equal, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def regions(path: Path) -> dict[str, list[int]]:
    """Bytes of a file of torch.save by what they are: all of those that say something, some of the others."""
    found: dict[str, list[int]] = {"local headers": [], "content": [], "between": [], "directory": []}
    size = path.stat().st_size
    with zipfile.ZipFile(path) as file:
        end = file.start_dir
        taken = set()
        for entry in file.infolist():
            name = len(entry.filename.encode())
            begin = entry.header_offset
            raw = path.read_bytes()
            extra = int.from_bytes(raw[begin + 28 : begin + 30], "little")
            content = begin + 30 + name + extra
            found["local headers"] += range(begin, begin + 30 + name + 8)
            found["between"] += range(begin + 30 + name + 8, content, 7)
            found["content"] += range(content, content + entry.compress_size, 1 if entry.compress_size < 300 else 37)
            taken |= set(range(begin, content + entry.compress_size))
        found["between"] += sorted(set(range(end)) - taken)[::5]
    found["directory"] = list(range(end, size))
    # a third of all, another one in each run of the tests: reading takes 10 ms
    first = random.randrange(3)
    return {name: places[first::3] for name, places in found.items()}


def test_flipped_bit_anywhere_is_refused_or_harmless(trained, tmp_path):
    whole = (trained / "last.pt").read_bytes()
    (last, state), (previous, older) = read(trained), (trained / "previous.pt", None)
    assert last == trained / "last.pt"
    older = torch.load(previous, weights_only=True)
    assert not same(state, older)
    shutil.copyfile(previous, tmp_path / "previous.pt")
    outcomes = {}
    for region, places in regions(last).items():
        refused = 0
        for place in places:
            broken = bytearray(whole)
            bit = random.randrange(8)
            broken[place] ^= 1 << bit
            (tmp_path / "last.pt").write_bytes(broken)
            source, found = read(tmp_path)
            assert same(found, state if source.name == "last.pt" else older), (region, place, bit)
            refused += source.name == "previous.pt"
        outcomes[region] = (refused, len(places))
    refused, all_of = outcomes["content"]
    assert refused == all_of > 100  # whatever a training goes on from
    assert all(number > 0 for _, number in outcomes.values()), outcomes


def test_entry_that_torch_would_take_for_a_folder_is_refused(trained, tmp_path):
    with zipfile.ZipFile(trained / "last.pt") as file:
        directory, name = file.start_dir, next(n.encode() for n in file.namelist() if n.endswith("/data/0"))
    broken = bytearray((trained / "last.pt").read_bytes())
    broken[broken.index(name, directory) - 46 + 38] |= 0x10  # in the external attributes, which no checksum covers
    (tmp_path / "last.pt").write_bytes(broken)
    with pytest.raises(UserError, match=r"last\.pt cannot be read \(BadZipFile\)"):
        read(tmp_path)


def test_file_that_is_cut_or_has_pages_of_zeros_is_refused_or_harmless(trained, tmp_path):
    whole = (trained / "last.pt").read_bytes()
    state, older = (torch.load(trained / name, weights_only=True) for name in ("last.pt", "previous.pt"))
    shutil.copyfile(trained / "previous.pt", tmp_path / "previous.pt")
    lengths = sorted({*range(0, len(whole), 97), *range(len(whole) - 60, len(whole))})
    broken = [whole[:length] for length in lengths]
    cut = len(broken)
    for begin in range(0, len(whole), PAGE):
        end = min(begin + PAGE, len(whole))
        broken += [whole[:begin] + bytes(end - begin) + whole[end:], whole[:begin] + bytes(len(whole) - begin)]
    for number, content in enumerate(broken):
        (tmp_path / "last.pt").write_bytes(content)
        source, found = read(tmp_path)
        if number < cut:
            assert source.name == "previous.pt", len(content)
        assert same(found, state if source.name == "last.pt" else older), number


def test_bit_flipped_in_the_weights_costs_the_way_from_the_one_before_and_nothing_else(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "a")
    content = bytearray((tmp_path / "a/last.pt").read_bytes())
    weights = torch.load(tmp_path / "a/last.pt", weights_only=True)["components"]["network"]["0.weight"]
    content[content.index(weights.numpy().tobytes()) + 2] ^= 4
    (tmp_path / "a/last.pt").write_bytes(content)
    torch.load(tmp_path / "a/last.pt", weights_only=True)  # torch itself sees nothing
    good = (tmp_path / "a/previous.pt").read_bytes()

    resumed = trainer(tmp_path / "a", max_epochs=3)
    after_start = []
    resumed.add_event_handler(
        Events.ITERATION_STARTED(once=1), lambda: after_start.append(sorted(p.name for p in (tmp_path / "a").iterdir()))
    )
    saved = []
    resumed.add_event_handler(
        Events.EPOCH_COMPLETED(once=2), lambda: saved.append((tmp_path / "a/previous.pt").read_bytes())
    )
    resumed.run()

    assert "last.pt cannot be read (BadZipFile); trying the one before it" in caplog.text
    assert "last.pt is kept as" in caplog.text
    assert (tmp_path / "a/last.corrupt.pt").read_bytes() == bytes(content)
    assert saved == [good]  # the broken file did not take its place
    undisturbed = trainer(tmp_path / "b", max_epochs=3)
    undisturbed.run()
    assert same(*(torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "ab"))


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_kill_between_the_renames_of_a_save_loses_nothing(renames, tmp_path, monkeypatch):
    rename = os.replace
    done = []

    class KilledError(BaseException):
        pass

    def killed(source, target):
        if Path(target).name in ("newest.pt", "previous.pt", "last.pt") and trained_so_far.images_seen == 4:
            done.append(target)
            if len(done) == renames + 1 - (renames == 3):
                raise KilledError
        rename(source, target)

    trained_so_far = trainer(tmp_path / "a")
    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KilledError):
        trained_so_far.run()
    monkeypatch.undo()
    resumed = trainer(tmp_path / "a")
    positions = []
    resumed.add_event_handler(Events.ITERATION_STARTED, lambda: positions.append(resumed.images_seen))
    resumed.run()
    assert positions[0] == 5  # the first image after those of the newest state
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".training", "last.pt", "previous.pt"]
    undisturbed = trainer(tmp_path / "b")
    undisturbed.run()
    assert same(*(torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "ab"))


def test_folder_with_broken_files_alone_is_never_a_beginning(trained, tmp_path):
    (tmp_path / "newest.pt").write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r"newest\.pt cannot be read \(BadZipFile\) and there is no older checkpoint"):
        trainer(tmp_path).run()
    assert (tmp_path / "newest.pt").is_file()  # untouched
    os.replace(tmp_path / "newest.pt", tmp_path / "last.corrupt.pt")
    with pytest.raises(UserError, match=r"last\.corrupt\.pt cannot be read .* start again with another --output_dir"):
        trainer(tmp_path).run()


def test_broken_best_model_is_written_anew(tmp_path, caplog):
    saver = BestModelSaver(nn.Linear(1, 1), tmp_path / "model.pt")
    torch.save(saver.network.state_dict(), tmp_path / "model.pt")
    saver.load_state_dict({"best": 0.1})
    assert saver.best == 0.1
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[content.index(saver.network.bias.detach().numpy().tobytes())] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    saver.load_state_dict({"best": 0.1})
    assert saver.best is None
    assert "the next validation writes a model anew" in caplog.text
