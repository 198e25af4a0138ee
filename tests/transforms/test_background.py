"""InBackground: every item is done, in threads or not, and no error is lost."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from medgen.errors import UserError
from medgen.transforms import InBackground
from medgen.transforms.background import WAITING


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_item_is_done_and_handed_on(num_workers):
    done = []
    background = InBackground(lambda item: done.append(item["n"]), num_workers)

    items = [{"n": n} for n in range(200)]
    handed_on = [background(item) for item in items]
    background.finish()

    assert all(a is b for a, b in zip(handed_on, items, strict=True))
    assert sorted(done) == list(range(200))


def test_the_caller_goes_on_meanwhile():
    may_end = threading.Event()
    background = InBackground(lambda item: may_end.wait(10), num_workers=1)

    background({})
    background({})  # is here although the first has not ended

    may_end.set()
    background.finish()


def test_items_do_not_pile_up():
    running, most = [0], [0]

    def work(item):
        running[0] -= 1
        time.sleep(0.001)

    background = InBackground(work, num_workers=1)
    for n in range(3 * WAITING):
        running[0] += 1
        background({"n": n})
        most[0] = max(most[0], running[0])
    background.finish()

    assert most[0] <= WAITING + 2


def test_items_that_wait_do_not_keep_their_batch():
    handed, may_end = [], threading.Event()

    def work(item):
        may_end.wait(10)
        handed.append(item["pred"])

    batch = torch.rand(8, 1, 4, 4)
    background = InBackground(work, num_workers=1)
    background({"pred": batch[3], "name": "a"})
    expected = batch[3].clone()
    batch.zero_()
    may_end.set()
    background.finish()

    assert torch.equal(handed[0], expected)
    assert handed[0].untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert WAITING * 16 <= 64  # items of the bundle's 16 threads: two batches, not thirty


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_comes_up(num_workers):
    def fail(item):
        raise UserError("the disk is full")

    def run() -> None:
        background = InBackground(fail, num_workers)
        background({})
        background.finish()

    with pytest.raises(UserError, match="the disk is full"):
        run()


def test_fewer_threads_than_none_are_refused():
    with pytest.raises(UserError, match="num_workers must be at least 0, got -1"):
        InBackground(print, -1)
