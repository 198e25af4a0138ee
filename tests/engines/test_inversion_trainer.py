"""Both stages of an encoder's training against plain PyTorch, what they may change, and their resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.data import Dataset
from torch import nn

from medgen.data.stream import ResumableDataLoader, SeedLoader, derive_seed
from medgen.engines import BootstrapTrainer, InversionTrainer, StylePool
from medgen.errors import UserError
from medgen.handlers import TrainingCheckpoint
from medgen.inferers import draw_latents, draw_pairs
from medgen.losses import PixelMSSSIMLoss
from medgen.networks import (
    ConvNeXtEncoder,
    LatentDiscriminator,
    LatentGenerator,
    PGGANGenerator,
    PyramidEncoder,
    StyleGAN2Generator,
    begin_encoder,
)
from medgen.weights import state_digest

SEED = 3
EPSILON = 1e-3  # of Adam: with a tiny one the sign of a gradient that is nearly 0 decides a whole step
SMALL = {"size": "atto", "layer_scale": 0.1, "patch": 2}
SQUARES = PixelMSSSIMLoss(pixel_weight=1.0, ssim_weight=0.0)


def generator_of(space: str) -> LatentGenerator:
    torch.manual_seed(0)
    if space == "z":
        return LatentGenerator(PGGANGenerator((8, 8, 6, 4), latent_dim=8))
    settings = {"image_size": 32, "channel_base": 64, "channel_max": 8, "latent_dim": 6, "w_dim": 8}
    return LatentGenerator(StyleGAN2Generator(**settings, num_mapping_layers=2), space)


def parts(space: str) -> dict[str, Any]:
    generator = generator_of(space)
    torch.manual_seed(1)
    family = PyramidEncoder if space == "w+" else ConvNeXtEncoder
    encoder = begin_encoder(family(32, 1, generator.latent_shape, space, **SMALL), generator)
    return {"generator": generator, "encoder": encoder, "optimizer": adam(encoder)}


def adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=1e-3, eps=EPSILON)


def bootstrap(given: dict[str, Any], epochs=2, **changes) -> BootstrapTrainer:
    loader = SeedLoader(batch_size=2, epoch_images=6, seed=SEED)
    return BootstrapTrainer(device="cpu", max_epochs=epochs, train_data_loader=loader, seed=SEED, **given, **changes)


def real_images() -> Dataset:
    images = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    return Dataset([{"image": image} for image in images])


def inversion(given: dict[str, Any], epochs=2, judged=False, **changes) -> InversionTrainer:
    loader = ResumableDataLoader(real_images(), batch_size=2, seed=SEED)
    if judged:
        torch.manual_seed(2)
        judge = LatentDiscriminator(8, hidden=8)
        changes |= {"latent_discriminator": judge, "d_optimizer": adam(judge), "pool_size": 5, "r1_interval": 2}
    return InversionTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=loader, loss=SQUARES, seed=SEED, **given, **changes
    )


def outputs(engine) -> list[dict]:
    steps: list[dict] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: steps.append(engine.state.output[0]))
    engine.run()
    return steps


def weights(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in given["encoder"].state_dict().items()}


# ---------------------------------------------------------------- stage 1


@pytest.mark.parametrize("space", ["z", "w", "w+"])
def test_first_stage_is_the_plain_loop_over_pairs_of_the_generator(space):
    given, plain = parts(space), parts(space)
    steps = outputs(bootstrap(given))

    generator, encoder, optimizer = plain["generator"], plain["encoder"], plain["optimizer"]
    for step in range(6):
        seeds = [derive_seed(SEED, 3, 2 * step + place) for place in range(2)]
        with torch.no_grad():
            truth = generator.from_z(draw_latents(seeds, generator.z_dim))
            image = generator(truth).clamp(0, 1)
        latents = encoder(image)
        if space == "z":
            loss = 2 * (1 - F.cosine_similarity(latents[:, 0], truth[:, 0])).mean()
        else:
            loss = F.mse_loss(latents, truth) / generator.std**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(steps[step]["loss"]) == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(weights(given), weights(plain), rtol=1e-4, atol=1e-5)


def test_pairs_never_repeat_and_do_not_depend_on_the_batch_size():
    stream = [int(seed) for batch, _ in zip(SeedLoader(3, 9, SEED), range(400), strict=False) for seed in batch["seed"]]
    other = [int(seed) for batch, _ in zip(SeedLoader(5, 9, SEED), range(240), strict=False) for seed in batch["seed"]]

    assert stream == other
    assert len(set(stream)) == 1200


def test_seeds_go_on_where_they_stopped():
    loader = SeedLoader(3, 9, SEED)
    whole = [next(iterator)["seed"].tolist() for iterator in [iter(loader)] for _ in range(4)]
    again = SeedLoader(3, 9, SEED)
    again.images_seen = 6

    assert next(iter(again))["seed"].tolist() == whole[2]
    assert len(loader) == 3


def test_image_term_is_added_to_the_latent_error():
    given = parts("w")
    step = outputs(bootstrap(given, epochs=1, image_loss=SQUARES, image_weight=7.0))[0]

    assert float(step["loss"]) == pytest.approx(float(step["latent_error"] + 7 * step["image_distance"]), rel=1e-5)


def test_classes_take_turns_by_seed():
    torch.manual_seed(0)
    network = PGGANGenerator((8, 8), latent_dim=5, num_classes=3)
    latents, images = draw_pairs([3, 4, 5], LatentGenerator(network))

    expected = network(draw_latents([3, 4, 5], 5), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(images, ((expected + 1) / 2).clamp(0, 1))
    assert latents.shape == (3, 1, 8)


# ---------------------------------------------------------------- stage 2


def test_second_stage_is_the_plain_loop_over_real_images():
    given, plain = parts("w"), parts("w")
    steps = outputs(inversion(given))

    for step in steps:
        latents = plain["encoder"](step["image"])
        loss = F.mse_loss(plain["generator"](latents), step["image"])
        plain["optimizer"].zero_grad()
        loss.backward()
        plain["optimizer"].step()
        assert float(step["distance"]) == pytest.approx(float(loss), rel=1e-4)
    assert len(steps) == 6
    torch.testing.assert_close(weights(given), weights(plain), rtol=1e-4, atol=1e-5)


def test_deltas_join_one_by_one():
    given = parts("w+")
    stages = [step["stage"] for step in outputs(inversion(given, progressive_start=4, progressive_images=4))]

    assert stages == [0, 0, 1, 1, 2, 2]
    assert given["encoder"].stage == 2


def test_length_of_the_deltas_counts_in_units_of_their_deviation():
    given = parts("w+")
    engine = inversion(given, epochs=1, delta_weight=0.5)
    generator, encoder = given["generator"], copy.deepcopy(given["encoder"])
    step = outputs(engine)[0]

    assert encoder.stage == 7  # without a schedule all deltas take part from the start

    latents = encoder(step["image"])
    length = sum(((latents[:, i] - latents[:, 0]) / generator.std).norm(dim=1) for i in range(1, 8)).mean()
    assert float(step["delta"]) == pytest.approx(float(length), rel=1e-4)
    assert float(step["loss"]) == pytest.approx(float(step["distance"] + 0.5 * length), rel=1e-4)


def test_judge_of_styles_learns_and_tells_the_encoder():
    with_judge, without = parts("w+"), parts("w+")
    engine = inversion(with_judge, judged=True, adversarial_weight=5.0)
    before = state_digest(engine.latent_discriminator)
    steps = outputs(engine)
    outputs(inversion(without))

    assert state_digest(engine.latent_discriminator) != before
    assert float(steps[0]["adversarial"]) == pytest.approx(F.softplus(torch.tensor(0.0)).item(), abs=0.3)
    assert not torch.equal(with_judge["encoder"].heads[0].linear.weight, without["encoder"].heads[0].linear.weight)


def test_judges_gradient_never_comes_from_the_encoders_loss():
    given = parts("w+")
    engine = inversion(given, epochs=1, judged=True, adversarial_weight=5.0)
    engine.d_optimizer.param_groups[0]["lr"] = 0.0
    before = state_digest(engine.latent_discriminator)
    outputs(engine)

    assert state_digest(engine.latent_discriminator) == before
    assert all(parameter.requires_grad for parameter in engine.latent_discriminator.parameters())


def test_pool_keeps_every_style_or_hands_it_on():
    pool, fresh = StylePool(4, 1), torch.arange(100.0)[:, None]
    seen = [pool.exchange(part) for part in fresh.split(5)]

    torch.testing.assert_close(seen[0], fresh[:5])  # while it fills
    in_and_out = torch.cat([*seen[1:], pool.styles]).flatten().sort().values
    # the four that filled it came back as well as what followed, each once
    assert len(in_and_out.unique()) == len(in_and_out) == 99
    assert torch.isin(in_and_out, fresh.flatten()).all()
    assert all((part != own).any() for part, own in zip(seen[1:], fresh.split(5)[1:], strict=True))
    assert torch.equal(StylePool(0, 1).exchange(fresh), fresh)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("make", [bootstrap, inversion])
def test_only_the_encoder_changes(make):
    given = parts("w+")
    generator, encoder = given["generator"], given["encoder"]
    before = state_digest(generator), state_digest(encoder)
    outputs(make(given))

    assert state_digest(generator) == before[0]
    assert state_digest(encoder) != before[1]
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_generator_that_changed_is_told_at_the_end():
    given = parts("w")
    engine = bootstrap(given, epochs=1)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: given["generator"].network.w_avg.add_(1))

    with pytest.raises(UserError, match="the generator changed during the training of its encoder"):
        engine.run()


@pytest.mark.parametrize("make", [bootstrap, inversion])
def test_preview_that_leaves_evaluation_mode_changes_nothing(make):
    given, disturbed = parts("w"), parts("w")
    given["encoder"].trunk[1][0].stochastic_depth.p = disturbed["encoder"].trunk[1][0].stochastic_depth.p = 0.5
    outputs(make(given))
    engine = make(disturbed)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: disturbed["encoder"].eval())
    outputs(engine)

    torch.testing.assert_close(weights(given), weights(disturbed), rtol=0, atol=0)


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("stage", ["bootstrap", "inversion"])
def test_training_that_is_killed_and_resumed_ends_with_the_same_bits(stage, stop, tmp_path):
    def make(given):
        if stage == "bootstrap":
            return bootstrap(given)
        return inversion(given, judged=True, progressive_start=2, progressive_images=2, delta_weight=0.1)

    whole = make(parts("w+"))
    whole.run()

    killed = make(parts("w+"))
    TrainingCheckpoint(tmp_path, interval=1).attach(killed)

    def kill() -> None:
        raise KeyboardInterrupt

    killed.add_event_handler(Events.ITERATION_COMPLETED(once=stop), kill)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make(parts("w+"))
    TrainingCheckpoint(tmp_path, interval=1, resume=True).attach(resumed)
    resumed.run()

    torch.testing.assert_close(resumed.training_state(), whole.training_state(), rtol=0, atol=0)


def _train_in_a_group(rank: int, folder: Path) -> None:
    """One of two processes: both stages, and what they have seen."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for name, make in (("bootstrap", bootstrap), ("inversion", inversion)):
        given = parts("w+")
        if rank:  # rank 0's encoder is handed to all
            nn.init.normal_(given["encoder"].heads[0].linear.weight)
        engine = make(given, epochs=1)
        found[name] = [step["image"] for step in outputs(engine)], engine.training_state()["components"]["network"]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow(reason="starts two processes, which import MONAI")
def test_two_processes_see_disjoint_images_and_stay_one_network(tmp_path):
    torch.multiprocessing.spawn(_train_in_a_group, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for stage in ("bootstrap", "inversion"):
        torch.testing.assert_close(first[stage][1], second[stage][1], rtol=0, atol=0)
        seen = torch.cat([*first[stage][0], *second[stage][0]])
        assert len(seen.flatten(1).unique(dim=0)) == len(seen)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bootstrap(parts("w"), image_weight=1.0), "image_weight must be 0, or more with an image_loss"),
        (lambda: inversion(parts("w"), progressive_start=0), "progressive_start must be null for a ConvNeXtEncoder"),
        (
            lambda: inversion(parts("w"), latent_discriminator=LatentDiscriminator(8)),
            "latent_discriminator and d_optimizer must come together",
        ),
        (lambda: bootstrap({**parts("w"), "generator": generator_of("z")}), "space of the encoder must be"),
        (lambda: SeedLoader(0, 4), "batch_size and tick_images must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_the_training(make, message):
    with pytest.raises(UserError, match=message):
        make()
