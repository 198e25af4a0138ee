"""Samplers: stated timesteps, steps that keep to them, and the order of each on a denoiser known in closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as DiffusersDDIM
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers import PNDMScheduler as DiffusersPNDM
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from medgen.errors import UserError
from medgen.inferers import Sampler
from medgen.inferers.samplers import SAMPLERS, SPACINGS

STEPS = (10, 20, 25, 50, 200)
BETAS = [name for name in SAMPLERS if name != "rflow"]
DETERMINISTIC = [name for name in BETAS if name != "ddpm"]


def training(prediction_type: str = "v_prediction", steps: int = 1000) -> DDPMScheduler:
    """The scheduler of the source's training."""
    return DDPMScheduler(
        steps, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, prediction_type=prediction_type
    )


def even_training(prediction_type: str = "v_prediction") -> DDPMScheduler:
    """A long training whose logarithm of the signal-to-noise ratio is linear, as the theory of the solvers has it."""
    scheduler = DDPMScheduler(20001, "linear_beta", prediction_type=prediction_type)
    alphas_cumprod = torch.sigmoid(2 * torch.linspace(2.5, -4, 20001, dtype=torch.float64))
    scheduler.betas = 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return scheduler


class Mixture:
    """Exact denoiser of a mixture of five isotropic Gaussians; channels are its dimensions, pixels are points."""

    def __init__(self, channels: int, std: float) -> None:
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(5, channels, generator=generator, dtype=torch.float64)
        self.means = means / means.std() * math.sqrt(1 - std**2)
        self.variances = std**2 * torch.exp(torch.randn(5, generator=generator, dtype=torch.float64) / 2)

    def clean(self, x: torch.Tensor, signal: float, sigma: float) -> torch.Tensor:
        """E[x₀ | x] by Bayes' rule."""
        points = x.movedim(1, -1)[..., None, :]
        variances = signal**2 * self.variances + sigma**2
        distance = points - signal * self.means
        log_odds = -(distance**2).sum(-1) / (2 * variances) - self.means.shape[1] / 2 * variances.log()
        each = self.means + (signal * self.variances / variances)[:, None] * distance
        return (log_odds.softmax(-1)[..., None] * each).sum(-2).movedim(-1, 1)

    def output(self, sampler: Sampler, x: torch.Tensor, index: int) -> torch.Tensor:
        """What a perfect network of the sampler's prediction type puts out."""
        signal, sigma = sampler.levels[index]
        clean = self.clean(x.double(), signal, sigma).to(x)
        noise = (x - signal * clean) / sigma
        if sampler.name == "rflow":
            return clean - noise
        velocity = signal * noise - sigma * clean
        return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[sampler.prediction_type]

    def flow(self, x: torch.Tensor, levels: list[tuple[float, float]]) -> torch.Tensor:
        """The probability flow's end, by Heun's method in x / signal over sigma / signal."""
        for (signal, sigma), (next_signal, next_sigma) in itertools.pairwise(levels):
            noise = (x - signal * self.clean(x, signal, sigma)) / sigma
            step = next_sigma / next_signal - sigma / signal
            other = next_signal * (x / signal + step * noise)
            other_noise = (other - next_signal * self.clean(other, next_signal, next_sigma)) / next_sigma
            x = next_signal * (x / signal + step * (noise + other_noise) / 2)
        return self.clean(x, *levels[-1])


def walk(sampler: Sampler, mixture: Mixture, x: torch.Tensor, seeds: tuple[int, ...] = ()) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler.start()
    for index in range(len(sampler.timesteps)):
        x = sampler.step(mixture.output(sampler, x, index), index, x, generators)
    return x


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


