"""Distances between sets inside an evaluation: handlers in ignite and MONAI engines, gathering, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.metrics import FIDMetric

from medgen.errors import UserError
from medgen.metrics import distribution
from medgen.metrics.distribution import (
    PRDC,
    FrechetDistance,
    FrechetDistanceMetric,
    FrechetRadiomicDistance,
    KernelDistance,
    PRDCMetric,
)
from medgen.metrics.extractors import XRVDenseNetFeatures
from medgen.metrics.frd import frd_score
from medgen.metrics.frechet import frechet_distance
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.prdc import precision_recall_density_coverage
from medgen.metrics.protocols import get_protocol, make_extractor
from medgen.metrics.radiomics import RadiomicsExtractor

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(40, 1, 8, 8, generator=GENERATOR)
PREDICTIONS = (IMAGES + 0.3 * torch.rand(40, 1, 8, 8, generator=GENERATOR)).flip(0)


class Extractor(torch.nn.Module):
    """Means over quarters; the dropout must be off, and the sizes of the batches are kept."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        assert not torch.is_grad_enabled()
        return self.dropout(torch.nn.functional.avg_pool2d(images, 4).flatten(1).double())


def features(images):
    return torch.nn.functional.avg_pool2d(images, 4).flatten(1).double().numpy()


def batches(size=16):
    return list(zip(PREDICTIONS.split(size), IMAGES.split(size), strict=True))


def test_handlers_measure_the_whole_evaluation_and_start_anew():
    engine = Engine(lambda _, batch: batch)
    handlers = {
        "frechet": FrechetDistance(Extractor()),
        "kid": KernelDistance(Extractor(), degree=2),
        "prdc": PRDC(Extractor(), nearest_k=3),
    }
    for name, handler in handlers.items():
        handler.attach(engine, name)
    real, fake = features(IMAGES), features(PREDICTIONS)
    prdc = precision_recall_density_coverage(real, fake, 3)
    for _ in range(2):  # a second evaluation knows nothing of the first
        metrics = engine.run(batches()).metrics
        assert metrics["frechet"] == pytest.approx(frechet_distance(real, fake), rel=1e-9)
        assert metrics["kid"] == pytest.approx(kernel_distance(real, fake, degree=2), rel=1e-9)
        assert {key: metrics[f"prdc_{key}"] for key in prdc} == pytest.approx(prdc)
        assert all(isinstance(value, float) for value in metrics.values())
    half = engine.run(batches()[:1]).metrics
    assert half["frechet"] == pytest.approx(frechet_distance(real[:16], fake[:16]), rel=1e-9)


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated")
def test_metric_equals_monais_on_features_and_is_not_thrown_by_singular_covariances():
    metric = FrechetDistanceMetric()
    fake, real = torch.from_numpy(features(PREDICTIONS)), torch.from_numpy(features(IMAGES))
    for start in range(0, 40, 7):
        metric(fake[start : start + 7], real[start : start + 7])
    assert float(metric.aggregate()) == pytest.approx(float(FIDMetric()(fake, real)), rel=1e-6)
    metric.reset()
    metric(fake.repeat(1, 2), real.repeat(1, 2))
    assert float(metric.aggregate()) == pytest.approx(2 * frechet_distance(fake.numpy(), real.numpy()), rel=1e-9)


def test_evaluator_made_from_a_config_gives_batches_to_the_extractor():
    extractor = Extractor()
    config = {
        "extractor": extractor,
        "frechet": {
            "_target_": "medgen.metrics.distribution.FrechetDistance",
            "extractor": "@extractor",
            "output_transform": "$monai.handlers.from_engine(['pred', 'image'])",
        },
        "prdc": {
            "_target_": "medgen.metrics.distribution.PRDC",
            "extractor": "@extractor",
            "output_transform": "$monai.handlers.from_engine(['pred', 'image'])",
        },
        "imports": ["$import monai"],
    }
    parser = ConfigParser(config)
    parser.parse()
    loader = [{"image": MetaTensor(real), "label": fake} for fake, real in batches()]
    lookup = {float(real[0, 0, 0, 0]): fake for fake, real in batches()}
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=torch.nn.Identity(),
        inferer=lambda inputs, network: lookup[float(inputs[0, 0, 0, 0])],
        key_val_metric={"frechet": parser.get_parsed_content("frechet")},
        additional_metrics={"prdc": parser.get_parsed_content("prdc")},
    )
    evaluator.run()  # decollates, as MONAI does by default: the metrics see lists of images
    expected = frechet_distance(features(IMAGES), features(PREDICTIONS))
    assert evaluator.state.metrics["frechet"] == pytest.approx(expected, rel=1e-9)
    assert evaluator.state.best_metric == evaluator.state.metrics["frechet"]
    assert 0 <= evaluator.state.metrics["prdc_coverage"] <= 1
    assert set(extractor.batches) == {16, 8}


