"""PGGANTrainer against a plain PyTorch loop, its growth, and its resuming."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.transforms import LoadImaged
from PIL import Image

from medgen.data import MedicalImageReader
from medgen.data.growth import GrowthSchedule
from medgen.data.pyramid import GrowingDataLoader, ImagePyramid
from medgen.data.stream import derive_seed
from medgen.engines import PGGAN_TRAINING, PGGANTrainer, exponential_moving_copy, growth_schedule, pggan_setting
from medgen.engines.pggan import faded
from medgen.errors import UserError
from medgen.handlers import LevelSaver, TrainingCheckpoint
from medgen.networks import PGGAN_PRESETS, PGGANDiscriminator, PGGANGenerator

SEED = 3
CHANNELS = (6, 5, 4)
EPSILON = 1e-3  # of Adam: with a tiny one the sign of a gradient that is nearly 0 decides a whole step
# levels end after 16, 46 (the step from 40 on) and 88 images
SCHEDULE = GrowthSchedule((4, 8, 16), (4, 6, 2), (0.002, 0.001, 0.003), (16, 28, 44), (0, 12, 20))
# two images on each of two processes
SHARED = GrowthSchedule((4, 8, 16), (4, 6, 4), (0.002, 0.001, 0.003), (16, 28, 44), (0, 12, 20))


def make_pyramid(folder: Path, count=30) -> ImagePyramid:
    """Of 16×16 noise."""
    pixels = np.random.default_rng(1).integers(0, 256, (count, 16, 16), dtype=np.uint8)
    for place, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{place}.png")
    data = [{"image": str(folder / f"{place}.png"), "label": place % 2} for place in range(count)]
    transform = LoadImaged(keys="image", reader=MedicalImageReader, ensure_channel_first=True, image_only=True)
    return ImagePyramid(data, transform, image_size=16, channels=1, cache_dir=folder)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> ImagePyramid:
    return make_pyramid(tmp_path_factory.mktemp("pyramid"))


def parts(num_classes=0) -> dict:
    torch.manual_seed(0)
    generator = PGGANGenerator(CHANNELS, latent_dim=8, num_classes=num_classes)
    discriminator = PGGANDiscriminator(CHANNELS, num_classes=num_classes, minibatch_group_size=None)
    return {
        "generator": generator,
        "discriminator": discriminator,
        "ema": exponential_moving_copy(generator),
        "g_optimizer": torch.optim.Adam(generator.parameters(), lr=1.0, betas=(0.0, 0.99), eps=EPSILON),
        "d_optimizer": torch.optim.Adam(discriminator.parameters(), lr=1.0, betas=(0.0, 0.99), eps=EPSILON),
    }


def trainer(given: dict, pyramid: ImagePyramid, schedule=SCHEDULE, **kwargs) -> PGGANTrainer:
    settings = {
        "device": "cpu",
        "max_epochs": -(-kwargs.get("max_images", schedule.total_images) // 20),
        "max_images": schedule.total_images,
        "epoch_images": 20,
        "train_data_loader": GrowingDataLoader(pyramid, schedule, seed=SEED),
        "ema_decay": 0.9,
        "seed": SEED,
    }
    return PGGANTrainer(**{**settings, **given, **kwargs})


def outputs(engine: PGGANTrainer) -> list[dict]:
    """The output of each step of a run."""
    found: list[dict] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: found.append(dict(engine.state.output[0])))
    engine.run()
    return found


def test_weights_equal_those_of_a_plain_loop_written_from_the_paper(pyramid):
    ours, plain = parts(num_classes=2), parts(num_classes=2)
    trainer(ours, pyramid, gradient_penalty_weight=5.0, drift=0.01, class_weight=0.5).run()

    generator, discriminator, ema = plain["generator"], plain["discriminator"], plain["ema"]
    batches = iter(GrowingDataLoader(pyramid, SCHEDULE, seed=SEED))
    # (images before the step, side, alpha, batch, learning rate); Adam starts anew where a fade begins or ends
    seen, phases = 0, []
    while seen < 88:
        if seen < 16:
            side, alpha, batch, lr, phase = 4, 1.0, 4, 0.002, "stable 4"
        elif seen < 44:
            side, batch, lr = 8, 6, 0.001
            alpha = min((seen - 16) / 12, 1.0)
            phase = "fade 8" if alpha < 1 else "stable 8"
        else:
            side, batch, lr = 16, 2, 0.003
            alpha = min((seen - 44) / 20, 1.0)
            phase = "fade 16" if alpha < 1 else "stable 16"
        if not phases or phases[-1] != phase:
            phases.append(phase)
            g_adam = torch.optim.Adam(generator.parameters(), lr=lr, betas=(0.0, 0.99), eps=EPSILON)
            d_adam = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.0, 0.99), eps=EPSILON)
        generator.grow(side, alpha)
        discriminator.grow(side, alpha)
        data = next(batches)
        image, label = data["image"].float() / 255 * 2 - 1, data["label"]
        assert image.shape == (batch, 1, side, side)
        if alpha < 1:
            coarse = image.reshape(batch, 1, side // 2, 2, side // 2, 2).mean((3, 5))
            image = alpha * image + (1 - alpha) * coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        seen += batch
        torch.manual_seed(derive_seed(SEED, 2, 0, seen))

        fake = generator(torch.randn(batch, 8), label).detach()
        real_out, fake_out = discriminator(image), discriminator(fake)
        t = torch.rand(batch, 1, 1, 1)
        between = (t * fake + (1 - t) * image).requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(between)[:, 0].sum(), between, create_graph=True)
        penalty = 5.0 * (gradient.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
        loss = fake_out[:, 0].mean() - real_out[:, 0].mean() + 0.01 * real_out[:, 0].square().mean() + penalty
        for out in (real_out, fake_out):
            loss = loss - 0.5 * out[:, 1:].log_softmax(1)[range(batch), label].mean()
        d_adam.zero_grad()
        loss.backward()
        d_adam.step()
        with torch.no_grad():
            for average, value in zip(ema.parameters(), generator.parameters(), strict=True):
                average.copy_(0.9 * average + 0.1 * value)
        out = discriminator(generator(torch.randn(batch, 8), label))
        loss = -out[:, 0].mean() - 0.5 * out[:, 1:].log_softmax(1)[range(batch), label].mean()
        g_adam.zero_grad()
        loss.backward()
        g_adam.step()

    assert phases == ["stable 4", "fade 8", "stable 8", "fade 16", "stable 16"]
    for part in ("generator", "discriminator", "ema"):
        state = ours[part].state_dict()
        for name, value in plain[part].named_parameters():
            torch.testing.assert_close(state[name], value.detach(), rtol=1e-3, atol=1e-4, msg=f"{part} {name}")


def test_images_are_shown_at_each_level_as_scheduled(pyramid):
    steps = outputs(trainer(parts(), pyramid))
    shown = {side: sum(len(step["image"]) for step in steps if step["resolution"] == side) for side in (4, 8, 16)}
    assert shown == {4: 16, 8: 30, 16: 42}
    assert {(step["resolution"], len(step["image"])) for step in steps} == {(4, 4), (8, 6), (16, 2)}
    alphas = [step["alpha"] for step in steps if step["resolution"] == 8]
    assert alphas == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert [step["images_seen"] for step in steps[-2:]] == [86, 88]
    assert all(step["image"].shape == step["pred"].shape for step in steps)


def test_epochs_end_by_images_and_the_last_one_with_the_training(pyramid):
    engine = trainer(parts(), pyramid, max_images=84)
    ends = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: ends.append((engine.state.epoch, engine.images_seen)))
    engine.run()
    assert ends == [(1, 22), (2, 40), (3, 60), (4, 80), (5, 84)]


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 9, 10, 15, 29])
def test_resumed_training_ends_with_the_same_state_bit_for_bit(stop_at, pyramid, tmp_path):
    engine = trainer(parts(), pyramid)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=stop_at), lambda: torch.save(engine.training_state(), tmp_path / "state.pt")
    )
    engine.run()
    resumed = trainer(parts(), pyramid)
    torch.rand(7)  # the generators of another process stand elsewhere
    resumed.load_training_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.state.iteration == stop_at
    resumed.run()
    torch.testing.assert_close(engine.training_state(), resumed.training_state(), rtol=0, atol=0)
    assert resumed.state.iteration == engine.state.iteration == 30
    assert resumed.state.epoch == engine.state.epoch == 5


def test_a_level_keeps_its_weights_and_they_know_how_far_they_are_grown(pyramid, tmp_path):
    given = parts()
    engine = trainer(given, pyramid)
    LevelSaver(given["ema"], tmp_path / "model.pt").attach(engine)
    at_end = {}

    @engine.on(Events.ITERATION_COMPLETED)
    def look(_):
        at_end[given["ema"].resolution] = given["ema"].blocks[0].conv.weight.detach().clone()

    engine.run()
    assert sorted(path.name for path in (tmp_path / "levels").iterdir()) == ["0004.pt", "0008.pt", "0016.pt"]
    for side in (4, 8, 16):
        network = PGGANGenerator(CHANNELS, latent_dim=8)
        network.load_state_dict(torch.load(tmp_path / "levels" / f"{side:04d}.pt", weights_only=True))
        assert (network.resolution, network.alpha) == (side, 1.0)
        assert torch.equal(network.blocks[0].conv.weight, at_end[side])
        assert network(torch.zeros(1, 8)).shape == (1, 1, side, side)
    assert not torch.equal(at_end[4], at_end[8])


def test_layers_of_levels_to_come_stay_as_they_are(pyramid):
    given = parts()
    before = {name: value.clone() for name, value in given["generator"].named_parameters()}
    trainer(given, pyramid, max_images=40).run()
    moved = {name for name, value in given["generator"].named_parameters() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("blocks.2.", "to_rgb.2.")) for name in moved)
    assert {"blocks.1.conv0.weight", "to_rgb.1.weight", "blocks.0.dense.bias"} <= moved


def test_the_discriminator_sees_no_gradient_of_the_generators_step(pyramid):
    given = parts()
    engine = trainer(given, pyramid, max_images=4)
    engine.run()
    # what the discriminator's own step left: the generator's backward pass added nothing
    again = parts()
    second = trainer(again, pyramid, max_images=4)
    second.g_optimizer.step = lambda: None
    second.run()
    for a, b in zip(given["discriminator"].parameters(), again["discriminator"].parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    assert all(p.requires_grad for p in given["discriminator"].parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_real_images_are_faded_by_their_2x2_means(alpha):
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    mean = np.kron([[2.5, 4.5], [10.5, 12.5]], np.ones((2, 2)))
    expected = alpha * image + (1 - alpha) * torch.tensor(mean, dtype=torch.float32)
    torch.testing.assert_close(faded(image, alpha), expected)


def test_checkpoint_tells_a_killed_training_where_it_stood(pyramid, tmp_path):
    engine = trainer(parts(), pyramid, max_images=60)
    TrainingCheckpoint(tmp_path, interval=1).attach(engine)
    engine.run()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["images_seen"] == 60
    assert state["components"]["growth"] == {"iteration": 16, "phase": 3}
    assert state["components"]["generator"]["growth"].tolist() == [16.0, pytest.approx((58 - 44) / 20)]
    longer = trainer(parts(), pyramid)
    TrainingCheckpoint(tmp_path, interval=1, resume=True).attach(longer)
    longer.run()
    assert (longer.images_seen, longer.state.iteration) == (88, 30)
    complete = trainer(parts(), pyramid)
    TrainingCheckpoint(tmp_path, interval=1, resume=True).attach(complete)
    assert outputs(complete) == []


def _train_in_a_group(rank: int, folder: Path) -> None:
    """One of two processes: a whole training, and what it has seen."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    given = parts()
    if rank:  # rank 0's networks are handed to all
        torch.nn.init.normal_(given["generator"].blocks[0].dense.weight)
    engine = trainer(given, make_pyramid(folder / str(rank)), SHARED)
    steps = outputs(engine)
    torch.save([step["image"] for step in steps], folder / f"images{rank}.pt")
    torch.save(engine.training_state(), folder / f"state{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow(reason="starts two processes, which import MONAI")
def test_two_processes_see_disjoint_images_and_stay_one_network(pyramid, tmp_path):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    torch.multiprocessing.spawn(_train_in_a_group, (tmp_path,), nprocs=2)
    states, images = (
        [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("state", "images")
    )
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    alone = [step["image"] for step in outputs(trainer(parts(), pyramid, SHARED))]
    assert len(alone) == len(images[0]) == len(images[1])
    for whole, first, second in zip(alone, *images, strict=True):  # every other image each
        torch.testing.assert_close(whole[0::2], first)
        torch.testing.assert_close(whole[1::2], second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must be from 0 to below 1, got 1\.0"),
        ({"drift": -1.0}, r"drift must be 0 or more, got -1\.0"),
        ({"gradient_penalty_target": 0}, "gradient_penalty_target must be positive, got 0"),
        ({"max_images": 89}, "max_images must be from 1 to the schedule's 88, got 89"),
        ({"max_images": 0}, "max_images must be from 1"),
        ({"epoch_images": 5}, "at least one step, 6 images, got 5; raise --tick_images"),
    ],
)
def test_settings_out_of_range_are_told_before_the_training(change, message, pyramid):
    with pytest.raises(UserError, match=message):
        trainer(parts(), pyramid, **change)


def test_networks_that_do_not_fit_the_schedule_or_each_other_are_refused(pyramid):
    shorter = GrowthSchedule((4, 8), (4, 4), (0.1, 0.1), (8, 8), (0, 4))
    with pytest.raises(UserError, match=r"the levels \[4, 8\], the networks \[4, 8, 16\]"):
        trainer(parts(), pyramid, shorter)
    given = {**parts(), "discriminator": PGGANDiscriminator(CHANNELS, num_classes=2, minibatch_group_size=None)}
    with pytest.raises(UserError, match=r"num_classes 0, the discriminator 2"):
        trainer(given, pyramid)


def test_batches_that_make_no_whole_groups_are_told_before_the_training(pyramid, caplog, monkeypatch):
    given = {**parts(), "discriminator": PGGANDiscriminator(CHANNELS, minibatch_group_size=4)}
    with pytest.raises(UserError, match=r"the 6 images .* at 8×8 must be a multiple of minibatch_group_size 4"):
        trainer(given, pyramid)
    single = GrowthSchedule((4, 8, 16), (4, 4, 1), (0.1,) * 3, (8, 8, 8), (0, 4, 4))
    trainer(given, pyramid, single)
    assert "one image a step at 16×16" in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one image a step at 16×16.* start fewer .* --batch_sizes \[4,6,4\]"):
        trainer(parts(), pyramid)


def test_classes_without_labels_are_told(pyramid):
    unlabelled = copy.copy(pyramid)
    unlabelled.labels = None
    with pytest.raises(UserError, match=r"2 classes needs a label"):
        trainer(parts(num_classes=2), unlabelled).run()


def test_memory_of_a_device_limits_each_levels_batch(monkeypatch):
    settings = [PGGAN_TRAINING["rsna_512"][name] for name in ("batch_sizes", "lrs", "images", "fade_images")]
    sides = tuple(4 << level for level in range(8))
    assert growth_schedule(sides, *settings).batch_sizes == (128, 128, 128, 64, 32, 16, 8, 4)
    assert growth_schedule(sides, *settings, batch_size=20).batch_sizes == (20, 20, 20, 20, 20, 16, 8, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert growth_schedule(sides, *settings, batch_size=20).batch_sizes == (40, 40, 40, 40, 32, 16, 8, 4)
    with pytest.raises(UserError, match=r"batch_size must be a whole number of at least 1, or null, got 0"):
        growth_schedule(sides, *settings, batch_size=0)


def test_every_preset_of_the_networks_has_a_schedule_and_the_sources_have_their_own():
    assert PGGAN_TRAINING.keys() == PGGAN_PRESETS.keys()
    for name, row in PGGAN_TRAINING.items():
        levels = len(PGGAN_PRESETS[name]["channels"])
        resolutions = [4 << level for level in range(levels)]
        schedule = GrowthSchedule(resolutions, *(row[key] for key in ("batch_sizes", "lrs", "images", "fade_images")))
        groups = PGGAN_PRESETS[name]["minibatch_group_size"]
        assert groups is None or all(size % groups == 0 for size in schedule.batch_sizes)
        expected = {"rsna_512": 15_000_000, "cxr14_1024": 14_000_000, "paper_1024": 13_600_000}.get(name)
        assert expected is None or schedule.total_images == expected
    assert pggan_setting("rsna_512", "lrs")[-2:] == [0.001, 0.0015]
    assert pggan_setting("cxr14_1024", "eps") == 1e-7
    with pytest.raises(UserError, match=r"preset must be one of .*small_64.* got 'small'"):
        pggan_setting("small", "lrs")
