"""SIGTERM to a training that has not begun: it ends at once, with nothing to save."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import command, start

from medgen.data import write_datalist
from medgen.preemption import AGAIN

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_autoencoder_kl"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize("launcher", [(), TWO], ids=["alone", "two"])
def test_training_that_is_told_to_end_before_it_begins_does_so_without_a_traceback(launcher, tmp_path):
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    items = [{"image": f"{number}.png", "patient": str(number)} for number in range(8)]
    write_datalist(tmp_path / "datalist.json", "noise", "X-ray", {"training": items[:4], "validation": items[4:]})
    files = ["configs/train.json", "configs/demo.json"] + ["configs/multi_gpu_train.json"] * bool(launcher)
    output = tmp_path / "out"
    settings = {"datalist": tmp_path / "datalist.json", "batch_size": 2, "max_epochs": 10**6}
    process = start(BUNDLE, command(files, output, **settings), *launcher)

    while not output.exists() and process.poll() is None:  # a step of `initialize`
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)

    assert not (output / "checkpoints").exists(), said
    if launcher:  # torchrun has a traceback of its own, and one code for all
        assert process.returncode == 1, said
        assert said.count("Traceback") == said.count("SignalException: ") == 1, said
    else:
        assert process.returncode == AGAIN, said
        assert said.endswith("ended by SIGTERM; the same command does what is left\n")
        assert "Traceback" not in said
