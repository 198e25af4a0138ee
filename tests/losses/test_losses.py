"""KL against torch.distributions; LPIPS from a local file against the lpips package."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from medgen.errors import UserError
from medgen.losses import GaussianKLLoss, LocalLPIPS


def test_kl_equals_torch_distributions_summed_over_the_latent_and_averaged_over_the_batch():
    mu, sigma = torch.randn(4, 3, 5, 5), torch.rand(4, 3, 5, 5) + 0.1
    expected = kl_divergence(Normal(mu, sigma), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum((1, 2, 3))
    torch.testing.assert_close(GaussianKLLoss()(mu, sigma), expected.mean())


@pytest.fixture(scope="module")
def squeezenet_file(tmp_path_factory):
    """A file as torchvision publishes it, with random numbers in it."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path


def lpips_package_with(path):
    import lpips
    from torchvision.models import squeezenet1_1

    backbone = squeezenet1_1(weights=None)
    backbone.load_state_dict(torch.load(path, weights_only=True))
    oracle = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for part in oracle.net.children():
        for name in [name for name, _ in part.named_children()]:
            setattr(part, name, backbone.features[int(name)])
    return oracle.eval()


@pytest.mark.parametrize("rescale", [False, True])
def test_lpips_equals_the_lpips_package_with_the_same_backbone(squeezenet_file, rescale):
    x, y = torch.rand(2, 2, 3, 64, 64)
    expected = lpips_package_with(squeezenet_file)(x, y, normalize=rescale).mean()
    torch.testing.assert_close(LocalLPIPS("squeeze", squeezenet_file, rescale)(x, y), expected)


def test_lpips_of_one_channel_is_that_of_three_equal_ones(squeezenet_file):
    loss = LocalLPIPS("squeeze", squeezenet_file)
    x, y = torch.rand(2, 2, 1, 64, 64)
    torch.testing.assert_close(loss(x, y), loss(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


def test_lpips_gives_gradients_to_the_image_but_not_to_itself_and_never_leaves_evaluation_mode(squeezenet_file):
    loss = LocalLPIPS("squeeze", squeezenet_file).train()
    x = torch.rand(1, 1, 64, 64, requires_grad=True)
    loss(x, torch.rand(1, 1, 64, 64)).backward()
    assert x.grad.abs().sum() > 0
    assert not loss.lpips.training
    assert all(p.grad is None for p in loss.parameters())


def test_missing_weights_are_named_with_their_source_and_the_way_to_do_without(tmp_path):
    with pytest.raises(UserError, match=r"squeezenet1_1.*no file at .*download\.pytorch\.org.*--perceptual_weight 0"):
        LocalLPIPS("squeeze", tmp_path / "absent.pth")


def test_weights_of_another_network_are_refused(squeezenet_file, tmp_path):
    with pytest.raises(UserError, match="does not hold the weights of torchvision's alexnet"):
        LocalLPIPS("alex", squeezenet_file)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="does not hold the weights"):
        LocalLPIPS("squeeze", tmp_path / "text.pth")


def test_unknown_network_is_refused():
    with pytest.raises(UserError, match="squeeze, alex, vgg, got 'resnet'"):
        LocalLPIPS("resnet")
