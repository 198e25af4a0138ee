"""Hours and money of the bundles' stages, and how often to save a training: ``python cluster/plan.py cost|preemption``.

``cost`` multiplies the images of each stage in the sources' budgets by the rates of ``rates.json``
(``python cluster/measure.py``). ``preemption`` simulates a training on machines that are lost without notice.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgen.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RATES = Path(__file__).with_name("rates.json")
DATA_SETS = {"ChestX-ray14": ("chestxray14", 112_120), "MIMIC-CXR": ("mimic_cxr", 377_000)}

HOPELESS = 0.99  # share of the time: simulating a training that hardly gets on would take as long

# One row a stage: its name in rates.json, images that it takes of a data set of n images, and why so many.
BUDGETS: tuple[tuple[str, Callable[[int], int], str], ...] = (
    ("preprocessing", lambda n: n, "all"),
    ("cxr_autoencoder_kl.train", lambda n: 75 * n, "75 epochs"),
    ("cxr_latent_diffusion.encode", lambda n: n, "all"),
    ("cxr_latent_diffusion.text", lambda n: 500 * n, "500 epochs"),
    ("cxr_latent_diffusion.train", lambda n: 500 * n, "500 epochs"),
    ("cxr_latent_diffusion.sample", lambda n: 2_300, "1,000 without and 1,300 with a prompt"),
    ("stylegan2_anomaly.train", lambda n: 25_000_000, "25,000 kimg"),
    ("stylegan2_anomaly.project", lambda n: n, "all, 1,000 steps each"),
    ("stylegan2_anomaly.score", lambda n: n, "all"),
    ("stylegan2_anomaly.generate", lambda n: 50_000, "seeds 0–49999"),
    ("cxr_pggan.train", lambda n: 15_000_000, "15,000 kimg, one class"),
    ("cxr_pggan.generate", lambda n: 6_300, "as drawn by the source"),
    ("cxr_inversion_encoder.train_bootstrap", lambda n: 16_000_000, "1 million steps of 16"),
    ("cxr_inversion_encoder.train", lambda n: 15 * n, "15 epochs"),
    ("cxr_inversion_encoder.optimise", lambda n: n, "all, 3,000 steps each"),
    ("lung_segmentation.train", lambda n: 200 * 704, "200 epochs of 704 images: Montgomery, Shenzhen"),
    ("skin_sngan.train", lambda n: 200 * 20_265, "200 epochs of 20,265 images: ISIC 2019"),
    ("augmentation_classifier.train", lambda n: 10_000 * 32, "10,000 steps of 32; the study: 50 times"),
)

# Images of a step that the presets have, whose modules import torch: of the finest level in the progressive GAN.
PRESET_BATCHES = {"stylegan2_anomaly.train": 32, "cxr_pggan.train": 4, "skin_sngan.train": 16}

# Seconds of a step below which an estimate by operations says nothing: launching the kernels and talking to the other
# GPUs are not in it.
SHORT = 0.1

# ---------------------------------------------------------------------------------------------------------------------
# cost


def read_rates(path: Path = RATES) -> dict[str, dict[str, Any]]:
    """The measured rates: stage -> ``cpu`` and, where there was one, ``gpu`` -> row of ``cluster/measure.py``.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected the rates of cluster/measure.py in {path}, got {type(error).__name__}; run: "
            f"python cluster/measure.py all --write {path}"
        ) from error


def gpu_seconds(rates: dict[str, Any], utilisation: float, peak_bfloat16: float, peak_tf32: float) -> tuple[float, str]:
    """Seconds of a GPU for an image.

    Args:
        rates: of a stage.
        utilisation: share of the peak that a GPU is taken to reach, in (0, 1].
        peak_bfloat16: operations a second of the GPU's tensor cores in bfloat16, in 10¹².
        peak_tf32: the same in TF32, in which PyTorch convolves float32.

    Returns:
        The seconds, and ``measured`` or ``estimate``; 0 and ``CPU`` for a stage without a GPU.
    """
    if "gpu" in rates:
        return rates["gpu"]["seconds"], "measured"
    row = rates.get("cpu", {})
    if not row.get("flops"):
        return 0.0, "CPU"
    peak = peak_bfloat16 if row["amp"] else peak_tf32
    return row["flops"] / (utilisation * peak * 1e12), "estimate"


