"""Feature networks: what they receive, whose layer is read, and that foreign weight files arrive whole and run nothing.

Pretrained weights are compared only when an environment variable names their file: MEDGEN_TEST_INCEPTION,
MEDGEN_TEST_SWAV, MEDGEN_TEST_XRV.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import densenet121, resnet50

from medgen.errors import UserError
from medgen.metrics.extractors import InceptionV3Features, ModuleFeatures, SwAVFeatures, XRVDenseNetFeatures
from medgen.metrics.protocols import Protocol, get_protocol, make_extractor


class Recorder(nn.Module):
    """Gives the channel means."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


class InChildren(nn.Module):
    """A recorder as one of several layers, in the way of torch-fidelity's Inception: the last is the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.classifier = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.recorder(x),)


def images(channels: int, side: int, count: int = 2) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (channels, side, side)) / 255).astype(np.float32) for _ in range(count)]


def any_file(protocol: Protocol) -> Protocol:
    """The row without the hash of the published weights, for files made here."""
    return replace(protocol, weights=replace(protocol.weights, sha256=""))


@pytest.fixture
def randomised():
    """Fills a network with numbers under which its features are neither zero nor infinite."""

    def fill(network: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return network.eval().requires_grad_(False)

    return fill


# ---------------------------------------------------------------------------------------------------------------------
# what a network receives


# What black (0), white (1) and the colour (0.2, 0.6, 1.0), of levels 51, 153 and 255, become; computed by hand:
# fid (level - 128) / 128, fid_tf the level, fsd (value - mean) / std of ImageNet, xrv 2048 value - 1024 of the luma
# 0.299 x 0.2 + 0.587 x 0.6 + 0.114 = 0.526.
FED = {
    "fid": ((3, 299, 299), (-1,) * 3, (0.9921875,) * 3, (-0.6015625, 0.1953125, 0.9921875)),
    "fid_tf": ((3, 64, 48), (0,) * 3, (255,) * 3, (51, 153, 255)),
    "fsd": (
        (3, 224, 224),
        (-2.117904, -2.035714, -1.804444),
        (2.248908, 2.428571, 2.64),
        (-1.244541, 0.642857, 2.64),
    ),
    "xrv": ((1, 224, 224), (-1024,), (1024,), (53.248,)),
}
NETWORKS = {"fid": InceptionV3Features, "fid_tf": InceptionV3Features, "fsd": SwAVFeatures, "xrv": XRVDenseNetFeatures}


@pytest.mark.parametrize("name", FED)
def test_networks_receive_their_range_size_and_channels(name: str) -> None:
    # the feature map of xrv is averaged outside of the network, so its stub must return a map
    network = {"xrv": nn.Identity(), "fsd": Recorder()}.get(name) or InChildren()
    built = NETWORKS[name](name, network=network)
    seen = []
    # protocol fid calls the layers one by one, the others call the network
    watched = network.recorder if isinstance(network, InChildren) else network
    watched.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    black, white = (np.full((1, 64, 48), value, np.float32) for value in (0, 1))
    colour = np.zeros((3, 64, 48), np.float32)
    colour[:, :32] = np.array([0.2, 0.6, 1.0])[:, None, None]  # upper half
    colour[:, :, 24:] = 0  # left half

    built.on_images([black, white, colour])

    (received,) = seen
    shape, low, high, mixed = FED[name]
    assert received.shape == (3, *shape)
    assert received.dtype == (torch.uint8 if name == "fid_tf" else torch.float32)
    received = received.double().numpy()
    height, width = shape[1:]
    rows, columns = (
        (slice(None, height // 4), slice(3 * height // 4, None)),
        (slice(width // 4), slice(-width // 4, None)),
    )
    for values, expected in (
        (received[0], low),
        (received[1], high),
        (received[2][:, rows[0], columns[0]], mixed),
        (received[2][:, rows[0], columns[1]], low),
        (received[2][:, rows[1], columns[0]], low),
    ):
        np.testing.assert_allclose(values, np.broadcast_to(np.reshape(expected, (-1, 1, 1)), values.shape), atol=5e-4)


@pytest.mark.parametrize(("role", "top"), [("reference", 1.0), ("samples", 255.0)])
def test_invalid_source_protocol_feeds_each_side_as_the_source_did(role: str, top: float) -> None:
    received = []
    network = nn.Identity()
    network.register_forward_pre_hook(lambda _, args: received.append(args[0].clone()))
    built = XRVDenseNetFeatures(get_protocol("xrv_ldm_source", role=role), network=network)

    features = built.on_images([np.ones((1, 96, 96), np.float32)])

    assert received[0].shape == (1, 1, 96, 96)
    assert received[0].max() == top
    np.testing.assert_array_equal(features, [[top]])


def test_images_of_several_sizes_pass_one_by_one_where_a_network_takes_any() -> None:
    built = ModuleFeatures("module:x", network=Recorder())
    batch = [np.full((1, side, side), value, np.float32) for side, value in ((8, 0.25), (6, 0.5))]

    features = built.on_images(batch)

    np.testing.assert_array_equal(features, [[0.25], [0.5]])


def test_extractor_is_not_used_up() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1))
    built = ModuleFeatures("module:x", network=network)
    first, second = images(3, 16), images(3, 24, count=3)
    settings = dict(built.settings)

    once = built.on_images(first)
    built.on_images(second)

    np.testing.assert_array_equal(built.on_images(first), once)
    assert built.settings == settings == ModuleFeatures("module:x", network=network).settings


def test_networks_evaluate_without_gradients() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    built = ModuleFeatures("module:x", network=network)
    before = network[1].running_mean.clone()

    first, again = built.on_images(images(1, 8)), built.on_images(images(1, 8))

    np.testing.assert_array_equal(first, again)
    assert torch.equal(network[1].running_mean, before)
    assert first.dtype == np.float32


def test_settings_change_with_the_weights_only() -> None:
    torch.manual_seed(0)
    network, other = (nn.Sequential(nn.Conv2d(1, 2, 1)) for _ in range(2))
    twin = nn.Sequential(nn.Conv2d(1, 2, 1))
    twin.load_state_dict(network.state_dict())

    settings = [ModuleFeatures("module:x", network=net).settings for net in (network, other, twin)]

    assert settings[0] == settings[2]
    assert settings[0] != settings[1]


class Subtracts(nn.Module):
    """Keeps a number that is in no state dict."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([mean]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean).mean((2, 3))


