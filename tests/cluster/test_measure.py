"""Rates that the plan multiplies: operations counted by hand, and rows that the plan can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster import measure, plan
from medgen.engines import dcgan_setting, pggan_setting, stylegan2_setting
from medgen.errors import UserError


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_operations_of_a_convolution_and_both_its_gradients(layer, groups):
    convolution = layer(8, 16, 3, groups=groups, stride=2)
    x = torch.randn(2, 8, 17, 17, requires_grad=True)
    with measure.OperationCounter() as counter:
        y = convolution(x)
        y.sum().backward()
    # each weight meets each position of the side that it is slid over: of the output, transposed of the input
    positions = (y if layer is nn.Conv2d else x)[0, 0].numel()
    assert counter.count == 3 * 2 * len(x) * positions * convolution.weight.numel()


def test_operations_of_a_gradient_that_nobody_wants_are_not_counted():
    convolution = nn.Conv2d(8, 16, 3)
    with measure.OperationCounter() as counter:
        y = convolution(torch.randn(1, 8, 9, 9))
        y.sum().backward()
    assert counter.count == 2 * 2 * y[0, 0].numel() * convolution.weight.numel()


def test_second_derivatives_are_counted():
    network = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 1, bias=False))
    x = torch.randn(4, 64, requires_grad=True)
    with measure.OperationCounter() as once:
        (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    with measure.OperationCounter() as twice:
        gradient.square().sum().backward()
    assert twice.count > once.count > 2 * 4 * 64 * 32


def test_a_measured_stage_is_a_row_that_the_plan_reads(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"preprocessing.mimic_cxr": {"cpu": {"seconds": 0.1}}}))
    measure.main(["stylegan2_anomaly.score", "cxr_pggan.generate", "--rounds", "0", "--write", str(path)])
    rates = plan.read_rates(path)
    assert set(rates) == {"preprocessing.mimic_cxr", "stylegan2_anomaly.score", "cxr_pggan.generate"}
    row = rates["cxr_pggan.generate"]["cpu" if not torch.cuda.is_available() else "gpu"]
    # of the 512×512 network at least its widest convolutions, 512 channels at 32×32, two of them
    assert row["flops"] > 2 * 2 * 9 * 512**2 * 32**2
    assert row["seconds"] > 0
    assert row["command"].startswith("python cluster/measure.py cxr_pggan.generate ")
    (table,) = {line["source"] for line in plan.cost_table(rates) if line["stage"] == "stylegan2_anomaly.score"}
    assert table == "CPU"


def test_the_plan_has_a_budget_for_each_stage_that_is_measured():
    assert set(measure.STAGES) == {stage for stage, *_ in plan.BUDGETS} - {"preprocessing"}


def test_the_plan_has_the_batches_of_the_presets():
    batches = {
        "stylegan2_anomaly.train": stylegan2_setting("anomaly_source", "total_batch_size"),
        "cxr_pggan.train": pggan_setting("rsna_512", "batch_sizes")[-1],
        "skin_sngan.train": dcgan_setting("sngan", "total_batch_size"),
    }
    assert batches == plan.PRESET_BATCHES
    for stage in batches:  # no args file says otherwise
        text = (plan.ROOT / "cluster" / "args" / f"{stage}.json").read_text(encoding="utf-8")
        assert not {"batch_size", "preset"} & set(json.loads(text))


def test_an_unknown_stage_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match=r"stages of .*, got cxr_pggan\.trian"):
        measure.main(["stylegan2_anomaly.score", "cxr_pggan.trian", "--write", str(tmp_path / "rates.json")])
    assert not Path(tmp_path / "rates.json").exists()