def cost_table(
    rates: dict[str, dict[str, Any]],
    gpus: int = 8,
    cores: int = 16,
    price: float = 2.0,
    core_price: float = 0.04,
    utilisation: float = 0.25,
    peak_bfloat16: float = 312.0,
    peak_tf32: float = 156.0,
) -> list[dict[str, Any]]:
    """Hours and cost of every stage for every data set.

    Args:
        rates: of :func:`read_rates`.
        gpus: that a stage with GPUs runs on, taken to divide its time.
        cores: that a stage without GPUs runs on.
        price: of a GPU for an hour.
        core_price: of a core for an hour, in stages without GPUs.
        utilisation: of :func:`gpu_seconds`, where no GPU was measured.
        peak_bfloat16: likewise; the default is an A100's.
        peak_tf32: likewise.

    Returns:
        Rows with ``data_set, stage, budget, images, core_seconds`` (measured, an image), ``gflops`` (counted, an
        image), ``unit_hours`` (of GPUs or cores), ``hours`` (of wall clock), ``cost`` and ``source``: ``measured``,
        ``estimate`` or ``CPU``.

    Raises:
        UserError: a number outside its range.
    """
    for name, value in {"gpus": gpus, "cores": cores, "peak_bfloat16": peak_bfloat16, "peak_tf32": peak_tf32}.items():
        if value <= 0:
            raise UserError(f"{name} must be positive, got {value}; set --{name}")
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation must be above 0 and at most 1, got {utilisation}; set --utilisation 0.25")
    rows = []
    for data_set, (dataset, count) in DATA_SETS.items():
        for stage, budget, why in BUDGETS:
            name = f"preprocessing.{dataset}" if stage == "preprocessing" else stage
            if name not in rates:
                continue
            images, measured = budget(count), rates[name].get("cpu", {})
            flops = (measured or rates[name].get("gpu", {})).get("flops", 0)
            seconds, source = gpu_seconds(rates[name], utilisation, peak_bfloat16, peak_tf32)
            is_cpu = source == "CPU"
            unit_hours = images * (measured["seconds"] if is_cpu else seconds) / 3600
            rows.append(
                {
                    "data_set": data_set,
                    "stage": name,
                    "budget": why,
                    "images": images,
                    "core_seconds": measured.get("seconds"),
                    "gflops": flops / 1e9,
                    "unit_hours": unit_hours,
                    "hours": unit_hours / (cores if is_cpu else gpus),
                    "cost": unit_hours * (core_price if is_cpu else price),
                    "source": source,
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# preemption


def young_interval(save: float, mean_time: float) -> float:
    """√(2 δ M): work between checkpoints by Young 1974, for checkpoints much shorter than the mean time M.

    Args:
        save: δ, what a checkpoint takes.
        mean_time: M, from one loss to the next, in the same unit as δ.
    """
    return math.sqrt(2 * save * mean_time)


def daly_interval(save: float, mean_time: float) -> float:
    """Daly 2006, equation 37: Young's with the next terms of the series; M where a checkpoint takes 2 M or longer."""
    if save >= 2 * mean_time:
        return mean_time
    root = math.sqrt(save / (2 * mean_time))
    return young_interval(save, mean_time) * (1 + root / 3 + root**2 / 9) - save


def expected_waste(interval: float, save: float, restart: float, mean_time: float) -> float:
    """Share of the time that is not work, for losses that come at a constant rate: Daly 2006, equation 20.

    A loss costs all since the last checkpoint and a restart, which can be lost as well. A piece of work τ with its
    checkpoint then takes M exp(R / M) (exp((τ + δ) / M) - 1) on average.

    Args:
        interval: τ, work between checkpoints.
        save: δ, what a checkpoint takes.
        restart: R, from the loss to the first step, in so far as GPUs are held and paid.
        mean_time: M, from one loss to the next.
    """
    exponent = (restart + interval + save) / mean_time
    if exponent > 700:  # beyond a float: no work is ever done
        return 1.0
    spent = mean_time * math.exp(restart / mean_time) * math.expm1((interval + save) / mean_time)
    return 1 - interval / spent


def simulate_waste(
    intervals: Sequence[float],
    save: float,
    restart: float,
    mean_time: float,
    pieces: int = 200,
    trials: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the time that is not work, by playing trainings through from loss to loss.

    All intervals meet the same losses, so that their differences are less noisy than their values.

    Args:
        intervals: work between checkpoints, τ.
        save: of :func:`expected_waste`.
        restart: likewise.
        mean_time: likewise.
        pieces: length of the training, in the longest interval.
        trials: trainings.
        seed: of the losses.

    Returns:
        (n,) mean share, and (n,) its standard error.

    Raises:
        UserError: a number outside its range, or losses so frequent that all but a hundredth of the time is wasted.
    """
    for name, value in {"interval": min(intervals), "save": save, "mean_time": mean_time}.items():
        if not value > 0:
            raise UserError(f"{name} must be positive, got {value}; give seconds")
    if restart < 0:
        raise UserError(f"restart must be 0 or more, got {restart}; give seconds")
    if max(expected_waste(interval, save, restart, mean_time) for interval in intervals) > HOPELESS:
        raise UserError(
            f"expected a training that gets on, got a loss every {mean_time:.0f} s, a restart of {restart:.0f} s and a "
            f"checkpoint of {save:.3g} s, which waste over {HOPELESS:.0%}; take fewer GPUs or machines that last longer"
        )
    work = pieces * max(intervals)
    means, errors = [], []
    for interval in intervals:
        # whole pieces: all intervals finish about the same work, each with a checkpoint at its end
        total = np.full(trials, math.ceil(work / interval))
        length = interval + save
        rng = np.random.default_rng(seed)
        elapsed, done = np.zeros(trials), np.zeros(trials, dtype=np.int64)
        overhead = np.zeros(trials)  # of the restart that this stretch begins with
        active = np.ones(trials, dtype=bool)
        while active.any():
            until_loss = rng.exponential(mean_time, trials)
            fits = np.floor(np.maximum(until_loss - overhead, 0) / length).astype(np.int64)
            ends = active & (done + fits >= total)
            elapsed[ends] += overhead[ends] + (total - done)[ends] * length
            lost = active & ~ends
            elapsed[lost] += until_loss[lost]
            done[lost] += fits[lost]
            overhead[lost] = restart
            active = lost
        waste = 1 - total * interval / elapsed
        # the ratio of means, as in the closed form; its error by that of the time spent
        means.append(1 - total[0] * interval / elapsed.mean())
        errors.append(waste.std(ddof=1) / math.sqrt(trials))
    return np.array(means), np.array(errors)


def best_interval(
    save: float, restart: float, mean_time: float, trials: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The interval that wastes least in simulation, of 33 around Young's, and its waste.

    Raises:
        UserError: losses are so frequent that hardly any work is done, with any of them.
    """
    intervals = young_interval(save, mean_time) * np.geomspace(1 / 4, 4, 33)
    expected = np.array([expected_waste(interval, save, restart, mean_time) for interval in intervals])
    if expected.min() <= HOPELESS:  # else all are simulated, which is refused
        intervals = intervals[expected <= HOPELESS]
    wastes, _ = simulate_waste(intervals, save, restart, mean_time, pieces=20, trials=trials, seed=seed)
    place = int(wastes.argmin())
    return float(intervals[place]), float(wastes[place])


def read_setting(stage: str, name: str) -> Any:
    """A setting of a training as ``cluster/args`` has it, else its config; None where neither does."""
    bundle, config = stage.split(".")
    for path in (ROOT / "cluster/args" / f"{stage}.json", ROOT / "bundles" / bundle / "configs" / f"{config}.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if name in settings:
            return settings[name]
    return None


def total_batch(stage: str) -> int:
    """Images of a step on all GPUs."""
    if stage in PRESET_BATCHES:
        return PRESET_BATCHES[stage]
    found = re.search(r"batch_per_process\((\d+)\)", str(read_setting(stage, "batch_size")))
    return int(found[1]) if found else int(read_setting(stage, "batch_size"))


def default_interval(stage: str) -> int:
    """Steps from one checkpoint to the next: ``checkpoint_interval``, or fewer where validations come sooner.

    A validation has a save before and after it, counted as one here. An epoch is of the smaller data set.
    """
    if read_setting(stage, "max_steps"):  # there, val_interval is in steps
        return min(read_setting(stage, "checkpoint_interval"), read_setting(stage, "val_interval"))
    images = read_setting(stage, "tick_images")
    if not isinstance(images, int):
        budget = next(budget for name, budget, _ in BUDGETS if name == stage)
        epochs = read_setting(stage, "max_epochs") or read_setting(stage, "epochs")
        images = budget(min(count for _, count in DATA_SETS.values())) // epochs
    epoch = max(1, images // total_batch(stage))
    # interval 0: at each epoch's end
    return min(read_setting(stage, "checkpoint_interval") or epoch, epoch * read_setting(stage, "val_interval"))


def overlay_gpus(stage: str) -> int:
    """GPUs that the Kubernetes overlay of a training asks for."""
    path = ROOT / "cluster/kubernetes/overlays" / stage / "kustomization.yaml"
    return int(re.search(r'nvidia\.com/gpu: "(\d+)"', path.read_text(encoding="utf-8"))[1])


def preemption_table(
    rates: dict[str, dict[str, Any]],
    losses: float = 0.01,
    gpus: int = 0,
    restart: float = 180.0,
    disk: float = 0.5,
    utilisation: float = 0.25,
    peak_bfloat16: float = 312.0,
    peak_tf32: float = 156.0,
) -> list[dict[str, Any]]:
    """How often each training should be saved.

    Args:
        rates: of :func:`read_rates`.
        losses: λ, of a GPU in an hour, without notice: after a SIGTERM a training saves itself, whatever the interval.
        gpus: of each training, which the loss of any of them stops; 0: as many as its Kubernetes overlay asks for.
        restart: R in seconds: of a pod until the first step.
        disk: what a checkpoint is written at, in GB/s.
        utilisation: of :func:`gpu_seconds`.
        peak_bfloat16: likewise.
        peak_tf32: likewise.

    Returns:
        Rows with ``stage, gpus, gigabytes, save`` (δ, s), ``young``, ``daly``, ``best`` (τ, s; ``best`` is the
        simulation's), ``waste`` (of the best, simulated), ``step`` (s, of all GPUs), ``source`` (of the step),
        ``iterations`` (of the best), ``default`` (of :func:`default_interval`) and ``default_waste`` (closed form).
        ``step`` and what follows from it are None where the step is an estimate below :data:`SHORT`.

    Raises:
        UserError: a number outside its range, or losses so frequent that hardly any work is done.
    """
    for name, value in {"losses": losses, "disk": disk}.items():
        if value <= 0:
            raise UserError(f"{name} must be positive, got {value}; set --{name}")
    if gpus < 0:
        raise UserError(f"gpus must be 0 or more, got {gpus}; set --gpus")
    rows = []
    for stage, row in rates.items():
        sizes = (row.get(side, {}).get("checkpoint_bytes") for side in ("gpu", "cpu"))
        size = next((size for size in sizes if size), None)
        if not size:
            continue
        used = gpus or overlay_gpus(stage)
        mean_time = 3600 / (losses * used)
        save = size / (disk * 1e9)
        best, waste = best_interval(save, restart, mean_time)
        seconds, source = gpu_seconds(row, utilisation, peak_bfloat16, peak_tf32)
        step = total_batch(stage) / used * seconds
        known = step > 0 if source == "measured" else step >= SHORT
        default = default_interval(stage)
        rows.append(
            {
                "stage": stage,
                "gpus": used,
                "gigabytes": size / 1e9,
                "save": save,
                "young": young_interval(save, mean_time),
                "daly": daly_interval(save, mean_time),
                "best": best,
                "waste": waste,
                "step": step if known else None,
                "source": source if known else "unknown",
                "iterations": max(1, round(best / step)) if known else None,
                "default": default,
                "default_waste": expected_waste(default * step, save, restart, mean_time) if known else None,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with the keys as its head; numbers with three digits.

    Raises:
        UserError: no rows.
    """
    if not rows:
        raise UserError(
            "expected rates of stages that the table has, got none; run: python cluster/measure.py all --write"
        )

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)

    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([text(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, does in (("cost", cost_table), ("preemption", preemption_table)):
        kind = kinds.add_parser(name, help=does.__doc__.splitlines()[0])
        kind.add_argument("--rates", type=Path, default=RATES)
        settings = list(zip(list(does.__annotations__)[1:-1], does.__defaults__, strict=True))
        for setting, default in settings:
            kind.add_argument(f"--{setting}", type=type(default), default=default, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    does = {"cost": cost_table, "preemption": preemption_table}[options.pop("kind")]
    print(as_markdown(does(read_rates(options.pop("rates")), **options)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