def test_features_written_by_the_postprocessing_are_taken_without_an_extractor():
    engine = Engine(
        lambda _, batch: [
            {"a": pred, "b": image}
            for pred, image in zip(*map(torch.from_numpy, map(features, batch)), strict=True)
        ]
    )  # fmt: skip
    FrechetDistance(output_transform=from_engine(["a", "b"])).attach(engine, "frechet")
    value = engine.run(batches()).metrics["frechet"]
    assert value == pytest.approx(frechet_distance(features(IMAGES), features(PREDICTIONS)), rel=1e-9)


def test_extractors_may_return_arrays_and_images_may_differ_in_size():
    def statistics(images):
        images = np.asarray(images)
        return np.stack([images.mean(axis=(1, 2, 3)), images.std(axis=(1, 2, 3))], axis=1)

    metric = FrechetDistanceMetric(statistics)
    lists = [[image[:, : 4 + n % 3] for n, image in enumerate(images)] for images in (PREDICTIONS, IMAGES)]
    metric(*lists)
    fake, real = (np.concatenate([statistics(image[None]) for image in images]) for images in lists)
    assert float(metric.aggregate()) == pytest.approx(frechet_distance(real, fake), rel=1e-9)


def test_half_precision_features_are_taken_for_what_they_are():
    metric = FrechetDistanceMetric(lambda images: torch.nn.functional.avg_pool2d(images, 4).flatten(1).bfloat16())
    metric(PREDICTIONS, IMAGES)
    fake, real = (torch.from_numpy(features(images)).bfloat16().double().numpy() for images in (PREDICTIONS, IMAGES))
    assert float(metric.aggregate()) == pytest.approx(frechet_distance(real, fake), rel=1e-9)


RANK_CODE = """
import sys
import numpy as np, torch
import torch.distributed as dist
from medgen.metrics.distribution import FrechetDistanceMetric
rank, rendezvous, features, output = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
fake, real = np.load(features)
own = slice(0, 25) if rank == 0 else slice(25, 40)
metric = FrechetDistanceMetric()
metric(torch.from_numpy(fake[own]), torch.from_numpy(real[own]))
np.save(f"{output}{rank}.npy", float(metric.aggregate()))
dist.destroy_process_group()
"""


@pytest.mark.slow(reason="two processes import MONAI")
def test_processes_of_a_distributed_evaluation_share_their_features(tmp_path):
    fake, real = features(PREDICTIONS), features(IMAGES)
    np.save(tmp_path / "features.npy", np.stack([fake, real]))
    places = [(tmp_path / "rendezvous").as_uri(), str(tmp_path / "features.npy"), str(tmp_path / "rank")]
    ranks = [subprocess.Popen([sys.executable, "-c", RANK_CODE, str(rank), *places]) for rank in range(2)]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    expected = frechet_distance(real, fake)
    for rank in range(2):
        assert float(np.load(tmp_path / f"rank{rank}.npy")) == pytest.approx(expected, rel=1e-9)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match=r"shape \(images, features\), got \(4, 1, 8, 8\) for 4 images"):
        FrechetDistanceMetric(lambda images: images)(PREDICTIONS[:4], IMAGES[:4])
    with pytest.raises(UserError, match="got predictions only"):
        FrechetDistanceMetric(Extractor())(PREDICTIONS)
    with pytest.raises(UserError, match="takes images, got none"):
        FrechetDistanceMetric(Extractor()).aggregate()
    metric = PRDCMetric(Extractor(), nearest_k=5)
    metric(PREDICTIONS[:5], IMAGES[:5])
    with pytest.raises(UserError, match="nearest_k must be at least 1 and less than the 5 images"):
        metric.aggregate()
    broken = FrechetDistanceMetric(Extractor())
    broken(PREDICTIONS[:5], torch.full_like(IMAGES[:5], float("nan")))
    with pytest.raises(UserError, match="NaN or infinity in row 0"):
        broken.aggregate()


def frd_in_an_engine(version, *batches):
    engine = Engine(lambda _, batch: batch)
    FrechetRadiomicDistance(version).attach(engine, "frd")
    return engine.run(batches).metrics["frd"]


