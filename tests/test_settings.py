"""Settings that cannot be meant are refused before any data is read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from medgen.errors import UserError
from medgen.settings import (
    check_between,
    check_choice,
    check_device,
    check_enough,
    check_labelled,
    check_multiple,
    check_names,
    check_positive,
    check_whole,
    environment,
    flag,
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"batch_size": 2, "network_def": {"channels": [1]}}))
    return str(path)


def test_known_settings_nested_ids_and_arguments_of_run_pass(config):
    check_names(["run", "--config_file", config, "--batch_size=4", "--network_def#channels", "[8]", "--run_id", "run"])


@pytest.mark.parametrize("word", [["--bach_size", "2"], ["--bach_size=2"]])
def test_misspelt_setting_is_refused_with_the_closest_name(config, word):
    with pytest.raises(UserError, match=r"no setting bach_size in .*train\.json; did you mean --batch_size\?"):
        check_names(["run", "--config_file", config, *word])


def test_settings_of_overlays_tracking_files_and_args_files_are_known_or_refused_as_well(config, tmp_path):
    (tmp_path / "overlay.json").write_text('{"extra": 1}')
    (tmp_path / "tracking.json").write_text('{"handlers_id": {}, "configs": {"tracking_uri": ""}}')
    files = f"['{config}','{tmp_path / 'overlay.json'}']"
    tracking = ["--tracking", str(tmp_path / "tracking.json")]
    check_names(["run", "--config_file", files, *tracking, "--extra", "2", "--tracking_uri", "sqlite:///x.db"])
    (tmp_path / "args.json").write_text(json.dumps({"config_file": config, "epochs": 3}))
    with pytest.raises(UserError, match="no setting epochs"):
        check_names(["run", "--args_file", str(tmp_path / "args.json")])


def test_a_process_that_is_not_monais_command_is_left_alone():
    check_names()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_absent_device_is_refused(device):
    with pytest.raises(UserError, match=rf"device must be one of cpu.*, got {device} .*--device"):
        check_device(device)
    check_device("cpu")


@pytest.mark.parametrize("value", [0, -1, "8", True, float("nan")])
def test_number_that_is_not_above_zero_is_refused(value):
    with pytest.raises(UserError, match="batch_size must be a number above 0"):
        check_positive(batch_size=value)
    check_positive(batch_size=1, lr=1e-9)


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_number_that_is_not_whole_or_too_small_is_refused(value):
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1"):
        check_whole(batch_size=value)
    check_whole(0, seed=0)


def test_switches_of_the_command_line_mean_what_they_say():
    assert [flag(value) for value in (True, False, "true", "False")] == [True, False, True, False]
    with pytest.raises(UserError, match="a switch must be true or false, got 'yes'"):
        flag("yes")


def test_bare_flag_does_not_swallow_the_next_setting(config):
    with pytest.raises(UserError, match="no setting bach_size"):
        check_names(["run", "--config_file", config, "--batch_size", "--bach_size", "4"])


def test_args_file_may_be_yaml(config, tmp_path):
    (tmp_path / "args.yaml").write_text(f"config_file: {config}\nepochs: 3\n")
    with pytest.raises(UserError, match="no setting epochs"):
        check_names(["run", "--args_file", str(tmp_path / "args.yaml")])


def test_list_of_channels_must_be_multiples_of_the_groups():
    with pytest.raises(UserError, match="channels must be a multiple of 32, got 48; set --channels to 32 or 64"):
        check_multiple(32, channels=[64, 48])


def test_side_that_the_network_cannot_halve_is_refused_with_the_next_ones():
    with pytest.raises(UserError, match="image_size must be a multiple of 8, got 60; set --image_size to 56 or 64"):
        check_multiple(8, image_size=60)
    check_multiple(8, image_size=64)


def test_folder_for_a_network_with_classes_is_refused():
    check_labelled(None, 3)
    check_labelled("folder", 0)
    with pytest.raises(UserError, match=r"network with 3 classes needs a label .* the folder scans does not hold"):
        check_labelled("scans", 3)


@pytest.mark.parametrize("value", [-0.1, 1.1, "x", True, float("nan")])
def test_number_out_of_range_is_refused(value):
    check_between(0, 1, a=0, b=0.5, c=1)
    with pytest.raises(UserError, match=r"^beta0 must be a number from 0 to 1, got .*; set --beta0$"):
        check_between(0, 1, beta0=value)


def test_setting_that_is_no_choice_is_refused_with_the_choices():
    check_choice(["a", "b"], kind="a")
    with pytest.raises(UserError, match="kind must be one of a, b, got 'c'; set --kind"):
        check_choice(["a", "b"], kind="c")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_stays_with_a_process_that_computes_on_the_cpu():
    # in a process of its own: the allocator cannot be asked, and must not stay so for other tests
    program = """
import ctypes, re, sys
from medgen.settings import keep_freed_memory
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if not hasattr(libc, "mallopt"):
    sys.exit("no mallopt")
def left_after_freeing():
    size = 200_000_000
    before = resident()
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resident() - before
assert not keep_freed_memory("cuda")
gone = left_after_freeing()
assert keep_freed_memory("cpu")
kept = left_after_freeing()
print(gone, kept)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "no mallopt" in done.stderr:
        pytest.skip("another C library than glibc")
    gone, kept = map(int, done.stdout.split())  # kilobytes
    assert gone < 20_000
    assert kept > 150_000


def test_splits_that_are_too_small_for_what_is_measured_on_them_are_refused():
    check_enough(2, training=[1, 2], validation=[1, 2, 3])
    with pytest.raises(UserError, match=r"the validation split must hold at least 2 images, got 1; make the splits"):
        check_enough(2, training=[1, 2], validation=[1])
    with pytest.raises(UserError, match=r"the test split must hold at least 3 images of label 1, got 0"):
        check_enough(3, 1, test=[])


def test_folder_of_the_environment_or_one_line_that_says_how_to_set_it(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "/data")
    assert environment("DATA_DIR") == "/data"
    monkeypatch.setenv("DATA_DIR", "")
    with pytest.raises(UserError, match="environment variable DATA_DIR must name a folder, it is not set; export DATA"):
        environment("DATA_DIR")