def test_settings_change_with_layers_without_weights_and_with_buffers_that_are_not_saved() -> None:
    pairs = (
        (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), nn.Sequential(nn.AvgPool2d(2))),
        (Subtracts(0.5), Subtracts(0.25)),
    )
    for pair in pairs:
        first, second = (ModuleFeatures("module:x", network=network).settings for network in pair)

        assert first != second


def test_cudnn_stays_on_and_tf32_is_off_while_features_are_computed() -> None:
    found = []

    class Asks(Recorder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()))
            return super().forward(x)

    before = torch.backends.cudnn.allow_tf32
    ModuleFeatures("module:x", network=Asks()).on_images(images(1, 4))

    assert found == [(True, False, False)]
    assert torch.backends.cudnn.allow_tf32 == before


def test_missing_device_is_named() -> None:
    with pytest.raises(UserError, match="device cuda:99 is not there"):
        ModuleFeatures("module:x", network=Recorder(), device="cuda:99")


# ---------------------------------------------------------------------------------------------------------------------
# Inception v3


@pytest.fixture
def inception(tmp_path: Path, randomised, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Path]:
    """torch-fidelity's network with random weights, and a file of them."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with monkeypatch.context() as patched:  # its constructor wants weights; the network's own will do
        patched.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: None)
        patched.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = randomised(fidelity.FeatureExtractorInceptionV3("inception", ["2048"]))
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_from_a_file_equals_torch_fidelity(inception: tuple[nn.Module, Path]) -> None:
    network, path = inception
    batch = images(3, 299)
    built = {name: InceptionV3Features(any_file(get_protocol(name)), weights=path) for name in ("fid", "fid_tf")}

    clean, legacy = (built[name].on_images(batch) for name in ("fid", "fid_tf"))

    # at the network's own size neither resizing does anything, so both must equal its own forward()
    levels = torch.from_numpy(np.stack(batch)).mul(255).round().to(torch.uint8)
    expected = network(levels)[0].numpy()
    assert clean.shape == (2, 2048)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(clean, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(legacy, expected)


def test_inception_protocols_differ_when_they_resize(inception: tuple[nn.Module, Path]) -> None:
    network, _ = inception
    batch = images(1, 640, count=1)

    clean, legacy = (InceptionV3Features(name, network=network).on_images(batch) for name in ("fid", "fid_tf"))

    assert np.abs(clean - legacy).max() > 0.01 * np.abs(legacy).max()


def test_inception_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)

    with pytest.raises(UserError, match="belongs to another network") as caught:
        InceptionV3Features(any_file(get_protocol("fid")), weights=path)
    assert "\n" not in str(caught.value)


def test_inception_file_is_not_unpickled(tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    path = tmp_path / "bad.pth"
    torch.save({"fc.weight": Run()}, path)

    with pytest.raises(UserError, match="not a file of plain weights"):
        InceptionV3Features(any_file(get_protocol("fid")), weights=path)
    assert not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------------------------------------------------------
# SwAV


def test_swav_from_a_checkpoint_equals_the_resnet_in_it(tmp_path: Path, randomised) -> None:
    network = randomised(resnet50(weights=None))
    state = {f"module.{name}": v for name, v in network.state_dict().items() if not name.startswith("fc.")}
    state |= {"module.projection_head.0.weight": torch.ones(2), "module.prototypes.weight": torch.ones(3)}
    path = tmp_path / "swav.pth.tar"
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)
    batch = images(3, 224)

    features = SwAVFeatures("fsd", weights=path).on_images(batch)

    network.fc = nn.Identity()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = network((torch.from_numpy(np.stack(batch)) - mean) / std).numpy()
    assert features.shape == (2, 2048)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_swav_file_with_a_layer_missing_is_refused(tmp_path: Path) -> None:
    state = {f"module.{name}": v for name, v in resnet50(weights=None).state_dict().items() if "layer3" not in name}
    path = tmp_path / "swav.pth.tar"
    torch.save(state, path)

    with pytest.raises(UserError, match=r"another architecture.*layer3\.0\.conv1\.weight, got nothing"):
        SwAVFeatures("fsd", weights=path)


# ---------------------------------------------------------------------------------------------------------------------
# torchxrayvision


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_xrv_from_a_pickled_module_equals_its_library(tmp_path: Path, randomised, new_format: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xrv = pytest.importorskip("torchxrayvision")
    network = randomised(xrv.models.DenseNet(weights=None))
    path = tmp_path / "densenet.pt"
    torch.save(network, path, _use_new_zipfile_serialization=new_format)
    batch = images(1, 224)

    features = XRVDenseNetFeatures("xrv", weights=path).on_images(batch)

    prepared = np.stack([xrv.utils.normalize(image * 255, 255) for image in batch])
    expected = network.features(torch.from_numpy(prepared)).mean((2, 3)).numpy()
    assert features.shape == (2, 1024)
    assert (expected < 0).any()  # no ReLU
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4 * expected.std())


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_xrv_weights_are_taken_out_of_a_module_with_other_things_in_it(
    tmp_path: Path, randomised, new_format: bool
) -> None:
    network = densenet121(weights=None)
    network.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    randomised(network).targets = np.array(["Edema", "Mass"], dtype=object)
    for module in network.modules():
        del module._non_persistent_buffers_set  # as in files from before it was invented
    path = tmp_path / "densenet.pt"
    torch.save(network, path, _use_new_zipfile_serialization=new_format)
    batch = images(1, 224)

    features = XRVDenseNetFeatures("xrv", weights=path).on_images(batch)

    expected = network.features(torch.from_numpy(np.stack(batch)) * 2048 - 1024).mean((2, 3)).numpy()
    assert (expected < 0).any()  # no ReLU
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4 * expected.std())


def test_xrv_file_that_runs_something_is_refused(tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    path = tmp_path / "densenet.pt"
    torch.save(Run(), path)
    assert b"system" in path.read_bytes()

    with pytest.raises(UserError, match=r"names (posix|nt)\.system"):
        XRVDenseNetFeatures("xrv", weights=path)
    assert not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------------------------------------------------------
# modules of one's own


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    path = tmp_path / "net.ts"
    torch.jit.save(torch.jit.script(network), path)
    protocol = get_protocol(f"module:{path}", feature_size=16, feature_range=(-1, 1), feature_channels=3)
    batch = images(1, 16)

    built = make_extractor(protocol)

    x = torch.from_numpy(np.stack(batch)).repeat(1, 3, 1, 1) * 2 - 1
    expected = network(x).mean((2, 3)).detach().numpy()
    np.testing.assert_allclose(built.on_images(batch), expected, rtol=1e-5, atol=1e-6)
    assert built.settings["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    one_channel = make_extractor(get_protocol(f"module:{path}"))
    with pytest.raises(UserError, match=r"does not take images of .* \(1, 16, 16\).*set --feature_channels") as caught:
        one_channel.on_images(batch)
    assert "\n" not in str(caught.value)


def test_callable_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def pool():\n    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten())\n"
        "def pair():\n    return nn.LSTM(4, 4)\n"
        "number = int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    features = make_extractor(get_protocol("module:my_nets:pool")).on_images([np.ones((1, 8, 8), np.float32)])

    np.testing.assert_array_equal(features, np.ones((1, 4)))
    for name, said in (
        ("my_nets:absent", "cannot be imported"),
        ("no_such_package:pool", "cannot be imported"),
        ("my_nets:number", "must return a torch.nn.Module, got a int"),
        ("absent.ts", "which is no file"),
    ):
        with pytest.raises(UserError, match=said):
            make_extractor(get_protocol(f"module:{name}"))
    with pytest.raises(UserError, match="must give one tensor"):
        ModuleFeatures("module:x", network=nn.Flatten(0)).on_images(images(1, 4))
    (tmp_path / "text.ts").write_text("x")
    with pytest.raises(UserError, match="no TorchScript file"):
        make_extractor(get_protocol(f"module:{tmp_path / 'text.ts'}"))


def test_preparation_travels_to_processes_without_the_network() -> None:
    built = ModuleFeatures("module:x", network=nn.Linear(1000, 1000))

    assert len(pickle.dumps(built.prepare)) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# the published weights


def published(variable: str) -> str:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} names no file of published weights")
    return path


def test_published_inception_weights_classify_alike_in_both_protocols() -> None:
    path = published("MEDGEN_TEST_INCEPTION")
    batch = images(3, 299)

    clean, legacy = (InceptionV3Features(name, weights=path).on_images(batch) for name in ("fid", "fid_tf"))

    np.testing.assert_allclose(clean, legacy, rtol=1e-3, atol=1e-4)
    assert clean.min() >= 0


def test_published_swav_weights_fit() -> None:
    features = SwAVFeatures("fsd", weights=published("MEDGEN_TEST_SWAV")).on_images(images(3, 224))

    assert features.shape == (2, 2048)
    assert features.min() >= 0


def test_published_xrv_weights_fit() -> None:
    features = XRVDenseNetFeatures("xrv", weights=published("MEDGEN_TEST_XRV")).on_images(images(1, 224))

    assert features.shape == (2, 1024)
    assert features.min() < 0
