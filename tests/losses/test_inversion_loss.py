"""Loss of an inversion beside lpips, torchvision and a restatement by hand; what must stay out of it."""

from __future__ import annotations

import lpips
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import alexnet, resnet50
from torchvision.transforms import functional as TF

from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.losses import DiscriminatorLoss, MoCoLoss, PixelMSSSIMLoss, inversion_loss
from medgen.networks import PGGANDiscriminator, StyleGAN2Discriminator
from medgen.weights import state_digest

ONLY = {"pixel_weight": 0, "perceptual_weight": 0, "similarity_weight": 0}
SIDE = 32


def pair(side: int = SIDE, batch: int = 3, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and the targets that they are like."""
    generator = torch.Generator().manual_seed(0)
    target = F.interpolate(torch.rand(batch, channels, 6, 6, generator=generator), side, mode="bilinear")
    return 0.8 * target + 0.2 * torch.rand(target.shape, generator=generator), target


def make_discriminator(family: str = "pggan") -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "pggan":
        return PGGANDiscriminator((12, 10, 8, 6))
    return StyleGAN2Discriminator(SIDE, channel_base=256, channel_max=16)


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    """The convolutions of a file as torchvision publishes it, with random numbers in it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({f"features.{name}": value for name, value in alexnet().features.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def resnet():
    """Random, also in what batch normalisation has seen."""
    torch.manual_seed(0)
    network = resnet50().eval().requires_grad_(False)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.1 * torch.randn_like(buffer) + name.endswith("var"))
    return network


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory, resnet):
    """Laid out as MoCo's checkpoint: two encoders, each with a projection head instead of the classifier."""
    state = {"module.queue": torch.rand(128, 4), "module.encoder_q.fc.0.weight": torch.rand(4, 4)}
    for name, value in resnet.state_dict().items():
        if not name.startswith("fc."):
            state |= {f"module.encoder_k.{name}": value + 1, f"module.encoder_q.{name}": value}
    path = tmp_path_factory.mktemp("moco") / "moco.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def full(alexnet_file):
    """All terms, without MoCo, which takes long."""
    return inversion_loss(
        perceptual_weights=alexnet_file, ms_ssim_weight=0.5, similarity_weight=0.3, discriminator=make_discriminator()
    )


# ---------------------------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("channels", [1, 3])
def test_perceptual_term_is_lpips_of_alexnet(alexnet_file, channels):
    image, target = pair(64, channels=channels)
    mine, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    loss = inversion_loss(**{**ONLY, "perceptual_weight": 2}, perceptual_weights=alexnet_file)
    oracle = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    given = torch.load(alexnet_file)
    oracle.net.load_state_dict({name: given[f"features.{name.split('.', 1)[1]}"] for name in oracle.net.state_dict()})
    value = loss(mine, loss.prepare(target))
    expected = 2 * oracle(theirs.expand(-1, 3, -1, -1), target.expand(-1, 3, -1, -1), normalize=True).flatten()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-7)