def orders(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


# Timesteps


def evaluations(steps: list[int], name: str) -> list[int]:
    """PNDM comes twice to the second timestep."""
    return steps[:2] + steps[1:] if name == "pndm" else steps


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", BETAS)
def test_leading_timesteps_are_the_sources(name, num_steps):
    stride = 1000 // num_steps

    got = Sampler(training(), name, num_steps, "leading").timesteps.tolist()

    assert got == evaluations(list(range(1000 - stride, -1, -stride)), name)


def test_ddim_leads_by_default():
    assert Sampler(training(), "ddim", 200).timesteps[:3].tolist() == [995, 990, 985]
    assert Sampler(training(), "ddim", 50).timesteps[[0, 1, -1]].tolist() == [980, 960, 0]


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", BETAS)
def test_trailing_timesteps(name, num_steps):
    other = DiffusersDDIM(1000, timestep_spacing="trailing")
    other.set_timesteps(num_steps)

    got = Sampler(training(), name, num_steps, "trailing").timesteps.tolist()

    assert got == evaluations(other.timesteps.tolist(), name)
    assert got[0] == 999
    assert got[-1] == 1000 // num_steps - 1


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", BETAS)
def test_linspace_timesteps(name, num_steps):
    other = DiffusersDDIM(1000, timestep_spacing="linspace")
    other.set_timesteps(num_steps)

    got = Sampler(training(), name, num_steps, "linspace").timesteps.tolist()

    assert got == evaluations(other.timesteps.tolist(), name)
    assert got[0] == 999
    assert got[-1] == 0


QUADRATIC = {  # (999 · (i / (n − 1))²) to the nearest, and i where that is more; first five, last five, sum
    10: ([999, 789, 604, 444, 308], [197, 111, 49, 12, 0], 3513),
    20: ([999, 897, 800, 708, 623], [44, 25, 11, 3, 0], 6836),
    25: ([999, 917, 839, 765, 694], [28, 16, 7, 2, 0], 8497),
    50: ([999, 959, 919, 880, 843], [7, 4, 2, 1, 0], 16821),
    200: ([999, 989, 979, 969, 959], [4, 3, 2, 1, 0], 67025),
}


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", BETAS)
def test_quadratic_timesteps(name, num_steps):
    steps = Sampler(training(), name, num_steps, "quadratic").timesteps.tolist()

    assert steps == evaluations(list(dict.fromkeys(steps)), name)
    steps = list(dict.fromkeys(steps))
    assert (steps[:5], steps[-5:], sum(steps)) == QUADRATIC[num_steps]
    assert len(steps) == num_steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 3, 7, 30, 333, 999, 1000])
def test_timesteps_descend_within_the_training(spacing, num_steps):
    if spacing == "leading" and num_steps == 999:
        num_steps = 500

    steps = Sampler(training(), "dpm++", num_steps, spacing).timesteps

    assert len(steps) == num_steps
    assert (steps.diff() < 0).all()
    assert 0 <= steps[-1]
    assert steps[0] <= 999


@pytest.mark.parametrize("num_steps", STEPS)
def test_flow_timesteps_are_those_of_monai(num_steps):
    scheduler = RFlowScheduler(1000, use_discrete_timesteps=True)
    scheduler.set_timesteps(num_steps)

    got = Sampler(scheduler, "rflow", num_steps).timesteps

    assert got.tolist() == scheduler.timesteps.tolist()
    assert got[0] == 1000


def test_flow_timesteps_are_not_rounded():
    # MONAI's are float16, whose neighbours are half a step apart here
    got = Sampler(RFlowScheduler(1000, use_discrete_timesteps=False), "rflow", 30).timesteps

    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, 1000 - np.arange(30) * 100 / 3, rtol=1e-6)


def test_flow_timesteps_shift_with_the_size_of_the_latents():
    scheduler = RFlowScheduler(
        1000, use_discrete_timesteps=False, use_timestep_transform=True, base_img_size_numel=32 * 32
    )

    got = Sampler(scheduler, "rflow", 4, latent_shape=(3, 64, 64)).timesteps

    # Esser et al. 2024, arXiv 2403.03206, equation 23, with twice the side
    np.testing.assert_allclose(got, [1000 * 2 * t / (1 + t) for t in (1, 0.75, 0.5, 0.25)], rtol=1e-6)
    with pytest.raises(UserError, match="latent_shape"):
        Sampler(scheduler, "rflow", 4)


@pytest.mark.parametrize(
    ("name", "spacing", "expected", "last", "evaluations"),
    [
        ("ddim", "leading", [499, 478, 457], 0, 25),
        ("unipc", "trailing", [499, 479, 459], 19, 25),
        ("dpm++", "linspace", [499, 478, 457], 0, 25),
        ("dpm++", "quadratic", [499, 470, 442], 0, 35),
        ("pndm", "trailing", [499, 479, 479], 19, 26),
    ],
)
def test_strength_makes_a_list_of_its_own(name, spacing, expected, last, evaluations):
    sampler = Sampler(training(), name, 50, spacing)

    sampler.start(0.5)

    assert sampler.timesteps[:3].tolist() == expected
    assert sampler.timesteps[-1] == last
    assert len(sampler.timesteps) == evaluations
    assert len(sampler.levels) == len(sampler.timesteps) + 1
    sampler.start()
    assert sampler.timesteps.tolist() == Sampler(training(), name, 50, spacing).timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 5, 10, 20, 1000])
