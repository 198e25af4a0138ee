"""StyleGAN2Trainer against a plain PyTorch loop, its resuming, and what its settings mean."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.data import Dataset

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines import (
    STYLEGAN2_TRAINING,
    StyleGAN2Trainer,
    batch_per_process,
    exponential_moving_copy,
    stylegan2_setting,
)
from medgen.errors import UserError
from medgen.handlers import TrainingCheckpoint
from medgen.losses import PathLengthRegulariser
from medgen.networks import STYLEGAN2_PRESETS, StyleGAN2Discriminator, StyleGAN2Generator
from medgen.transforms import AdaptiveAugment, AugmentController

SEED = 3
SIDE = 16
BATCH = 4


def parts(num_classes=0) -> dict:
    torch.manual_seed(0)
    settings = {"image_size": SIDE, "num_classes": num_classes, "channel_base": 128, "channel_max": 8}
    generator = StyleGAN2Generator(latent_dim=8, w_dim=8, num_mapping_layers=2, **settings)
    discriminator = StyleGAN2Discriminator(num_mapping_layers=2, **settings)
    with torch.no_grad():  # at 0 noise would not tell one stream of numbers from another
        for name, value in generator.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(0.1)
    return {
        "generator": generator,
        "discriminator": discriminator,
        "ema": exponential_moving_copy(generator),
        "g_optimizer": torch.optim.Adam(generator.parameters(), lr=0.002, betas=(0.0, 0.99), eps=1e-8),
        "d_optimizer": torch.optim.Adam(discriminator.parameters(), lr=0.003, betas=(0.0, 0.99), eps=1e-8),
    }


def loader(n=20, labelled=False, **kwargs) -> ResumableDataLoader:
    images = torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    items = [{"image": image, **({"label": i % 2} if labelled else {})} for i, image in enumerate(images)]
    return ResumableDataLoader(Dataset(items), batch_size=BATCH, seed=SEED, **kwargs)


def trainer(given: dict, max_epochs=2, **kwargs) -> StyleGAN2Trainer:
    settings = {
        "device": "cpu",
        "max_epochs": max_epochs,
        "train_data_loader": loader(),
        "r1_gamma": 0.7,
        "r1_interval": 3,
        "ema_images": 30,
        "seed": SEED,
    }
    return StyleGAN2Trainer(**{**settings, **given, **kwargs})


def augmentation(p=0.8) -> dict:
    augment = AdaptiveAugment.from_preset("radiograph", p=p)
    return {"augment": augment, "augment_controller": AugmentController(augment, interval=2, rise_images=100)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_weights_equal_those_of_a_plain_loop_written_from_the_papers():
    ours, plain = parts(), parts()
    trainer(
        ours, path_length=PathLengthRegulariser(weight=1.5, decay=0.1, interval=2, batch_shrink=2), ema_rampup=0.5
    ).run()

    generator, discriminator, ema = plain["generator"].train(), plain["discriminator"], plain["ema"]
    batches, path_mean = iter(loader()), 0.0

    def styles(count):
        ws = generator.mapping(torch.randn(count, 8))
        mixes, layer = torch.rand(()) < 0.9, torch.randint(1, 6, ())
        if mixes:
            second = generator.mapping(torch.randn(count, 8), update_w_avg=False)
            ws = torch.stack([(second if i >= layer else ws)[:, i] for i in range(6)], 1)
        return ws

    def update(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in range(10):
        image = next(batches)["image"] * 2 - 1
        seen = BATCH * (step + 1)
        torch.manual_seed(derive_seed(SEED, 2, 0, seen))

        logits = discriminator(generator.synthesis(styles(BATCH), "random"))
        update(plain["g_optimizer"], -F.logsigmoid(logits).mean())
        if step % 2 == 0:
            ws = styles(BATCH // 2)
            images = generator.synthesis(ws, "random")
            noise = torch.randn_like(images) / SIDE
            (jacobian,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
            lengths = jacobian.square().sum(2).mean(1).sqrt()
            path_mean = path_mean + 0.1 * (lengths.mean().item() - path_mean)
            update(plain["g_optimizer"], 1.5 * 2 * (lengths - path_mean).square().mean())

        with torch.no_grad():
            fake = generator.synthesis(styles(BATCH), "random")
        loss = -F.logsigmoid(-discriminator(fake)).mean() - F.logsigmoid(discriminator(image)).mean()
        update(plain["d_optimizer"], loss)
        if step % 3 == 0:
            image.requires_grad_()
            (gradient,) = torch.autograd.grad(discriminator(image).sum(), image, create_graph=True)
            penalty = 0.7 / 2 * gradient.square().sum((1, 2, 3)).mean() * 3
            update(plain["d_optimizer"], penalty)

        keep = 0.5 ** (BATCH / min(30, 0.5 * seen))
        with torch.no_grad():
            for average, value in zip(ema.parameters(), generator.parameters(), strict=True):
                average.copy_(keep * average + (1 - keep) * value)
        ema.w_avg.copy_(generator.w_avg)

    for part in ("generator", "discriminator", "ema"):
        state = ours[part].state_dict()
        for name, value in plain[part].state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=f"{part} {name}")


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_resumed_training_ends_with_the_same_state_bit_for_bit(stop_at, tmp_path):
    def build():
        given = parts(num_classes=2)
        extra = {**augmentation(), "path_length": PathLengthRegulariser(interval=2)}
        return trainer({**given, **extra}, train_data_loader=loader(labelled=True))

    engine = build()

    @engine.on(Events.ITERATION_COMPLETED(once=stop_at))
    def save(_):
        torch.save(engine.training_state(), tmp_path / "state.pt")

    engine.run()
    resumed = build()
    torch.rand(7)  # the generators of another process stand elsewhere
    resumed.load_training_state(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.run()

    torch.testing.assert_close(engine.training_state(), resumed.training_state(), rtol=0, atol=0)
    assert engine.augment.p == resumed.augment.p != 0.8
    assert engine.path_length.mean == resumed.path_length.mean > 0


def test_probability_of_augmentation_follows_the_signs_of_the_real_logits():
    extra = augmentation(p=0.5)
    engine = trainer({**parts(), **extra}, max_epochs=3)
    signs, chances = [], []

    @engine.on(Events.ITERATION_COMPLETED)
    def look(_):
        signs.append(float(engine.state.output[0]["real_sign"]))
        chances.append(engine.state.output[0]["augment_p"])

    engine.run()
    p = 0.5
    for step in range(1, len(signs), 2):  # two batches of 4 images: 8 of 100
        overfitting = (signs[step - 1] + signs[step]) / 2
        p += 0.08 * ((overfitting > 0.6) - (overfitting < 0.6))
        p = min(max(p, 0.0), 1.0)
        assert chances[step] == pytest.approx(p)
    assert len(set(chances)) > 1


def test_discriminator_sees_augmented_images_only():
    class Stamp(AdaptiveAugment):
        def forward(self, images, parameters=None):
            return images + 5

    given = parts()
    seen = []
    given["discriminator"].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().mean().item()))
    trainer({**given, "augment": Stamp()}, max_epochs=1).run()
    assert len(seen) == 5 * 3 + 2  # for G, for the generated, for the real, and for R1 in steps 0 and 3
    assert min(seen) > 3


def test_frozen_layers_of_the_discriminator_stay_and_the_others_move():
    given = parts()
    before = copy.deepcopy(given["discriminator"].state_dict())
    trainer(given, max_epochs=1, freeze_d=4).run()
    moved = {
        name for name, value in given["discriminator"].state_dict().items() if not torch.equal(value, before[name])
    }
    assert not any(name.startswith("blocks.0.") for name in moved)
    assert {"blocks.1.conv0.weight", "conv.weight", "out.weight"} <= moved


def test_regularisers_that_are_switched_off_are_not_computed():
    engine = trainer(parts(), max_epochs=1, r1_gamma=0.0)
    keys = set()
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: keys.update(engine.state.output[0]))
    engine.run()
    assert keys.isdisjoint({"r1", "path_length"})


def test_without_a_half_life_the_average_is_the_generator():
    given = parts()
    trainer(given, max_epochs=1, ema_images=0).run()
    assert same(given["ema"].state_dict(), given["generator"].state_dict())


def test_compiled_training_takes_the_same_steps(monkeypatch):
    compiled = []

    def compile_without_generating_code(module):  # what inductor adds is speed, and a minute
        compiled.append(module)
        return real(module, backend="aot_eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_generating_code)
    eager, given = parts(), parts()
    for part, on in ((eager, False), (given, True)):
        trainer(part, max_epochs=1, path_length=PathLengthRegulariser(interval=2), compile=on).run()
    assert compiled == [given["generator"].synthesis, given["discriminator"]]
    for name, value in eager["ema"].state_dict().items():
        torch.testing.assert_close(given["ema"].state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_images_come_out_on_the_networks_scale():
    engine = trainer(parts(), max_epochs=1)
    engine.run()
    image = engine.state.output[0]["image"]
    assert image.min() < -0.9
    assert image.max() > 0.9


@pytest.mark.parametrize("part", ["path_length", "discriminator"])
def test_network_that_a_step_ruins_is_told_and_never_saved(part, tmp_path):
    engine = trainer(parts(), path_length=PathLengthRegulariser(interval=2))
    TrainingCheckpoint(tmp_path, interval=1).attach(engine)

    @engine.on(Events.ITERATION_STARTED(once=3))
    def ruin(_):  # nothing but the generator's own loss is still a number in this step
        if part == "path_length":
            engine.path_length.weight = math.nan
        else:
            engine.d_optimizer.param_groups[0]["lr"] = math.inf

    with pytest.raises(
        UserError, match=r"scalar path_length became nan|discriminator holds values that are not finite"
    ):
        engine.run()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["images_seen"] == 2 * BATCH
    for name in ("generator", "discriminator", "ema"):
        assert all(value.isfinite().all() for value in state["components"][name].values())


def test_one_image_a_process_is_warned_of(caplog):
    trainer(
        parts(), train_data_loader=ResumableDataLoader(Dataset([{"image": torch.rand(1, SIDE, SIDE)}]), batch_size=1)
    )
    assert "minibatch standard deviation" in caplog.text


def test_batch_is_shared_evenly_or_not_at_all(monkeypatch):
    assert batch_per_process(32) == 32
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert batch_per_process(32) == 4
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"6 processes cannot share the preset's 32 images .* set --batch_size"):
        batch_per_process(32)


def _train_in_a_group(rank: int, folder: Path) -> None:
    """One of two processes: a step of plain descent on this rank's images, then a whole training."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    given = parts()
    discriminator = given["discriminator"]
    engine = trainer(given, max_epochs=1, path_length=PathLengthRegulariser(interval=2), train_data_loader=loader(n=40))
    descent = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    image = torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(rank))
    engine.update(descent, discriminator, discriminator(image).mean())
    torch.save(discriminator.state_dict(), folder / f"step{rank}.pt")
    engine.run()
    torch.save(engine.training_state(), folder / f"state{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow(reason="starts two processes, which import MONAI")
def test_two_processes_step_by_the_mean_gradient_and_stay_one_network(tmp_path):
    torch.multiprocessing.spawn(_train_in_a_group, (tmp_path,), nprocs=2)

    discriminator = parts()["discriminator"]
    images = [torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)]
    (sum(discriminator(image).mean() for image in images) / 2).backward()
    torch.optim.SGD(discriminator.parameters(), lr=0.1).step()
    steps, states = (
        [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)] for name in ("step", "state")
    )
    torch.testing.assert_close(steps[0], discriminator.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)  # networks, optimisers, averages, path length


