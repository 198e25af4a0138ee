"""LatentDiffusionTrainer against a plain PyTorch loop, and its resuming."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines import LatentDiffusionTrainer, exponential_moving_copy, warmup
from medgen.errors import UserError
from medgen.losses import DiffusionLoss

SEED = 5


def small_network(classes: int | None = None) -> DiffusionModelUNet:
    torch.manual_seed(0)
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=1,
        channels=(8, 8),
        attention_levels=(False, True),
        num_head_channels=4,
        norm_num_groups=4,
        num_class_embeds=classes,
    )


class Labels:
    key = "label"

    def __call__(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"class_labels": values}


def parts(classes: int | None = None, steps: int = 4) -> dict:
    network = small_network(classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    return {
        "network": network,
        "optimizer": optimizer,
        "ema": exponential_moving_copy(network),
        "lr_scheduler": warmup(optimizer, steps),
        "conditioner": Labels() if classes else None,
    }


def loader(n: int = 10, batch_size: int = 2) -> ResumableDataLoader:
    latents = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    items = [{"image": latent, "label": place % 2} for place, latent in enumerate(latents)]
    return ResumableDataLoader(Dataset(items), batch_size=batch_size, seed=SEED)


def objective(**kwargs) -> DiffusionLoss:
    betas = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}
    return DiffusionLoss(DDPMScheduler(1000, prediction_type="v_prediction", clip_sample=False, **betas), **kwargs)


def trainer(given: dict, max_epochs: int = 3, **kwargs) -> LatentDiffusionTrainer:
    settings = {
        "device": "cpu",
        "max_epochs": max_epochs,
        "train_data_loader": loader(),
        "loss": objective(),
        "ema_decay": 0.9,
        "clip_grad_norm": 0.5,
        "seed": SEED,
    }
    return LatentDiffusionTrainer(**{**settings, **given, **kwargs})


@pytest.mark.parametrize("classes", [None, 3])
def test_weights_equal_those_of_a_plain_loop_written_from_the_papers(classes):
    ours = parts(classes)
    trainer(ours).run()

    network = small_network(classes)
    average = [value.clone() for value in network.state_dict().values()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    betas = torch.linspace(0.0015**0.5, 0.0205**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    batches = iter(loader())
    for step in range(15):
        batch = next(batches)
        x0 = batch["image"]
        torch.manual_seed(derive_seed(SEED, 2, 0, 2 * (step + 1)))
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (2,))
        a = alpha_bar[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x0 + (1 - a).sqrt() * noise).float()
        v = (a.sqrt() * noise - (1 - a).sqrt() * x0).float()
        labels = {"class_labels": batch["label"]} if classes else {}
        loss = (network(noisy, t, **labels) - v).square().mean()
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        decay = min(0.9, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * v for a, v in zip(average, network.state_dict().values(), strict=True)]

    # Adam turns the rounding of gradients near zero into steps: 1e-2 is the length of one
    for value, want in zip(ours["network"].state_dict().values(), network.state_dict().values(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-3, atol=5e-4)
    for value, want in zip(ours["ema"].state_dict().values(), average, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-3, atol=5e-4)
    assert not any(parameter.requires_grad for parameter in ours["ema"].parameters())


@pytest.mark.parametrize("stop_at", [1, 4, 7, 14])
def test_resumed_training_ends_with_the_same_weights_bit_for_bit(stop_at, tmp_path):
    whole = parts()
    trainer(whole).run()

    first = parts()
    engine = trainer(first)
    states = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=stop_at), lambda e: torch.save(e.training_state(), tmp_path / "state.pt")
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda e: states.append(e.terminate()))
    engine.run()

    second = parts()
    engine = trainer(second)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    engine.add_event_handler(Events.STARTED, lambda e: e.load_training_state(state))
    engine.run()
    for name in ("network", "ema"):
        for a, b in zip(whole[name].state_dict().values(), second[name].state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert whole["optimizer"].param_groups[0]["lr"] == second["optimizer"].param_groups[0]["lr"]


def test_images_are_encoded_in_the_step_where_batches_hold_no_latents():
    seen = []

    def encoder(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape)
        return images.mean((2, 3), keepdim=True).expand(-1, 3, 8, 8).contiguous()

    engine = trainer(parts(), max_epochs=1, encoder=encoder)
    engine.run()
    assert seen == [torch.Size([2, 3, 8, 8])] * 5
    assert torch.equal(engine.state.output[0]["image"][:, :, 0, 0], engine.state.output[0]["image"][:, :, 3, 3])


def test_a_training_learns_what_it_is_shown():
    """All images alike: the error must fall far below that of an untrained network (1, since its output is zero)."""
    constant = torch.full((3, 8, 8), 2.0)
    data = ResumableDataLoader(Dataset([{"image": constant}] * 8), batch_size=8, seed=SEED)
    losses: list[float] = []
    engine = trainer(parts(), max_epochs=150, train_data_loader=data, clip_grad_norm=1.0)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output[0]["loss"])))
    engine.run()
    assert losses[0] > 0.7
    assert sum(losses[-20:]) / 20 < 0.25 * losses[0]


def test_a_compiled_network_trains_to_the_same_weights(monkeypatch):
    compile_ = torch.compile
    # aot_eager: the captured graphs without code generation, for which a test machine may have no compiler
    monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend="aot_eager"))
    plain, compiled = parts(), parts()
    trainer(plain, max_epochs=1).run()
    trainer(compiled, max_epochs=1, compile=True).run()
    for a, b in zip(plain["network"].state_dict().values(), compiled["network"].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("setting", "message"), [({"ema_decay": 1.0}, "ema_decay"), ({"clip_grad_norm": -1}, "clip")])
def test_wrong_settings_are_one_line(setting, message):
    with pytest.raises(UserError, match=message):
        trainer(parts(), **setting)
