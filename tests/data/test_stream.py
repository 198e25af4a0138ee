"""ResumableDataLoader: order and augmentation are functions of (seed, position)."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import Compose, Lambdad, RandGaussianNoised

from medgen.data.stream import ResumableDataLoader
from medgen.errors import UserError

NOISE = Compose([Lambdad(keys="image", func=torch.as_tensor), RandGaussianNoised(keys="image", prob=0.5)])


def items(n):
    return [{"image": torch.full((1, 2, 2), float(i))} for i in range(n)]


def batches(loader, count):
    return [batch["image"] for batch in islice(loader, count)]


def test_each_pass_shows_every_image_once_in_an_order_of_its_own():
    loader = ResumableDataLoader(Dataset(items(12)), batch_size=3, seed=5)
    seen = torch.stack(batches(loader, 8))[..., 0, 0].reshape(2, 12)
    assert all(sorted(row.tolist()) == list(range(12)) for row in seen)
    assert not torch.equal(seen[0], seen[1])


def test_stream_goes_on_where_it_was_left_with_the_same_augmentation():
    whole = batches(ResumableDataLoader(Dataset(items(10), NOISE), batch_size=2, seed=1), 12)
    rest = ResumableDataLoader(Dataset(items(10), NOISE), batch_size=2, seed=1)
    rest.images_seen = 14
    assert all(torch.equal(a, b) for a, b in zip(whole[7:], batches(rest, 5), strict=True))


def test_batches_do_not_depend_on_workers_or_on_caching():
    alone = batches(ResumableDataLoader(Dataset(items(10), NOISE), batch_size=2, seed=1), 6)
    cached = CacheDataset(items(10), NOISE, progress=False)
    helped = batches(ResumableDataLoader(cached, batch_size=2, seed=1, num_workers=2), 6)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_another_seed_gives_another_order():
    first, second = (
        torch.cat(batches(ResumableDataLoader(Dataset(items(10)), batch_size=5, seed=s), 2)) for s in (1, 2)
    )
    assert not torch.equal(first, second)


def test_images_seen_counts_what_was_handed_out_not_what_was_prefetched():
    loader = ResumableDataLoader(Dataset(items(10)), batch_size=2, seed=1, num_workers=1)
    batches(loader, 3)
    assert loader.images_seen == 6


def test_split_smaller_than_a_batch_is_refused():
    with pytest.raises(UserError, match=r"takes 4 images .*holds 3; lower --batch_size"):
        ResumableDataLoader(Dataset(items(3)), batch_size=4)


def test_epoch_can_be_a_number_of_images_longer_or_shorter_than_the_dataset():
    assert len(ResumableDataLoader(Dataset(items(10)), batch_size=2, epoch_images=31)) == 16
    assert len(ResumableDataLoader(Dataset(items(10)), batch_size=2, epoch_images=4)) == 2
    assert len(ResumableDataLoader(Dataset(items(10)), batch_size=4, epoch_images=3)) == 1
    with pytest.raises(UserError, match=r"epoch_images must be at least 1, got 0; raise --tick_images"):
        ResumableDataLoader(Dataset(items(10)), batch_size=4, epoch_images=0)
