"""DCGANTrainer against a plain PyTorch loop, its resuming, and what its settings mean."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.data import Dataset

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines import DCGAN_TRAINING, DCGANTrainer, dcgan_setting, exponential_moving_copy, standing_statistics
from medgen.errors import UserError
from medgen.losses import AdversarialLoss
from medgen.networks import DCGANDiscriminator, DCGANGenerator
from medgen.transforms import DiffAugment

SEED = 3
SIDE = 16
BATCH = 4
Z = 8
STEPS = 5  # of an epoch


def parts(num_classes: int = 0, spectral_norm: bool = False, batch_norm: bool = True, optimizer=None) -> dict:
    torch.manual_seed(0)
    generator = DCGANGenerator(SIDE, Z, 1, 4, num_classes)
    discriminator = DCGANDiscriminator(SIDE, 1, 4, num_classes, spectral_norm, batch_norm)
    # epsilon: with a tiny one the sign of a gradient that is nearly 0 decides a whole step
    make = optimizer or (lambda network, lr: torch.optim.Adam(network.parameters(), lr, (0.5, 0.999), eps=1e-3))
    return {
        "generator": generator,
        "discriminator": discriminator,
        "ema": exponential_moving_copy(generator),
        "g_optimizer": make(generator, 0.01),
        "d_optimizer": make(discriminator, 0.02),
    }


def loader(labelled: bool = False, batch_size: int = BATCH) -> ResumableDataLoader:
    images = torch.rand(BATCH * STEPS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    items = [{"image": image, **({"label": i % 2} if labelled else {})} for i, image in enumerate(images)]
    return ResumableDataLoader(Dataset(items), batch_size=batch_size, seed=SEED)


def trainer(given: dict, max_epochs: int = 2, **kwargs) -> DCGANTrainer:
    settings = {
        "device": "cpu",
        "max_epochs": max_epochs,
        "train_data_loader": loader(),
        "loss": AdversarialLoss(),
        "ema_decay": 0.9,
        "seed": SEED,
    }
    return DCGANTrainer(**{**settings, **given, **kwargs})


def outputs(engine: DCGANTrainer) -> list[dict]:
    steps = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: steps.append(engine.state.output[0]))
    engine.run()
    return steps


def classes_of_latents(labels: list[int]) -> torch.Tensor:
    """Classes of 256 latents, as frequent as among labels that divide 256, in an order of chance."""
    draws = torch.Generator().manual_seed(derive_seed(SEED, 3))
    torch.randn(256, Z, generator=draws)
    return torch.tensor(sorted(labels)).repeat_interleave(256 // len(labels))[torch.randperm(256, generator=draws)]


@torch.no_grad()
def measure(network: DCGANGenerator, labels: torch.Tensor | None) -> None:
    """Statistics of what goes into each batch normalisation: means over 16 batches of 16."""
    z = torch.randn(256, Z, generator=torch.Generator().manual_seed(derive_seed(SEED, 3)))
    seen = {norm: [] for norm in network.norms}
    handles = [norm.register_forward_pre_hook(lambda norm, inputs: seen[norm].append(inputs[0])) for norm in seen]
    network.train()
    for start in range(0, 256, 16):
        network(z[start : start + 16], None if labels is None else labels[start : start + 16])
    network.eval()
    for handle in handles:
        handle.remove()
    for norm, batches in seen.items():
        norm.running_mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
        norm.running_var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
        norm.num_batches_tracked = torch.tensor(16)


def assert_same(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("num_classes", "d_steps", "kind"), [(0, 1, "non_saturating"), (2, 2, "hinge")])
def test_weights_equal_those_of_a_plain_loop_written_from_the_papers(num_classes, d_steps, kind):
    settings = {"spectral_norm": kind == "hinge", "batch_norm": kind != "hinge"}
    ours, plain = parts(num_classes, **settings), parts(num_classes, **settings)
    loss = AdversarialLoss(kind, *((0.9, 0.1) if kind != "hinge" else ()))
    steps = outputs(trainer(ours, loss=loss, d_steps=d_steps, train_data_loader=loader(labelled=bool(num_classes))))

    generator, discriminator, ema = plain["generator"].train(), plain["discriminator"].train(), plain["ema"]
    batches, losses = iter(loader(labelled=bool(num_classes))), []
    for step in range(1, 2 * STEPS + 1):
        batch = next(batches)
        image, label = batch["image"] * 2 - 1, batch["label"] if num_classes else None
        torch.manual_seed(derive_seed(SEED, 2, 0, BATCH * step))
        z = torch.randn(BATCH, Z)
        fake = generator(z, label)
        of_real, of_fake = discriminator(image, label), discriminator(fake.detach(), label)
        if kind == "hinge":
            d_loss = F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()
        else:
            # log sigmoid and log(1 - sigmoid)
            d_loss = -(0.9 * F.logsigmoid(of_real) + 0.1 * F.logsigmoid(-of_real)).mean()
            d_loss = d_loss - (0.1 * F.logsigmoid(of_fake) + 0.9 * F.logsigmoid(-of_fake)).mean()
        plain["d_optimizer"].zero_grad()
        d_loss.backward()
        plain["d_optimizer"].step()
        g_logits = discriminator(fake, label) if step % d_steps == 0 else of_fake.detach()
        g_loss = -g_logits.mean() if kind == "hinge" else -F.logsigmoid(g_logits).mean()
        losses.append([d_loss.item(), g_loss.item(), of_real.sigmoid().mean().item(), of_fake.sigmoid().mean().item()])
        if step % d_steps:
            continue
        plain["g_optimizer"].zero_grad()
        g_loss.backward()
        plain["g_optimizer"].step()
        updates = step // d_steps
        decay = min(0.9, (1 + updates) / (10 + updates))
        with torch.no_grad():
            for average, value in zip(ema.parameters(), generator.parameters(), strict=True):
                average.copy_(decay * average + (1 - decay) * value)
    measure(ema, classes_of_latents([0, 1]) if num_classes else None)  # at the end of an epoch

    for part in ("generator", "discriminator", "ema"):
        state = ours[part].state_dict()
        for name, value in plain[part].state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=f"{part} {name}")
    told = [[step[name].item() for name in ("discriminator", "loss", "real_score", "fake_score")] for step in steps]
    torch.testing.assert_close(torch.tensor(told), torch.tensor(losses), rtol=1e-3, atol=1e-4)
    assert not any(value.requires_grad for step in steps for value in step.values())


def test_each_network_is_trained_by_its_own_loss_alone():
    given = parts()
    engine = trainer(given, max_epochs=1)
    seen = []

    def update(optimizer, network, loss):
        before = copy.deepcopy([given[name].state_dict() for name in ("generator", "discriminator")])
        other = "discriminator" if network is given["generator"] else "generator"
        for parameter in given[other].parameters():
            parameter.grad = None
        DCGANTrainer.update(engine, optimizer, network, loss)
        seen.append(other)
        assert all(parameter.grad is None for parameter in given[other].parameters())
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert_same(given[other].state_dict(), before[other == "discriminator"])

    engine.update = update
    engine.run()

    assert seen == ["generator", "discriminator"] * STEPS
    assert all(parameter.requires_grad for parameter in given["discriminator"].parameters())


def test_two_time_scales_reach_their_own_optimisers():
    # by SGD a step is the rate times the gradient
    rates = {"generator": 0.003, "discriminator": 0.3}
    given = parts(optimizer=lambda network, lr: torch.optim.SGD(network.parameters(), lr))
    for name, rate in rates.items():
        given[f"{name[0]}_optimizer"].param_groups[0]["lr"] = rate
    before = {name: [parameter.clone() for parameter in given[name].parameters()] for name in rates}
    engine = trainer(given, max_epochs=1)
    engine.add_event_handler(Events.ITERATION_COMPLETED, engine.terminate)
    engine.run()

    for name, rate in rates.items():  # each network's gradients are those of its own update
        for old, new in zip(before[name], given[name].parameters(), strict=True):
            torch.testing.assert_close(new, old - rate * new.grad)


@pytest.mark.parametrize("d_steps", [1, 3])
def test_generator_and_average_move_in_each_d_steps_th_step(d_steps):
    given, moved = parts(), []
    engine = trainer(given, d_steps=d_steps)
    last = {}

    def note():
        for name in ("generator", "discriminator", "ema"):
            now = torch.cat([p.detach().flatten().clone() for p in given[name].parameters()])
            if name in last and not torch.equal(now, last[name]):
                moved.append((engine.state.iteration, name))
            last[name] = now

    engine.add_event_handler(Events.STARTED, note)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run()

    expected = []
    for step in range(1, 2 * STEPS + 1):
        expected += [(step, "generator")] * (step % d_steps == 0) + [(step, "discriminator")]
        expected += [(step, "ema")] * (step % d_steps == 0)
    assert moved == expected


def test_average_makes_the_same_images_in_evaluation_as_by_the_statistics_of_a_batch():
    given = parts()
    trainer(given, max_epochs=4, ema_decay=0.999).run()
    ema, z = given["ema"], torch.randn(256, Z)

    with torch.no_grad():
        images = ema(z)
        by_batch = copy.deepcopy(ema).train()(z)
        for norm, other in zip(ema.norms, given["generator"].norms, strict=True):
            norm.load_state_dict({**norm.state_dict(), "running_var": other.running_var})
        by_generator = ema(z)

    assert (images - by_batch).abs().mean() < 0.05 * by_batch.std()
    # what it is for: normalised by the generator's statistics, the images have lost their contrast
    assert images.std() == pytest.approx(by_batch.std().item(), rel=0.1)
    assert by_generator.std() < 0.8 * by_batch.std()


def test_statistics_follow_from_weights_seed_and_the_frequencies_of_the_classes():
    network = parts(num_classes=2)["generator"]
    with torch.no_grad():
        network.norms[0].gain_KO[1] *= 3  # the classes' activations differ behind it
    plain = copy.deepcopy(network)
    labels = [1] + 15 * [0]
    before = copy.deepcopy(network.state_dict())

    standing_statistics(network, SEED, labels)
    measure(plain, classes_of_latents(labels))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not network.training
    assert {norm.momentum for norm in network.norms} == {0.1}

    # in any order and repeated, whatever was measured before and drawn elsewhere
    found = copy.deepcopy(network.state_dict())
    torch.manual_seed(1)
    standing_statistics(network, SEED, 3 * labels[::-1])
    assert_same(network.state_dict(), found)
    variances = {}
    for name, given in (("rare", [1, *255 * [0]]), ("none", [0]), ("all", None), ("even", [1, 0])):
        network.load_state_dict(before)
        standing_statistics(network, SEED, given)
        variances[name] = network.norms[1].running_var.clone()
    assert (variances["rare"] > variances["none"]).all()  # one latent in 256 has the rare class
    assert_same(variances["all"], variances["even"])


def test_average_is_measured_by_the_classes_of_all_images_not_of_the_last_batch():
    # the loader's batches have both classes
    whole, alone = parts(num_classes=2), parts(num_classes=2)
    for given, labels in ((whole, None), (alone, [1])):
        trainer(given, train_data_loader=loader(labelled=True), labels=labels).run()
    assert_same(dict(whole["ema"].named_parameters()), dict(alone["ema"].named_parameters()))
    expected = copy.deepcopy(whole["ema"])
    standing_statistics(expected, SEED, [1])
    assert_same(alone["ema"].state_dict(), expected.state_dict())
    assert not torch.equal(whole["ema"].norms[1].running_var, alone["ema"].norms[1].running_var)


def test_without_an_average_the_average_has_the_generators_weights():
    given = parts()
    trainer(given, ema_decay=0.0).run()
    assert_same(dict(given["ema"].named_parameters()), dict(given["generator"].named_parameters()))


def test_discriminator_sees_augmented_images_of_both_kinds_in_both_steps():
    seen, judged = [], []

    def augment(image):
        seen.append(image.detach())
        return image * 0.5

    given = parts()
    given["discriminator"].register_forward_pre_hook(lambda _, inputs: judged.append(inputs[0].detach()))
    steps = outputs(trainer(given, max_epochs=1, diff_augment=augment))

    assert len(seen) == len(judged) == 3 * STEPS
    for number, step in enumerate(steps):
        real, fake, again = seen[3 * number : 3 * number + 3]
        assert_same(real, step["image"])
        assert_same(fake, step["pred"])
        assert_same(again, step["pred"])
        for given_, judged_ in zip(seen, judged, strict=True):
            assert_same(judged_, given_ * 0.5)
        assert real.min() < 0


@pytest.mark.parametrize("stop_at", [1, 4, 5, 8])
def test_a_resumed_training_ends_with_the_weights_of_an_undisturbed_one(stop_at, tmp_path: Path):
    settings = {"diff_augment": DiffAugment("color,translation,cutout"), "d_steps": 2}
    make = {"num_classes": 2, "spectral_norm": True}

    whole = parts(**make)
    trainer(whole, train_data_loader=loader(labelled=True), **settings).run()

    first = trainer(parts(**make), train_data_loader=loader(labelled=True), **settings)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), first.terminate)
    first.run()
    torch.save(first.training_state(), tmp_path / "state.pt")
    torch.manual_seed(99)
    again = parts(**make)
    for network in ("generator", "discriminator", "ema"):
        for parameter in again[network].parameters():
            parameter.data.fill_(0.5)
    second = trainer(again, train_data_loader=loader(labelled=True), **settings)
    second.load_training_state(torch.load(tmp_path / "state.pt", weights_only=True))
    second.run()

    for name in whole:
        assert_same(again[name].state_dict(), whole[name].state_dict())


def test_running_statistics_of_all_networks_are_averaged_over_the_processes(monkeypatch):
    # each process has normalised its own images; what else two processes share is AdversarialTrainer's
    averaged = []
    monkeypatch.setattr(DCGANTrainer, "_mean_over_processes", lambda _, value: averaged.append(value))
    given = parts(spectral_norm=True)
    trainer(given, max_epochs=1).run()

    expected = {
        buffer.data_ptr()
        for part in ("generator", "discriminator", "ema")
        for name, buffer in given[part].named_buffers()
        if "running_" in name
    }
    assert len(expected) == 2 * (2 + 1 + 2)
    assert {value.data_ptr() for value in averaged} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_steps": 0}, "d_steps must be a whole number of at least 1, got 0; set --d_steps 1"),
        ({"d_steps": "2"}, "d_steps must be a whole number of at least 1, got '2'"),
        ({"ema_decay": 1.0}, r"ema_decay must be from 0 to below 1, got 1\.0"),
        ({"discriminator": DCGANDiscriminator(SIDE, 3, 2)}, "makes 1 channels, the discriminator takes 3"),
        ({"discriminator": DCGANDiscriminator(32, 1, 2)}, "image_size 16, the discriminator 32"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_the_training(change, message):
    with pytest.raises(UserError, match=message):
        trainer({**parts(), **change})


def test_classes_without_labels_are_told():
    with pytest.raises(UserError, match="2 classes needs a label"):
        trainer(parts(num_classes=2)).run()


# ---------------------------------------------------------------------------------------------------------------------
# presets


def test_every_preset_makes_its_networks_and_loss():
    for row in DCGAN_TRAINING.values():
        AdversarialLoss(row["loss"], row["real_label"], row["fake_label"])
        DCGANGenerator(row["image_size"], row["latent_dim"], 3, 1)
        assert row["epochs"] > 0
        assert row["base_channels"] in (16, 64)
    with pytest.raises(UserError, match=r"preset must be one of dcgan, sngan, batch_128, .* got 'wgan'; set --preset"):
        dcgan_setting("wgan", "loss")


def test_presets_of_the_source_are_cumulative():
    # the order of its README's experiments: what a row adds to the one before it
    names = ("batch_128", "batch_64", "batch_16", "latent_128", "latent_256", "label_smoothing", "spectral_norm")
    names += ("d_lr_10", "d_lr_100", "d_lr_100_long", "sngan_128")
    changes = [
        {key: value for key, value in DCGAN_TRAINING[after].items() if DCGAN_TRAINING[before][key] != value}
        for before, after in pairwise(names)
    ]
    assert changes == [
        {"total_batch_size": 64},
        {"total_batch_size": 16},
        {"latent_dim": 128},
        {"latent_dim": 256},
        {"real_label": 0.9},
        {"spectral_norm": True},
        {"d_lr": 0.002},
        {"d_lr": 0.02},
        {"epochs": 300},
        {"image_size": 128, "epochs": 500},
    ]
    first = DCGAN_TRAINING["batch_128"]
    assert (first["g_lr"], first["d_lr"], first["beta0"], first["beta1"]) == (2e-4, 2e-4, 0.5, 0.999)
    assert (first["image_size"], first["latent_dim"], first["ema_decay"], first["d_batch_norm"]) == (64, 100, 0, True)
