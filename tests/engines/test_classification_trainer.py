"""ClassificationTrainer against a plain PyTorch loop, and its resuming."""

from __future__ import annotations

import pytest
import torch
from monai.data import Dataset
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines import ClassificationTrainer

SEED = 3
STEPS = 8


def loader(n: int = 6, epoch_images: int = 8) -> ResumableDataLoader:
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    items = [{"image": image, "label": int(image.mean() > 0.5)} for image in images]
    return ResumableDataLoader(Dataset(items), batch_size=2, seed=SEED, epoch_images=epoch_images)


def parts(scheduled: bool = True) -> dict:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 2)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=STEPS, warmup_multiplier=0.1)
    return {"network": network, "optimizer": optimizer, "lr_scheduler": schedule if scheduled else None}


def trainer(given: dict, max_epochs: int = 2, **settings: int) -> ClassificationTrainer:
    return ClassificationTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=loader(**settings),
        loss_function=nn.CrossEntropyLoss(),
        seed=SEED,
        **given,
    )


def test_training_is_that_of_a_plain_loop_with_warm_up_and_cosine():
    given = parts()
    trainer(given).run()

    plain, data = parts(scheduled=False), loader()
    network, optimizer = plain["network"].train(), plain["optimizer"]
    batches = iter(data)
    for step in range(STEPS):
        rate = 0.1 + 0.45 * step if step < 2 else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 2) / 6)).item())
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        batch = next(batches)
        torch.manual_seed(derive_seed(SEED, 2, 0, data.images_seen))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
        optimizer.step()
    torch.testing.assert_close(given["network"].state_dict(), network.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheduled", [False, True])
def test_resumed_training_ends_with_the_same_state_bit_for_bit(scheduled):
    straight = parts(scheduled)
    trainer(straight).run()

    engine = trainer(parts(scheduled), max_epochs=1)
    engine.run()
    second = parts(scheduled)
    resumed = trainer(second)
    resumed.load_training_state(engine.training_state())
    resumed.run()

    for name, part in straight.items():
        if part is not None:
            torch.testing.assert_close(second[name].state_dict(), part.state_dict(), rtol=0, atol=0)


def test_number_of_steps_does_not_depend_on_the_number_of_images():
    engines = [trainer(parts(), n=n) for n in (3, 50)]
    for engine in engines:
        engine.run()
    assert [engine.state.iteration for engine in engines] == [STEPS, STEPS]
    assert [engine.images_seen for engine in engines] == [2 * STEPS, 2 * STEPS]


def test_output_names_what_the_handlers_read():
    engine = trainer(parts(), max_epochs=1)
    engine.run()
    (output,) = engine.state.output
    assert (output["image"].shape, output["label"].shape, output["pred"].shape) == ((2, 1, 8, 8), (2,), (2, 2))
    assert output["loss"].ndim == 0
