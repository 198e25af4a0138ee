"""AutoencoderKLTrainer against a plain PyTorch loop, and its resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.networks.nets import PatchDiscriminator
from monai.transforms import Compose, RandFlipd

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines import AutoencoderKLTrainer
from medgen.errors import UserError
from medgen.networks import KLAutoencoder, PosteriorReconstruction

SEED = 3


def small_autoencoder(channels=(8, 8, 8)) -> KLAutoencoder:
    return KLAutoencoder(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=channels,
        attention_levels=(False,) * len(channels),
        latent_channels=3,
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )


def parts(channels=(8, 8, 8)) -> dict:
    torch.manual_seed(0)
    network = small_autoencoder(channels)
    discriminator = PatchDiscriminator(spatial_dims=2, in_channels=1, out_channels=1, channels=4, num_layers_d=2)
    return {
        "autoencoder": PosteriorReconstruction(network),
        "discriminator": discriminator,
        "g_optimizer": torch.optim.Adam(network.parameters(), lr=1e-3),
        "d_optimizer": torch.optim.Adam(discriminator.parameters(), lr=2e-3),
    }


def loader(n=10, batch_size=2, transform=None) -> ResumableDataLoader:
    images = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return ResumableDataLoader(
        Dataset([{"image": image} for image in images], transform), batch_size=batch_size, seed=SEED
    )


def trainer(given: dict, max_epochs=3, **kwargs) -> AutoencoderKLTrainer:
    settings = {
        "device": "cpu",
        "max_epochs": max_epochs,
        "train_data_loader": loader(),
        "reconstruction_loss": torch.nn.L1Loss(),
        "kl_weight": 1e-3,
        "adversarial_weight": 0.5,
        "adversarial_start_epoch": 1,
        "seed": SEED,
    }
    return AutoencoderKLTrainer(**{**settings, **given, **kwargs})


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_weights_equal_those_of_a_plain_loop_written_from_the_paper():
    ours, plain = parts(), parts()
    trainer(ours).run()

    network, discriminator = plain["autoencoder"].network, plain["discriminator"]
    batches = iter(loader())
    for step in range(15):
        image = next(batches)["image"]
        torch.manual_seed(derive_seed(SEED, 2, 0, 2 * (step + 1)))
        noise = torch.randn(2, 3, 4, 4)
        mu, sigma = network.encode(image)
        reconstruction = network.decode(mu + noise * sigma)
        prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(sigma))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mu, sigma), prior).sum((1, 2, 3)).mean()
        loss = (reconstruction - image).abs().mean() + 1e-3 * kl
        if step >= 5:
            loss = loss + 0.5 * ((discriminator(reconstruction)[-1] - 1) ** 2).mean()
        plain["g_optimizer"].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        plain["g_optimizer"].step()
        if step >= 5:
            fake = (discriminator(reconstruction.detach())[-1] ** 2).mean()
            real = ((discriminator(image)[-1] - 1) ** 2).mean()
            plain["d_optimizer"].zero_grad()
            (0.5 * 0.5 * (fake + real)).backward()
            torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            plain["d_optimizer"].step()

    for name, value in network.state_dict().items():
        torch.testing.assert_close(ours["autoencoder"].network.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for name, value in discriminator.state_dict().items():
        torch.testing.assert_close(ours["discriminator"].state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_discriminator_rests_until_the_warm_up_is_over():
    given = parts()
    before = copy.deepcopy(given["discriminator"].state_dict())
    engine = trainer(given, max_epochs=2, adversarial_start_epoch=2)
    engine.run()
    assert same(before, given["discriminator"].state_dict())
    assert "loss" in engine.state.output[0]
    assert "adversarial" not in engine.state.output[0]


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 14])
def test_resumed_training_ends_with_the_same_weights_bit_for_bit(stop_at, tmp_path):
    flip = Compose([RandFlipd(keys="image", prob=0.5, spatial_axis=1)])

    def build(ema_of=None):
        given = parts()
        ema = torch.optim.swa_utils.AveragedModel(
            given["autoencoder"].network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        return given, trainer({**given, "ema": ema}, train_data_loader=loader(transform=flip))

    undisturbed, engine = build()
    saved = {}

    @engine.on(Events.ITERATION_COMPLETED(once=stop_at))
    def save(_):
        torch.save(engine.training_state(), tmp_path / "state.pt")
        saved.update(torch.load(tmp_path / "state.pt", weights_only=True))

    engine.run()
    resumed, engine_2 = build()
    torch.rand(7)  # the generators of another process stand elsewhere
    engine_2.add_event_handler(Events.STARTED, lambda: engine_2.load_training_state(saved))
    engine_2.run()

    assert engine_2.state.iteration == engine.state.iteration == 15
    assert engine_2.images_seen == engine.images_seen
    for part in ("autoencoder", "discriminator"):
        assert same(undisturbed[part].state_dict(), resumed[part].state_dict())
    assert same(engine.ema.state_dict(), engine_2.ema.state_dict())


def test_checkpoint_of_another_architecture_is_refused_by_name():
    state = trainer(parts()).training_state()
    with pytest.raises(UserError, match=r"network of the checkpoint belongs to another architecture.*encoder"):
        trainer(parts(channels=(8, 16, 16))).load_training_state(state)


def test_checkpoint_without_a_part_is_refused_by_name():
    state = trainer(parts()).training_state()
    del state["components"]["d_optimizer"]
    with pytest.raises(UserError, match="no d_optimizer"):
        trainer(parts()).load_training_state(state)