def test_similarity_to_moco_is_one_minus_the_cosine_after_the_last_pooling(moco_file, resnet):
    image, target = pair(256, batch=1)
    loss = inversion_loss(**{**ONLY, "similarity_weight": 1}, similarity_weights=moco_file)
    trunk = torch.nn.Sequential(*list(resnet.children())[:-1])

    def features(x: torch.Tensor) -> torch.Tensor:
        x = TF.resize(x.expand(-1, 3, -1, -1), [224, 224], antialias=True)
        return trunk(TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])).flatten(1).double()

    expected = 1 - F.cosine_similarity(features(image), features(target))
    assert features(image).shape == (1, 2048)
    torch.testing.assert_close(loss(image, loss.prepare(target)).double(), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("family", ["pggan", "stylegan2"])
def test_similarity_to_the_discriminator_is_one_minus_the_mean_cosine(family):
    image, target = pair()
    discriminator = make_discriminator(family).requires_grad_(False)
    loss = inversion_loss(**{**ONLY, "similarity_weight": 1}, discriminator=discriminator)
    levels = zip(discriminator.features(image * 2 - 1), discriminator.features(target * 2 - 1), strict=True)
    cosines = [F.cosine_similarity(mine.double(), theirs.double()).mean((1, 2)) for mine, theirs in levels]
    expected = 1 - torch.stack(cosines).mean(0)
    torch.testing.assert_close(loss(image, loss.prepare(target)).double(), expected, rtol=1e-4, atol=1e-7)


def test_pixel_and_ms_ssim_are_those_of_the_projection(full):
    image, target = pair()
    terms = full.terms(image, full.prepare(target))
    ssim = PixelMSSSIMLoss(pixel_weight=0)
    torch.testing.assert_close(terms["pixel"], F.mse_loss(image, target, reduction="none").mean((1, 2, 3)))
    torch.testing.assert_close(terms["ms_ssim"], ssim(image, ssim.prepare(target)))


def test_loss_is_the_weighted_sum_of_its_terms(full):
    image, target = pair()
    features = full.prepare(target)
    terms = full.terms(image, features)
    expected = terms["pixel"] + 0.8 * terms["perceptual"] + 0.5 * terms["ms_ssim"] + 0.3 * terms["similarity"]
    torch.testing.assert_close(full(image, features), expected)
    assert len(terms) == 4
    assert all(value.shape == (3,) and (value > 0).all() for value in terms.values())


def test_equal_images_have_distance_zero(full):
    _, target = pair()
    assert full(target, full.prepare(target)).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# what must not be


def test_an_image_s_value_does_not_depend_on_its_batch(full):
    image, target = pair(batch=4)
    together = full(image, full.prepare(target))
    alone = torch.cat([full(image[n : n + 1], full.prepare(target[n : n + 1])) for n in range(4)])
    torch.testing.assert_close(together, alone)
    kept = tuple(part[[2, 0]] for part in full.prepare(target))
    torch.testing.assert_close(full(image[[2, 0]], kept), together[[2, 0]])


def test_moco_stays_in_evaluation_mode_and_grey_stands_for_three_channels(moco_file):
    image, target = pair(batch=2)
    loss = MoCoLoss(moco_file)
    torch.nn.Sequential(loss).train()
    together = loss(image, loss.prepare(target))
    in_colour = image[:1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(loss(in_colour, loss.prepare(target[:1])), together[:1], rtol=1e-3, atol=1e-8)


def test_targets_of_several_sizes_can_be_compared_in_turn(alexnet_file):
    loss = inversion_loss(perceptual_weights=alexnet_file, ms_ssim_weight=1, similarity_weight=0)
    small, large = pair(32), pair(64)
    of_small, of_large = loss.prepare(small[1]), loss.prepare(large[1])
    assert loss(small[0], of_small).shape == loss(large[0], of_large).shape == (3,)


def test_gradients_reach_the_images_and_nothing_else(full):
    image, target = pair()
    image, target = image.requires_grad_(), target.requires_grad_()
    features = full.prepare(target)
    full.train()(image, features).sum().backward()
    assert image.grad.isfinite().all()
    assert (image.grad.flatten(1).abs().sum(1) > 0).all()
    assert target.grad is None
    assert not any(part.requires_grad for part in features)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in full.parameters())
    assert not any(module.training for module in full.modules())


def test_gradient_through_a_discriminator_is_the_derivative():
    torch.manual_seed(0)
    loss = DiscriminatorLoss(PGGANDiscriminator((6, 4)).double())
    image, target = (x.double() for x in pair(8, batch=1))
    features = loss.prepare(target)
    assert torch.autograd.gradcheck(lambda x: loss(x, features), image.requires_grad_())


def test_use_under_inference_mode_leaves_nothing_that_a_later_gradient_trips_over(alexnet_file):
    loss = inversion_loss(perceptual_weights=alexnet_file, ms_ssim_weight=1, discriminator=make_discriminator())
    image, target = pair()
    with torch.inference_mode():
        loss(image, loss.prepare(target))
    image.requires_grad_()
    loss(image, loss.prepare(target)).sum().backward()
    assert image.grad.isfinite().all()


def test_black_images_have_a_finite_gradient(full):
    image = torch.zeros(1, 1, SIDE, SIDE, requires_grad=True)
    full(image, full.prepare(torch.zeros(1, 1, SIDE, SIDE))).sum().backward()
    assert image.grad.isfinite().all()


def test_autocast_changes_nothing(full):
    image, target = pair()
    expected = full(image, full.prepare(target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = full(image, full.prepare(target))
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    half = full(image.bfloat16(), full.prepare(target))  # what an encoder under autocast hands over
    torch.testing.assert_close(half, expected, rtol=0.05, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# files and settings


@pytest.mark.parametrize("prefix", ["", "encoder_q.", "backbone."])
def test_resnets_are_taken_by_several_names(tmp_path, resnet, prefix):
    path = tmp_path / "resnet.pth"
    torch.save({f"{prefix}{name}": value for name, value in resnet.state_dict().items()}, path)
    mine, expected = MoCoLoss(path).backbone.state_dict(), resnet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in mine.items())


def test_of_moco_s_two_encoders_the_query_s_is_taken(moco_file, resnet):
    mine, expected = MoCoLoss(moco_file).backbone.state_dict(), resnet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in mine.items())


def test_settings_name_weights_and_files(full, alexnet_file, moco_file):
    assert full.settings == {
        "loss": "inversion",
        "pixel_weight": 1.0,
        "perceptual_weight": 0.8,
        "perceptual": "lpips_alex",
        "largest_side": 256,
        "perceptual_sha256": file_sha256(alexnet_file),
        "ms_ssim_weight": 0.5,
        "similarity_weight": 0.3,
        "similarity": "discriminator",
        "similarity_sha256": state_digest(make_discriminator()),
    }
    with_file = inversion_loss(perceptual_weight=0, similarity_weights=moco_file, discriminator=make_discriminator())
    assert with_file.settings["similarity"] == "moco_v2"
    assert with_file.settings["similarity_sha256"] == file_sha256(moco_file)


def test_terms_of_weight_zero_need_no_file(tmp_path):
    absent = tmp_path / "absent.pth"
    loss = inversion_loss(
        perceptual_weight=0, perceptual_weights=absent, similarity_weight=0, similarity_weights=absent
    )
    image, target = pair()
    assert set(loss.terms(image, loss.prepare(target))) == {"pixel"}


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"similarity_weight": 0, "perceptual_weights": "absent"}, "--perceptual_weight 0"),
        ({"perceptual_weight": 0, "similarity_weights": "absent"}, "--similarity_weight 0"),
    ],
)
def test_missing_files_are_told_with_their_source_and_the_way_out(settings, way_out):
    with pytest.raises(UserError, match="no file at absent; copy .* from https://.*" + way_out) as caught:
        inversion_loss(**settings)
    assert "\n" not in str(caught.value)


