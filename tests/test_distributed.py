"""Joining a process group."""

from __future__ import annotations

from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from medgen import distributed
from medgen.errors import UserError, find_user_error

BUNDLES = Path(__file__).parents[1] / "bundles"
MULTI_GPU = sorted(path.parents[1] for path in BUNDLES.glob("*/configs/multi_gpu_train.json"))


def test_overlay_without_torchrun_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"torchrun --nproc_per_node=N -m monai\.bundle run"):
        distributed.start()


def test_training_that_joins_no_group_is_refused_beside_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"torchrun started 4 processes, .*; add configs/multi_gpu_train\.json"):
        distributed.check_alone(False)
    distributed.check_alone(True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.check_alone(False)
    monkeypatch.delenv("WORLD_SIZE")
    distributed.check_alone(False)


@pytest.mark.parametrize("bundle", MULTI_GPU, ids=lambda bundle: bundle.name)
def test_every_bundle_looks_before_it_writes_and_its_overlay_lets_it_pass(bundle, monkeypatch):
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / "train.json")])
    lines = parser["initialize"]
    check = lines.index("$medgen.distributed.check_alone(@multi_gpu)")
    assert check < next(number for number, line in enumerate(lines) if "prepare_output_dir" in line)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        parser.get_parsed_content(f"initialize::{check}")
    assert "torchrun started 2 processes" in str(find_user_error(caught.value))

    parser.read_config([str(bundle / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")])
    parser.get_parsed_content(f"initialize::{check}")