def test_classes_need_labels_and_labels_reach_both_networks():
    given = parts(num_classes=2)
    before = copy.deepcopy(given["discriminator"].mapping_network.state_dict())
    trainer(given, max_epochs=1, train_data_loader=loader(labelled=True)).run()
    assert not same(before, given["discriminator"].mapping_network.state_dict())
    with pytest.raises(UserError, match=r"2 classes needs a label .* --num_classes 0"):
        trainer(parts(num_classes=2)).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style_mixing": 1.2}, "style_mixing must be a probability from 0 to 1, got 1.2"),
        ({"ema_rampup": -1}, "must be 0 or more, got 30 and -1"),
        ({"r1_interval": 0}, "r1_interval must be at least 1 .* got 0"),
        ({"freeze_d": 99}, "from 0 to 7 layers, got 99"),
    ],
)
def test_settings_out_of_range_are_told_before_the_training(change, message):
    with pytest.raises(UserError, match=message):
        trainer(parts(), **change)


def test_networks_of_different_sizes_are_refused():
    given = parts()
    given["discriminator"] = StyleGAN2Discriminator(32, channel_base=128, channel_max=8)
    with pytest.raises(UserError, match=r"the generator has image_size \(16, 16\), the discriminator \(32, 32\)"):
        trainer(given)


def test_every_preset_of_the_networks_has_training_settings():
    assert STYLEGAN2_TRAINING.keys() == STYLEGAN2_PRESETS.keys()
    for name, row in STYLEGAN2_TRAINING.items():
        if name.startswith("auto"):  # ADA, appendix C: gamma = 0.0002 · side² / batch
            side = STYLEGAN2_PRESETS[name]["image_size"]
            assert math.isclose(row["r1_gamma"], 0.0002 * side**2 / row["total_batch_size"])
    with pytest.raises(UserError, match=r"preset must be one of .*small_64.* got 'small'"):
        stylegan2_setting("small", "lr")