def noise(seed, count=13):
    images = torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    return images if seed else images.square()


def test_frd_v0_of_an_evaluation_counts_constant_images_too():
    predictions, images = noise(0), noise(1)
    predictions[4], images[2] = 0.5, 0.25
    extractor = RadiomicsExtractor("frd_v0")
    expected = frd_score(*(extractor.on_images(list(of.numpy())) for of in (images, predictions)), "frd_v0")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = frd_in_an_engine("frd_v0", (predictions[:6], images[:6]), (predictions[6:], images[6:]))

    assert value == pytest.approx(expected, rel=1e-12)


def test_frd_leaves_out_what_has_no_features_on_either_side_and_counts_it_once():
    predictions, images = noise(0), noise(1)
    predictions[4] = predictions[9] = 0.5
    images[2] = 0.25
    kept = [np.delete(images.numpy(), 2, axis=0), np.delete(predictions.numpy(), (4, 9), axis=0)]
    expected = frd_score(*(RadiomicsExtractor("frd_v1").on_images(list(of)) for of in kept), "frd_v1")

    with pytest.warns(UserWarning, match="FRD leaves out 2 of 13 predictions and 1 of 13 images") as warned:
        value = frd_in_an_engine("frd_v1", (predictions[:6], images[:6]), (predictions[6:], images[6:]))

    assert value == pytest.approx(expected, rel=1e-12)
    assert len([one for one in warned if "FRD" in str(one.message)]) == 1


def test_frd_takes_two_images_with_features_on_each_side():
    predictions, images = noise(0, 3), noise(1, 3)
    with pytest.raises(UserError, match=r"at least 2 .* frd_v1 features, got 0 of 3 and 3 of 3"):
        frd_in_an_engine("frd_v1", (torch.zeros(3, 1, 16, 16), images))
    images[1:] = 0.5
    with pytest.raises(UserError, match=r"at least 2 .* frd_v1 features, got 3 of 3 and 1 of 3"):
        frd_in_an_engine("frd_v1", (predictions, images))


def test_frd_refuses_images_of_another_range_and_shape():
    with pytest.raises(UserError, match=r"predictions must lie in 0\.\.1, got -"):
        frd_in_an_engine("frd_v1", (2 * noise(0) - 1, noise(1)))
    with pytest.raises(UserError, match=r"images must be \(B, 1, H, W\) or \(B, 3, H, W\), got \(13, 2, 16, 16\)"):
        frd_in_an_engine("frd_v1", (noise(0), noise(1).repeat(1, 2, 1, 1)))


def test_frd_names_its_versions():
    with pytest.raises(UserError, match="frd_v1"):
        FrechetRadiomicDistance("frd_v2")


# -- protocols --------------------------------------------------------------------------------------------------------


