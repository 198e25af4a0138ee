"""Costs, and intervals between checkpoints: simulation against closed forms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster import plan
from medgen.errors import UserError

HOUR = 3600.0


class TestExpectedWaste:
    def test_without_losses_only_the_checkpoints_are_wasted(self):
        assert plan.expected_waste(90, 10, 60, mean_time=1e12) == pytest.approx(0.1, abs=1e-9)

    def test_agrees_with_the_sum_over_numbers_of_losses(self):
        # an oracle without the closed form: a loss costs its own time, the k-th attempt begins with a restart
        interval, save, restart, mean = 600.0, 30.0, 120.0, 2000.0

        def until_loss(length: float) -> float:  # of those within it
            return mean - length / math.expm1(length / mean)

        first, later = interval + save, restart + interval + save
        fails, fails_again = (-math.expm1(-length / mean) for length in (first, later))
        spent = (1 - fails) * first
        for losses in range(1, 200):
            chance = fails * fails_again ** (losses - 1) * (1 - fails_again)
            spent += chance * (until_loss(first) + (losses - 1) * until_loss(later) + later)
        assert plan.expected_waste(interval, save, restart, mean) == pytest.approx(1 - interval / spent, rel=1e-12)

    def test_hopeless_intervals_waste_everything(self):
        assert plan.expected_waste(1e9, 10, 60, 1000) == 1.0


class TestIntervals:
    def test_young_by_hand(self):
        assert plan.young_interval(8, 100) == 40

    def test_daly_is_near_the_optimum_where_young_is_far(self):
        # the optimum of the closed form solves τ = M (1 - exp(-(τ + δ) / M)), whatever the restart
        save, mean = 1800.0, 3600.0
        best = mean
        for _ in range(1000):
            best = -mean * math.expm1(-(best + save) / mean)
        assert plan.daly_interval(save, mean) == pytest.approx(best, rel=0.01)
        assert plan.young_interval(save, mean) > 1.3 * best

    def test_daly_saves_once_in_a_mean_time_where_saving_takes_two(self):
        assert plan.daly_interval(200, 100) == 100


@pytest.mark.parametrize(
    ("save", "restart", "mean"), [(10, 60, 10 * HOUR), (30, 600, HOUR), (300, 0, HOUR), (5, 180, 45 * HOUR)]
)
class TestSimulation:
    def test_agrees_with_the_closed_form(self, save, restart, mean):
        intervals = plan.young_interval(save, mean) * np.array([0.3, 1.0, 3.0])
        wastes, errors = plan.simulate_waste(intervals, save, restart, mean, pieces=50, trials=4000)
        expected = [plan.expected_waste(interval, save, restart, mean) for interval in intervals]
        assert np.all(np.abs(wastes - expected) < 4 * errors + 1e-4)
        assert np.all(errors < 0.02 * np.array(expected) + 1e-3)

    def test_the_chosen_interval_is_the_best(self, save, restart, mean):
        best, waste = plan.best_interval(save, restart, mean)
        # on losses that the choice has not seen; at the bottom the curve is flat
        others = best * np.array([1.0, 1 / 3, 1 / 2, 2.0, 3.0])
        wastes, errors = plan.simulate_waste(others, save, restart, mean, pieces=60, trials=4000, seed=1)
        assert wastes[0] < wastes[1:].min()
        assert waste == pytest.approx(wastes[0], abs=4 * errors[0] + 0.02 * waste)


def test_simulation_finds_youngs_interval_where_checkpoints_are_short():
    save, mean = 5.0, 50 * HOUR  # √(δ / 2M) = 0.004
    young = plan.young_interval(save, mean)
    best, waste = plan.best_interval(save, 180, mean)
    assert 0.6 < best / young < 1.6
    assert waste == pytest.approx(plan.expected_waste(young, save, 180, mean), rel=0.05)


def test_restarts_shift_the_waste_but_not_the_interval():
    saved = [plan.best_interval(20, restart, 2 * HOUR) for restart in (0, 900)]
    assert 0.6 < saved[0][0] / saved[1][0] < 1.7
    assert saved[1][1] > saved[0][1] + 0.05


def test_simulation_repeats_itself():
    assert plan.best_interval(10, 60, HOUR, seed=3) == plan.best_interval(10, 60, HOUR, seed=3)


@pytest.mark.parametrize("wrong", [{"save": 0}, {"mean_time": -1}, {"restart": -1}, {"intervals": [0.0]}])
def test_simulation_refuses_impossible_numbers(wrong):
    settings = {"intervals": [60.0], "save": 1, "restart": 1, "mean_time": 100, **wrong}
    with pytest.raises(UserError, match="must be"):
        plan.simulate_waste(**settings)


@pytest.mark.parametrize("mean", [7.03, 0.2])  # 256 GPUs with two losses an hour each; below a float's range
def test_a_training_that_never_gets_on_is_refused_and_not_simulated(mean):
    with pytest.raises(UserError, match="expected a training that gets on, got a loss every"):
        plan.best_interval(8.4, 180, mean)


def test_intervals_without_hope_are_left_out_where_others_have_some():
    # √(2 δ M) = 45 s, four times which hardly ever pass without a loss
    assert plan.expected_waste(4 * plan.young_interval(50, 20), 50, 20, 20) > plan.HOPELESS
    best, waste = plan.best_interval(50, 20, 20, trials=200)
    assert best < plan.young_interval(50, 20)
    assert 0.5 < waste < plan.HOPELESS


CPU = {"seconds": 2.0, "flops": 312e9, "amp": True}


class TestCosts:
    def test_by_hand(self):
        rates = {"cxr_autoencoder_kl.train": {"cpu": CPU}}
        row, other = plan.cost_table(rates, gpus=4, price=3.0, utilisation=0.5, peak_bfloat16=312)
        assert (row["data_set"], row["images"]) == ("ChestX-ray14", 75 * 112_120)
        # an image takes 312 Gflop / (0.5 × 312 Tflop/s) = 2 ms
        assert row["unit_hours"] == pytest.approx(75 * 112_120 * 0.002 / 3600)
        assert row["hours"] == pytest.approx(row["unit_hours"] / 4)
        assert row["cost"] == pytest.approx(3 * row["unit_hours"])
        assert row["source"] == "estimate"
        assert other["unit_hours"] / row["unit_hours"] == pytest.approx(377_000 / 112_120)

    def test_float32_is_estimated_by_its_own_peak(self):
        rates = {"stylegan2_anomaly.train": {"cpu": {**CPU, "amp": False}}}
        slow, fast = (plan.cost_table(rates, peak_tf32=peak)[0]["unit_hours"] for peak in (78, 156))
        assert slow == pytest.approx(2 * fast)

    def test_a_measured_gpu_replaces_the_estimate(self):
        rates = {"cxr_pggan.train": {"cpu": CPU, "gpu": {"seconds": 0.01}}}
        row = plan.cost_table(rates)[0]
        assert (row["source"], row["unit_hours"]) == ("measured", pytest.approx(15e6 * 0.01 / 3600))

    def test_stages_without_gpu_take_cores(self):
        rates = {"preprocessing.mimic_cxr": {"cpu": {"seconds": 0.036}}}
        (row,) = plan.cost_table(rates, cores=10, core_price=0.5)
        assert row["source"] == "CPU"
        assert row["unit_hours"] == pytest.approx(3.77)
        assert (row["hours"], row["cost"]) == (pytest.approx(0.377), pytest.approx(1.885))

    @pytest.mark.parametrize("wrong", [{"gpus": 0}, {"utilisation": 1.5}, {"peak_tf32": -1}])
    def test_refuses_impossible_numbers(self, wrong):
        with pytest.raises(UserError, match="must be"):
            plan.cost_table({}, **wrong)


SAVED = {"cxr_autoencoder_kl.train": {"cpu": {**CPU, "checkpoint_bytes": 2e9}}}


class TestCheckpointTable:
    def test_iterations_are_the_interval_in_steps_of_the_whole_batch(self):
        (row,) = plan.preemption_table(SAVED, losses=0.01, gpus=4, disk=0.5, utilisation=0.05)
        assert row["save"] == 4
        assert row["step"] == pytest.approx(96 / 4 * 0.02)
        assert (row["gpus"], row["source"]) == (4, "estimate")
        assert row["iterations"] == round(row["best"] / row["step"])
        assert row["young"] == pytest.approx(math.sqrt(2 * 4 * 3600 / 0.04))

    def test_the_best_wastes_no_more_than_the_default_of_the_config(self):
        (row,) = plan.preemption_table(SAVED, losses=0.05, utilisation=0.05)
        assert row["default"] == 500
        assert row["waste"] <= row["default_waste"] * 1.02

    def test_gpus_are_those_of_the_overlay(self):
        rates = dict.fromkeys(("cxr_autoencoder_kl.train", "cxr_pggan.train"), SAVED["cxr_autoencoder_kl.train"])
        eight, one = plan.preemption_table(rates)
        assert (eight["gpus"], one["gpus"]) == (8, 1)
        assert one["young"] == pytest.approx(math.sqrt(8) * eight["young"])

    def test_a_short_step_is_told_only_where_it_was_measured(self):
        short = {"lung_segmentation.train": SAVED["cxr_autoencoder_kl.train"]}
        (row,) = plan.preemption_table(short)  # 16 images of 4 ms
        assert row["source"] == "unknown"
        assert {row[name] for name in ("step", "iterations", "default_waste")} == {None}
        measured = {"lung_segmentation.train": {**short["lung_segmentation.train"], "gpu": {"seconds": 0.004}}}
        (row,) = plan.preemption_table(measured)
        assert (row["source"], row["step"]) == ("measured", pytest.approx(0.064))
        assert row["iterations"] == round(row["best"] / row["step"])

    def test_rates_of_a_gpu_alone_suffice(self):
        rates = {"cxr_autoencoder_kl.train": {"gpu": {**CPU, "seconds": 0.01, "checkpoint_bytes": 2e9}}}
        (row,) = plan.preemption_table(rates)
        assert (row["save"], row["step"]) == (4, pytest.approx(96 / 8 * 0.01))
        assert plan.cost_table(rates)[0]["gflops"] == pytest.approx(312)

    def test_a_table_without_rows_is_told_in_one_line(self):
        with pytest.raises(UserError, match=r"got none; run: python cluster/measure\.py all"):
            plan.as_markdown(plan.preemption_table({"preprocessing.mimic_cxr": {"cpu": {"seconds": 0.1}}}))

    @pytest.mark.parametrize("wrong", [{"losses": 0}, {"disk": -1.0}, {"gpus": -1}])
    def test_refuses_impossible_numbers(self, wrong):
        with pytest.raises(UserError, match="must be"):
            plan.preemption_table({}, **wrong)


class TestTrainings:
    def test_saves_are_as_far_apart_as_the_interval_or_the_validations(self):
        assert plan.default_interval("cxr_autoencoder_kl.train") == 500  # of the config
        assert plan.default_interval("stylegan2_anomaly.train") == 2000  # of the args file; a tick is 125 steps
        assert plan.default_interval("lung_segmentation.train") == 2 * 704 // 16  # validated each second epoch
        assert plan.default_interval("skin_sngan.train") == 500  # an epoch, which its config computes, has 1,266 steps
        assert plan.default_interval("augmentation_classifier.train") == 500  # counted in steps, as are its validations

    def test_steps_have_the_images_of_the_args_files(self):
        assert plan.total_batch("cxr_latent_diffusion.train") == 256
        assert plan.total_batch("lung_segmentation.train") == 16


class TestRates:
    def test_hold_what_the_tables_need(self):
        rates = plan.read_rates()
        for stage, rows in rates.items():
            for row in rows.values():
                assert row["seconds"] is None or row["seconds"] > 0, stage
                assert row["seconds"] or row["flops"], stage
                assert {"command", "hardware", "date"} <= set(row), stage
        budgeted = {stage for stage, *_ in plan.BUDGETS} - {"preprocessing"}
        assert budgeted <= set(rates)
        trainings = {stage for stage in budgeted if ".train" in stage}
        assert trainings == {stage for stage, rows in rates.items() if "checkpoint_bytes" in rows["cpu"]}

    def test_name_configs_that_exist(self):
        for stage in (stage for stage, *_ in plan.BUDGETS if ".train" in stage):
            assert plan.default_interval(stage) > 0

    def test_a_missing_file_is_told_in_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"measure\.py"):
            plan.read_rates(tmp_path / "rates.json")


def test_tables_are_printed_without_torch(tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"cxr_pggan.train": {"cpu": {**CPU, "checkpoint_bytes": 1e9}}}))
    program = "import runpy, sys; sys.argv = ['plan.py', *sys.argv[1:]]; sys.modules['torch'] = None; "
    program += f"runpy.run_path({str(Path(plan.__file__))!r}, run_name='__main__')"
    for kind, expected in (("cost", "15,000,000"), ("preemption", "cxr_pggan.train")):
        command = [sys.executable, "-c", program, kind, "--rates", str(rates), "--gpus", "2"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert expected in done.stdout
        assert done.stdout.startswith("| ")