def test_perceptual_weights_are_looked_for_in_torch_s_cache(tmp_path, monkeypatch, alexnet_file):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "alexnet-owt-7be5be79.pth").write_bytes(alexnet_file.read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert inversion_loss(similarity_weight=0).settings["perceptual_sha256"] == file_sha256(alexnet_file)


@pytest.mark.parametrize("content", [b"no torch file", None, {"conv1.weight": torch.rand(2)}, [1, 2]])
def test_files_of_something_else_are_refused_in_one_line(tmp_path, alexnet_file, content):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(torch.load(alexnet_file) if content is None else content, path)
    with pytest.raises(UserError, match=r"other\.pth does not hold the weights of a ResNet-50 .*--similarity_weight 0"):
        MoCoLoss(path)


def test_a_similarity_without_a_network_names_both_ways():
    with pytest.raises(UserError, match=r"--similarity_weights.*--discriminator_checkpoint.*--similarity_weight 0"):
        inversion_loss(perceptual_weight=0)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("name", ["pixel_weight", "perceptual_weight", "ms_ssim_weight", "similarity_weight"])
def test_weights_that_mean_nothing_are_refused(name, weight):
    with pytest.raises(UserError, match=f"^{name} must be a number from 0"):
        inversion_loss(**{**ONLY, name: weight})


def test_a_loss_without_terms_is_refused():
    with pytest.raises(UserError, match="needs a weight above 0, all are 0"):
        inversion_loss(**ONLY)


def test_networks_without_features_are_no_discriminators():
    with pytest.raises(UserError, match="got Linear"):
        inversion_loss(perceptual_weight=0, discriminator=torch.nn.Linear(1, 1))


def test_a_discriminator_of_one_level_is_refused():
    discriminator = make_discriminator()
    discriminator.grow(4)
    with pytest.raises(UserError, match="no levels to compare"):
        DiscriminatorLoss(discriminator).prepare(torch.rand(1, 1, 4, 4))


def test_images_that_a_network_does_not_take_are_refused(alexnet_file):
    perceptual = inversion_loss(similarity_weight=0, perceptual_weights=alexnet_file)
    assert perceptual.prepare(torch.rand(1, 1, 31, 40))
    with pytest.raises(UserError, match="AlexNet takes images of at least 31 pixels, got 30"):
        perceptual.prepare(torch.rand(1, 1, 30, 40))
    with pytest.raises(UserError, match=r"1 or 3, H, W\), got \(1, 2, 64, 64\)"):
        perceptual.prepare(torch.rand(1, 2, 64, 64))
    with pytest.raises(UserError, match=r"\(1, 64, 64\), got \(3, 64, 64\)"):
        perceptual(torch.rand(1, 3, 64, 64), perceptual.prepare(torch.rand(1, 1, 64, 64)))