class Received(torch.nn.Module):
    """Keeps what it is given and returns it as a feature map: its mean is the feature."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        assert not self.training
        self.batches.append(x.clone())
        return x


@pytest.fixture
def xrv(monkeypatch):
    """Protocol xrv with another network; its preparation is its own. Keeps the options it was made with."""
    network = Received()
    network.made_with = []

    def make(protocol, *, weights, device):
        network.made_with.append((protocol.name, weights, device))
        return XRVDenseNetFeatures(protocol, network=network)

    monkeypatch.setattr(distribution, "make_extractor", make)
    return network


def black_and_white(colours=1):
    """Images of black to the left and white to the right."""
    images = torch.zeros(4, colours, 48, 64)
    images[..., 32:] = 1
    return images


def assert_is_xrvs(batch):
    assert batch.shape == (4, 1, 224, 224)
    assert batch.dtype == torch.float32
    assert torch.all(batch[..., :90] == -1024)
    assert torch.all(batch[..., -90:] == 1024)


@pytest.mark.parametrize("handler", [FrechetDistance, KernelDistance, PRDC])
@pytest.mark.parametrize("colours", [1, 3])
def test_named_protocol_gives_its_network_its_own_range_size_and_channels(xrv, handler, colours):
    engine = Engine(lambda _, batch: batch)
    options = {"nearest_k": 1} if handler is PRDC else {}
    handler("xrv", **options).attach(engine, "distance")

    engine.run([(black_and_white(colours), black_and_white(colours))])

    assert xrv.made_with == [("xrv", None, "cpu")]
    assert len(xrv.batches) == 2
    for batch in xrv.batches:
        assert_is_xrvs(batch)


def test_named_protocol_in_a_bundles_json(xrv, tmp_path):
    config = {
        "imports": ["$import monai", "$import torch"],
        "device": "$torch.device('cpu')",
        "frechet": {
            "_target_": "medgen.metrics.FrechetDistance",
            "extractor": "xrv",
            "weights": "/weights/xrv.pt",
            "device": "$@device",
            "output_transform": "$monai.handlers.from_engine(['pred', 'image'])",
        },
    }
    (tmp_path / "evaluate.json").write_text(json.dumps(config))
    parser = ConfigParser()
    parser.read_config(tmp_path / "evaluate.json")
    real = black_and_white()
    fake = real * torch.linspace(0.5, 1, 4)[:, None, None, None]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": real, "label": real}],
        network=torch.nn.Identity(),
        inferer=lambda inputs, network: fake,
        key_val_metric={"frechet": parser.get_parsed_content("frechet")},
    )

    evaluator.run()

    assert xrv.made_with == [("xrv", "/weights/xrv.pt", "cpu")]
    assert_is_xrvs(xrv.batches[1])
    as_fed = [(of.mean((1, 2, 3)) * 2048 - 1024)[:, None].double().numpy() for of in (real, fake)]
    assert evaluator.state.metrics["frechet"] == pytest.approx(frechet_distance(*as_fed), rel=1e-5)


def test_module_of_the_callers_own_and_extractors_made_beforehand_are_prepared_for_alike(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef pool():\n    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    by_name = FrechetDistanceMetric("module:own_net:pool")
    protocol = get_protocol("module:own_net:pool", feature_range=(-1, 1))
    beforehand = FrechetDistanceMetric(make_extractor(protocol))
    predictions = PREDICTIONS.clip(0, 1)

    for metric in (by_name, beforehand):
        metric(predictions, IMAGES)

    expected = frechet_distance(features(IMAGES), features(predictions))
    assert float(by_name.aggregate()) == pytest.approx(expected, rel=1e-4)
    assert float(beforehand.aggregate()) == pytest.approx(4 * expected, rel=1e-4)  # of twice the range


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: 2 * x - 1, "predictions must lie in 0..1, got -1 to 1"),
        (lambda x: 255 * x, "predictions must lie in 0..1, got 0 to 255"),
        (lambda x: x / 0, "predictions must lie in 0..1, got NaN or infinity"),
        (lambda x: x[:, :, :, None], r"predictions must be \(B, 1, H, W\)"),
    ],
)
def test_images_that_no_protocol_can_scale_are_refused(xrv, change, said):
    with pytest.raises(UserError, match=said):
        FrechetDistanceMetric("xrv")(change(black_and_white()), black_and_white())
    with pytest.raises(UserError, match=said.replace("predictions", "images")):
        FrechetDistanceMetric("xrv")(black_and_white(), change(black_and_white()))


def test_what_rounding_adds_to_the_range_is_cut_off(xrv):
    FrechetDistanceMetric("xrv")(1.0005 * black_and_white(), black_and_white() - 0.0005)

    assert [float(value) for batch in xrv.batches for value in (batch.min(), batch.max())][:3] == [-1024, 1024, -1024]


@pytest.mark.parametrize(
    ("extractor", "options", "said"),
    [
        ("frd_v1", {}, "got radiomics .*use FrechetRadiomicDistance"),
        (RadiomicsExtractor("frd_v1"), {}, "got radiomics .*use FrechetRadiomicDistance"),
        ("xrv_ldm_source", {}, "treat predictions and images alike, got xrv_ldm_source"),
        (
            XRVDenseNetFeatures(get_protocol("xrv_ldm_source", role="samples"), network=Received()),
            {},
            "treat predictions and images alike, got XRVDenseNetFeatures",
        ),
        ("inception", {}, "protocol must be one of"),
        ("xrv", {"weights": "/absent.pt"}, "protocol xrv needs .*not found at /absent.pt"),
        ("xrv", {"device": "nonsense"}, "device nonsense is not there"),
        (torch.nn.Flatten(), {"weights": "w.pt"}, "weights belongs to an extractor that is named"),
        (None, {"device": "cpu"}, "device belongs to an extractor that is named"),
        (7, {}, "extractor must be .*got a int"),
    ],
)
@pytest.mark.parametrize("handler", [FrechetDistance, KernelDistance, PRDC])
def test_extractors_that_cannot_do_are_refused_before_any_image(handler, extractor, options, said):
    with pytest.raises(UserError, match=said) as caught:
        handler(extractor, **options)
    assert "\n" not in str(caught.value)
