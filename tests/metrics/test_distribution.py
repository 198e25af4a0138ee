"""Distances between sets inside an evaluation: handlers in ignite and MONAI engines, gathering, refusals."""

from __future__ import annotations

import subprocess
import sys

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
from medgen.metrics.distribution import (
    PRDC,
    FrechetDistance,
    FrechetDistanceMetric,
    FrechetRadiomicDistance,
    KernelDistance,
    PRDCMetric,
)
from medgen.metrics.frd import frd_score
from medgen.metrics.frechet import frechet_distance
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.prdc import precision_recall_density_coverage
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
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
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


def test_frd_in_an_evaluation_is_that_of_the_features_and_leaves_constant_predictions_out():
    images, predictions = torch.rand(13, 1, 16, 16), torch.rand(13, 1, 16, 16).square()
    predictions[4] = 0.5
    extractor = RadiomicsExtractor("frd_v0")
    kept = torch.cat([predictions[:4], predictions[5:]])
    expected = frd_score(*(extractor.on_images(list(of.numpy())) for of in (images, kept)), "frd_v0")
    engine = Engine(lambda _, batch: batch)
    FrechetRadiomicDistance("frd_v0").attach(engine, "frd")

    with pytest.warns(UserWarning, match="leaves out 1 constant predictions of 13"):
        engine.run([(predictions[:6], images[:6]), (predictions[6:], images[6:])])

    assert engine.state.metrics["frd"] == pytest.approx(expected, rel=1e-12)


def test_frd_of_constant_predictions_alone_is_refused():
    engine = Engine(lambda _, batch: batch)
    FrechetRadiomicDistance().attach(engine, "frd")

    with pytest.raises(UserError, match="not constant, got 3"):
        engine.run([(torch.zeros(3, 1, 16, 16), torch.rand(3, 1, 16, 16))])


def test_frd_names_its_versions():
    with pytest.raises(UserError, match="frd_v1"):
        FrechetRadiomicDistance("frd_v2")
