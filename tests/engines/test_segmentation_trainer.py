"""SegmentationTrainer against a plain PyTorch loop, and its resuming."""

from __future__ import annotations

import pytest
import torch
from monai.data import Dataset
from monai.losses import DiceCELoss

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines import SegmentationTrainer
from medgen.networks import DropoutUNet

SEED = 3


def loader(n=6, batch_size=2) -> ResumableDataLoader:
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    items = [{"image": image, "label": (image > 0.5).float()} for image in images]
    return ResumableDataLoader(Dataset(items), batch_size=batch_size, seed=SEED)


def parts(ema=False) -> dict:
    torch.manual_seed(0)
    network = DropoutUNet(channels=(4, 8), dropout=0.3)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    return {
        "network": network,
        "optimizer": torch.optim.Adam(network.parameters(), lr=1e-2),
        "ema": torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average) if ema else None,
    }


def trainer(given: dict, max_epochs=2) -> SegmentationTrainer:
    return SegmentationTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=loader(),
        loss_function=DiceCELoss(sigmoid=True),
        seed=SEED,
        **given,
    )


def test_training_is_that_of_a_plain_loop_with_the_same_noise():
    given = parts()
    trainer(given).run()

    plain, data = parts(), loader()
    network, optimizer, loss_function = plain["network"].train(), plain["optimizer"], DiceCELoss(sigmoid=True)
    batches = iter(data)
    for _ in range(6):
        batch = next(batches)
        torch.manual_seed(derive_seed(SEED, 2, 0, data.images_seen))
        optimizer.zero_grad()
        loss_function(network(batch["image"]), batch["label"]).backward()
        optimizer.step()
    torch.testing.assert_close(given["network"].state_dict(), network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("ema", [False, True])
def test_resumed_training_ends_with_the_same_state_bit_for_bit(ema):
    straight = parts(ema)
    trainer(straight, max_epochs=4).run()

    first = parts(ema)
    engine = trainer(first, max_epochs=2)
    engine.run()
    state = engine.training_state()
    second = parts(ema)
    resumed = trainer(second, max_epochs=4)
    resumed.load_training_state(state)
    resumed.run()

    for name, part in straight.items():
        if part is not None:
            torch.testing.assert_close(second[name].state_dict(), part.state_dict(), rtol=0, atol=0)


def test_moving_average_is_of_the_steps():
    given = parts(ema=True)
    trainer(given, max_epochs=1).run()
    assert given["ema"].n_averaged == 3
    weights = [dict(net.named_parameters())["head.weight"] for net in (given["network"], given["ema"].module)]
    assert not torch.equal(*weights)


def test_output_names_what_the_handlers_read():
    engine = trainer(parts(), max_epochs=1)
    engine.run()
    (output,) = engine.state.output
    assert output["image"].shape == output["label"].shape == output["pred"].shape == (2, 1, 8, 8)
    assert output["loss"].ndim == 0