@pytest.mark.parametrize("name", BETAS)
def test_start_at_a_strength_depends_neither_on_spacing_nor_on_steps(name, num_steps, spacing):
    sampler, betas = Sampler(training(), name, num_steps, spacing), training().betas.double().numpy()

    for strength, first in ((0.001, 0), (0.3, 299), (0.5, 499), (0.7, 699), (0.9, 899), (0.999, 998)):
        sampler.start(strength)

        assert sampler.timesteps[0] == first
        assert sampler.levels[0][0] == pytest.approx(math.sqrt(np.prod(1 - betas[: first + 1])))
        distinct = sampler.timesteps.unique_consecutive()
        assert (distinct.diff() < 0).all()
        assert distinct[-1] >= 0
        assert len(distinct) <= num_steps


def test_start_of_a_flow_at_a_strength_is_that_part_of_the_way():
    settings = {"use_timestep_transform": True, "base_img_size_numel": 32 * 32}
    for scheduler in (
        RFlowScheduler(1000, use_discrete_timesteps=True),
        RFlowScheduler(1000, use_discrete_timesteps=False),
        RFlowScheduler(1000, use_discrete_timesteps=False, **settings),
    ):
        for num_steps in (3, 7, 50):
            sampler = Sampler(scheduler, "rflow", num_steps, latent_shape=(3, 64, 64))
            for strength in (0.3, 0.5, 0.7, 0.9):
                sampler.start(strength)

                assert sampler.timesteps[0] == pytest.approx(1000 * strength)
                assert sampler.levels[0] == pytest.approx((1 - strength, strength))
                assert len(sampler.timesteps) == round(num_steps * strength)
                assert (sampler.timesteps.diff() < 0).all()


def test_strength_of_a_flow():
    sampler = Sampler(RFlowScheduler(1000), "rflow", 50)

    sampler.start(0.5)

    assert sampler.timesteps[:2].tolist() == [500, 480]
    assert sampler.levels[0] == (0.5, 0.5)


def test_least_strength_is_one_step():
    sampler = Sampler(training(), "dpm++", 20)

    sampler.start(1e-6)

    assert sampler.timesteps.tolist() == [0]


# Steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_fifty_ddim_steps_against_numpy(prediction_type):
    mixture, x = Mixture(4, 0.3), noise(8, 4, 2, 2)
    alphas = np.cumprod(1 - np.linspace(np.sqrt(0.0015), np.sqrt(0.0205), 1000) ** 2)
    expected = x.numpy()
    for t in range(980, -1, -20):
        now, after = alphas[t], alphas[t - 20] if t >= 20 else 1.0
        clean = mixture.clean(torch.from_numpy(expected), math.sqrt(now), math.sqrt(1 - now)).numpy()
        epsilon = (expected - math.sqrt(now) * clean) / math.sqrt(1 - now)
        expected = math.sqrt(after) * clean + math.sqrt(1 - after) * epsilon

    got = walk(Sampler(training(prediction_type), "ddim", 50), mixture, x)

    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_that_of_diffusers_where_that_keeps_to_its_timesteps(prediction_type, eta):
    scheduler, x = training(prediction_type), noise(3, 4, 2, 2)
    sampler = Sampler(scheduler, "ddim", 50, eta=eta)
    other = DiffusersDDIM(
        1000,
        trained_betas=scheduler.betas.tolist(),
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    other.set_timesteps(50)
    for index in (0, 20, 49):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        drawn = torch.stack([torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
        output = noise(3, 4, 2, 2).flip(0)

        got = sampler.step(output, index, x, generators)

        expected = other.step(output, other.timesteps[index], x, eta=eta, variance_noise=drawn.double())
        torch.testing.assert_close(got, expected.prev_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "quadratic"])
def test_ancestral_steps_are_those_of_diffusers(spacing):
    scheduler, x, output = training("epsilon"), noise(2, 4, 2, 2), noise(2, 4, 2, 2).flip(0)
    sampler = Sampler(scheduler, "ddpm", 30, spacing)
    other = DiffusersDDPM(1000, trained_betas=scheduler.betas.tolist(), clip_sample=False)
    other.set_timesteps(timesteps=sampler.timesteps.tolist())
    for index in (0, 13, 28):
        got = sampler.step(output, index, x, [torch.Generator().manual_seed(seed) for seed in (3, 4)])

        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        # diffusers draws in the type of the output
        expected = other.step(output.float(), int(other.timesteps[index]), x.float(), generator=generators).prev_sample
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)


def test_pndm_is_that_of_diffusers_but_for_the_last_step():
    scheduler, mixture, x = training("epsilon"), Mixture(4, 0.3), noise(2, 4, 2, 2)
    sampler = Sampler(scheduler, "pndm", 20, "leading")
    other = DiffusersPNDM(
        1000,
        trained_betas=scheduler.betas.tolist(),
        skip_prk_steps=True,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    other.set_timesteps(20)
    assert sampler.timesteps.tolist() == other.timesteps.tolist()
    expected = x
    for index in range(20):
        x = sampler.step(mixture.output(sampler, x, index), index, x)
        output = mixture.output(sampler, expected, index)

        expected = other.step(output, int(other.timesteps[index]), expected).prev_sample

        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_flow_steps_are_those_of_monai():
    scheduler, x, output = RFlowScheduler(1000), noise(2, 4, 2, 2), noise(2, 4, 2, 2).flip(0)
    scheduler.set_timesteps(25)
    sampler = Sampler(scheduler, "rflow", 25)

    for index in (0, 11, 24):
        expected, clean = scheduler.step(output, scheduler.timesteps[index], x)

        torch.testing.assert_close(sampler.step(output, index, x), expected)
        torch.testing.assert_close(sampler.predict(output, index, x)[0], clean)


@pytest.mark.parametrize("scheduler", [training(), RFlowScheduler(1000)])
def test_noise_is_added_as_in_training(scheduler):
    sampler = Sampler(scheduler, "rflow" if isinstance(scheduler, RFlowScheduler) else "dpm++", 20)
    latents, added = noise(1, 4, 2, 2, dtype=torch.float32), noise(2, 4, 2, 2, dtype=torch.float32)[1:]

    got = sampler.add_noise(latents, added, 7)

    expected = scheduler.add_noise(latents, added, sampler.timesteps[7:8])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sampler.add_noise(latents, added, 20), latents, rtol=0, atol=0)


# Convergence


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "least"), [("ddim", 0.8), ("dpm++", 1.8), ("unipc", 1.9), ("pndm", 1.9)])
def test_order_of_convergence_to_the_probability_flow(name, least, prediction_type):
    mixture, x = Mixture(8, 0.5), noise(64, 8, 1, 1)
    log_snr = torch.linspace(-8, 5, 2001, dtype=torch.float64)
    levels = list(zip(log_snr.sigmoid().sqrt().tolist(), (-log_snr).sigmoid().sqrt().tolist(), strict=True))
    limit = mixture.flow(x, levels)

    scheduler = even_training(prediction_type)
    errors = [rms(walk(Sampler(scheduler, name, n, "linspace"), mixture, x) - limit) for n in (33, 65, 129)]

    assert min(orders(errors)) > least
    assert max(orders(errors)) < least + 1.3
    assert errors[-1] < 0.01


def test_order_of_convergence_of_a_flow():
    mixture, x = Mixture(8, 0.5), noise(64, 8, 1, 1)
    times = torch.linspace(1 - 1e-6, 1e-3, 4001, dtype=torch.float64).tolist()
    limit = mixture.flow(x, [(1 - t, t) for t in times])

    errors = [rms(walk(Sampler(RFlowScheduler(1000), "rflow", n), mixture, x) - limit) for n in (50, 100, 200)]

    np.testing.assert_allclose(orders(errors), 1, atol=0.15)


@pytest.fixture(scope="module")
def sources_limit() -> tuple[Mixture, torch.Tensor, torch.Tensor]:
    """The probability flow of the source's betas, from its last level to its first, on a much finer list."""
    mixture, x = Mixture(8, 0.3), noise(64, 8, 1, 1)
    logs = torch.cumprod(1 - training().betas.double(), 0).log().numpy()
    alphas = np.exp(np.interp(np.linspace(999, 0, 4000), np.arange(1000), logs))
    return mixture, x, mixture.flow(x, list(zip(np.sqrt(alphas), np.sqrt(1 - alphas), strict=True)))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_all_samplers_go_to_the_same_image(name, spacing, sources_limit):
    mixture, x, limit = sources_limit

    errors = [rms(walk(Sampler(training(), name, n, spacing), mixture, x) - limit) for n in (10, 50, 250)]

    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02  # of images of standard deviation 1


@pytest.mark.parametrize("name", ["dpm++", "unipc", "pndm"])
def test_twenty_steps_are_nearer_to_the_limit_than_fifty_of_ddim(name, sources_limit):
    mixture, x, limit = sources_limit

    ours = rms(walk(Sampler(training(), name, 20), mixture, x) - limit)

    assert ours < rms(walk(Sampler(training(), "ddim", 50), mixture, x) - limit)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_ancestral_sampling_gives_the_mixtures_mean_and_covariance(name, eta):
    mixture, side = Mixture(2, 0.3), 64
    sampler = Sampler(training(steps=500), name, 500, eta=eta)
    # 500 of the source's steps end at a signal of 0.1, for which the start is noised data, and not noise alone
    generator = torch.Generator().manual_seed(2)
    component = torch.randint(5, (side * side,), generator=generator)
    data = mixture.means[component] + mixture.variances[component].sqrt()[:, None] * noise(side * side, 2)
    start = sampler.add_noise(data.T.reshape(1, 2, side, side), noise(2, 2, side, side)[1:], 0)

    points = walk(sampler, mixture, start, (5,))[0].flatten(1)

    mean = mixture.means.mean(0)
    centred = mixture.means - mean
    covariance = centred.T @ centred / 5 + mixture.variances.mean() * torch.eye(2, dtype=torch.float64)
    standard_error = covariance.diagonal().sqrt() / side
    assert ((points.mean(1) - mean).abs() < 3.5 * standard_error).all()
    # of a product of two coordinates, by its fourth moment
    products = (points - mean[:, None])[:, None] * (points - mean[:, None])[None]
    assert ((products.mean(2) - covariance).abs() < 3.5 * products.std(2) / side).all()


# Batches, state


@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.7)])
def test_a_sample_does_not_depend_on_its_batch(name, eta):
    mixture, x = Mixture(4, 0.3), noise(4, 4, 8, 8, dtype=torch.float32)
    scheduler = RFlowScheduler(1000) if name == "rflow" else training()
    sampler = Sampler(scheduler, name, 12, "trailing", eta)

    together = walk(sampler, mixture, x, (5, 6, 7, 8))
    alone = walk(sampler, mixture, x[2:3], (7,))

    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-5)
    assert together.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_second_walk_knows_nothing_of_an_interrupted_first(name):
    mixture, x = Mixture(4, 0.3), noise(2, 4, 2, 2)
    scheduler = RFlowScheduler(1000) if name == "rflow" else training()
    sampler = Sampler(scheduler, name, 12)
    expected = walk(sampler, mixture, x, (1, 2))
    sampler.start(0.5)
    generators = [torch.Generator().manual_seed(0)] * 2
    for index in range(3):
        sampler.step(x, index, x, generators)

    torch.testing.assert_close(walk(sampler, mixture, x, (1, 2)), expected, rtol=0, atol=0)


def test_only_added_noise_is_stochastic():
    stochastic = [name for name in BETAS if Sampler(training(), name, 10).is_stochastic]

    assert stochastic == ["ddpm"]
    assert Sampler(training(), "ddim", 10, eta=0.1).is_stochastic


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "euler"}, r"sampler must be one of ddim, dpm\+\+, unipc, pndm, ddpm, rflow, got 'euler'"),
        ({"name": "rflow"}, r"sampler must be ddim, .*, ddpm for a network trained with DDPMScheduler, got rflow"),
        ({"noise_scheduler": RFlowScheduler()}, r"must be rflow for a network trained with RFlowScheduler, got dpm"),
        ({"noise_scheduler": object()}, "noise_scheduler must be a DDPMScheduler or an RFlowScheduler"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps must be a whole number"),
        ({"num_steps": 1001}, "num_steps must be from 1 to 1000, the timesteps of the training, got 1001"),
        ({"spacing": "karras"}, "spacing of .* must be leading or trailing or linspace or quadratic, got 'karras'"),
        ({"noise_scheduler": RFlowScheduler(), "name": "rflow", "spacing": "leading"}, "of rflow must be trailing"),
        ({"name": "ddim", "num_steps": 600}, "600 would begin at timestep 599, where the noise is not pure"),
        ({"name": "ddim", "num_steps": 1}, "1 would begin at timestep 0"),
        ({"name": "ddim", "eta": 1.5}, "eta must be a number from 0 to 1"),
        ({"name": "ddim", "eta": math.nan}, "eta must be a number from 0 to 1"),
        ({"name": "dpm++", "eta": 0.5}, "eta is a setting of ddim"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        Sampler(**{"noise_scheduler": training(), **settings})

    assert "\n" not in str(caught.value)
