"""``medgen check``: what it finds before torchrun does, and what it leaves as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medgen import check, cli
from medgen.data import write_datalist
from medgen.errors import UserError, find_user_error

REPOSITORY = Path(__file__).parents[1]
BUNDLES = REPOSITORY / "bundles"
ARGS = REPOSITORY / "cluster" / "args"
TRAIN = {
    "config_file": ["configs/train.json", "configs/demo.json", "configs/multi_gpu_train.json"],
    "tracking": "configs/tracking.json",
    "datalist": "$medgen.settings.environment('DATA_DIR') + '/datalist.json'",
    "output_dir": "$medgen.settings.environment('OUTPUT_DIR') + '/train'",
    "model_path": "$@output_dir + '/model.pt'",
    "resume": True,
    "batch_size": "$medgen.engines.batch_per_process(4)",
}


@pytest.fixture(scope="module", autouse=True)
def process_as_before():
    """A config's ``initialize`` makes its process deterministic."""
    yield
    from monai.utils import set_determinism

    set_determinism(seed=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    splits = {}
    for split, count in {"training": 8, "validation": 2, "test": 2}.items():
        splits[split] = [{"image": f"{split}{n}.png", "patient": f"{split}{n}", "label": 0} for n in range(count)]
        for item in splits[split]:
            Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / item["image"])
    write_datalist(folder / "datalist.json", "noise", "X-ray", splits)
    return folder


@pytest.fixture
def at(monkeypatch, tmp_path, data):
    """Write an args file, and stand in the folder of its bundle with the environment of a pod."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def stand(bundle: str = "cxr_autoencoder_kl", **settings: object) -> Path:
        monkeypatch.chdir(BUNDLES / bundle)
        monkeypatch.setenv("DATA_DIR", str(data))
        monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "outputs"))
        for name in ("PET_NNODES", "PET_NPROC_PER_NODE", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        path = tmp_path / "args.json"
        path.write_text(json.dumps({**TRAIN, **settings}))
        return path

    return stand


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_that_would_begin_is_told_in_one_line_and_nothing_is_written(at, tmp_path, monkeypatch):
    args_file = at()
    monkeypatch.setenv("PET_NNODES", "1:2")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
    before, hook = files(tmp_path), sys.excepthook

    result = CliRunner().invoke(cli.app, ["check", str(args_file), "--max_epochs", "3"])

    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "ok: configs/train.json + configs/demo.json + configs/multi_gpu_train.json, 2 processes, 8 training images, "
        f"2 validation images -> {tmp_path}/outputs/train\n"
    )
    assert files(tmp_path) == before
    assert sys.excepthook is hook
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"bach_size": 4}, [], r"no setting bach_size .* did you mean --batch_size"),
        ({}, ["--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
        ({"batch_size": 8}, [], r"takes 16 images \(batch_size 8 × 2 processes\), the training split holds 8"),
        ({"batch_size": "$medgen.engines.batch_per_process(5)"}, [], "2 processes cannot share"),
        ({"datalist": "$medgen.settings.environment('DATA_DIR') + '/absent.json'"}, [], r"absent\.json"),
        ({"datalist": "$medgen.settings.environment('NO_SUCH_DIR')"}, [], "variable NO_SUCH_DIR .* is not set"),
        ({"config_file": ["configs/train.json", "configs/demo.json"]}, [], "torchrun started 2 processes, but"),
        ({"image_size": 128}, [], "64×64 pixels .* smaller than the crop of 128×128"),
        ({"output_dir": "/proc/1/none"}, [], "output_dir must be a folder that can be written to"),
        ({"perceptual_weight": 0.1, "perceptual_weights": "/absent.pth"}, [], r"/absent\.pth"),
        ({"perceptual_weights": "/absent.pth"}, [], r"perceptual_weights must name a file that is there"),
        ({"config_file": "configs/evaluate.json", "resume": None}, [], "no setting resume"),
        ({"run": "$@train#no_trainer.run()"}, [], "names @train::no_trainer, which the config does not have"),
    ],
)
def test_mistakes_end_with_78_and_one_line(settings, overrides, message, at, monkeypatch):
    args_file = at(**settings)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        check.check_args_file(args_file, overrides)
    assert check.exit_code(caught.value) == os.EX_CONFIG == 78
    line = find_user_error(caught.value)
    assert line is not None, repr(caught.value)
    assert "\n" not in line
    assert re.search(message, line), line


def test_a_training_that_could_not_go_on_from_its_checkpoint_is_refused(at, tmp_path):
    args_file = at()
    checkpoint = tmp_path / "outputs" / "train" / "checkpoints" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    handler = check._read(json.loads(args_file.read_text())).get_parsed_content("train::handlers::0")
    torch.save({"components": {}, "fingerprint": handler.fingerprint, "images_seen": 0}, checkpoint)
    before = files(tmp_path)
    assert "8 training images" in check.check_args_file(args_file)
    assert files(tmp_path) == before
    with pytest.raises(Exception) as caught:  # noqa: PT011
        check.check_args_file(args_file, ["--g_lr", "0.5"])
    assert (check.exit_code(caught.value), "was made with g_lr" in find_user_error(caught.value)) == (78, True)
    checkpoint.write_bytes(b"torn")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        check.check_args_file(args_file)
    assert (check.exit_code(caught.value), "no older checkpoint" in find_user_error(caught.value)) == (78, True)


def test_weights_of_an_inference_must_be_there(at, tmp_path):
    generate = {"config_file": ["configs/generate.json", "configs/demo.json"], "seeds": "0-9", "batch_size": 2}
    args_file = at("stylegan2_anomaly", **generate, tracking=None, model_path=str(tmp_path / "model.pt"))
    settings = json.loads(args_file.read_text())
    del settings["datalist"], settings["tracking"]
    args_file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"model_path must name a file that is there, got {tmp_path}/model\.pt"):
        check.check_args_file(args_file)
    (tmp_path / "model.pt").write_bytes(b"weights")
    line = check.check_args_file(args_file, ["--shard", "0/4"])
    assert line == f"configs/generate.json + configs/demo.json -> {tmp_path}/outputs/train"
    assert not list((tmp_path / "outputs" / "train").iterdir())
    for words in (["--shard", "4/4"], ["--seeds", "9-3"]):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            check.check_args_file(args_file, words)
        assert check.exit_code(caught.value) == 78
        assert words[0][2:] in find_user_error(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 512}, "64×64 pixels .* smaller than"),
        ({"image_size": 64, "splits": ["tset"]}, "tset"),
        ({"image_size": 64, "datalist": "/absent.json"}, r"/absent\.json"),
        ({"image_size": 64}, ""),
    ],
)
def test_images_that_will_be_encoded_are_read(settings, message, at, tmp_path):
    args_file, weights = at("cxr_latent_diffusion"), tmp_path / "autoencoder.pt"
    weights.write_bytes(b"weights")
    encode = json.loads((ARGS / "cxr_latent_diffusion.encode.json").read_text())
    encode |= {"datalist": TRAIN["datalist"], "autoencoder_path": str(weights), **settings}
    args_file.write_text(json.dumps(encode))
    before = files(tmp_path)
    if message:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            check.check_args_file(args_file)
        assert re.search(message, find_user_error(caught.value) or ""), repr(caught.value)
    else:
        line = check.check_args_file(args_file, ["--shard", "1/2"])
        assert line.startswith("configs/encode.json, "), line
        assert line.endswith(" input images"), line
    assert files(tmp_path) == before


@pytest.mark.parametrize("stage", sorted(path.stem for path in ARGS.glob("*.json")))
def test_each_stage_on_empty_volumes_needs_a_person_and_names_what_is_missing(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLES / stage.split(".")[0])
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "outputs"))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        check.check_args_file(ARGS / f"{stage}.json")
    assert check.exit_code(caught.value) == 78
    assert str(tmp_path) in (find_user_error(caught.value) or ""), repr(caught.value)
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "Input/output error"), 75),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (ConnectionRefusedError("no registry"), 75),
        (MemoryError(), 75),
        (FileNotFoundError(errno.ENOENT, "No such file"), 78),
        (PermissionError(errno.EACCES, "Permission denied"), 78),
        (OSError(errno.ENOSPC, "No space left on device"), 78),
        (KeyError("name"), 78),
    ],
)
def test_what_may_pass_is_tried_again_and_the_rest_is_not(error, code):
    assert check.exit_code(error) == code
    told = UserError("output_dir must be a folder that can be written to")
    told.__cause__ = error
    assert check.exit_code(told) == code


def test_command_ends_with_the_code_and_one_line(at, tmp_path, monkeypatch):
    monkeypatch.delenv("MEDGEN_TRACEBACK", raising=False)
    missing = CliRunner().invoke(cli.app, ["check", str(tmp_path / "none.json")])
    assert (missing.exit_code, missing.stdout) == (78, "")
    assert missing.stderr == (
        f"error: ARGS_FILE must be a JSON file, there is none at {tmp_path}/none.json; name one that is there\n"
    )
    args_file = at()
    args_file.write_text("{")
    broken = CliRunner().invoke(cli.app, ["check", str(args_file)])
    assert broken.exit_code == 78
    assert broken.stderr.startswith(f"error: {args_file} must be a JSON file, got what is none (")
    assert broken.stderr.count("\n") == 1
    args_file.write_text("[1]")
    with pytest.raises(UserError, match="must hold settings by their names, with a config_file"):
        check.check_args_file(args_file)
    args_file.write_text(json.dumps(TRAIN))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"names configs/train\.json, there is none in .*; run this in the folder"):
        check.check_args_file(args_file)


@pytest.mark.parametrize(
    ("nodes", "per_node", "processes"), [("1", "1", 1), ("2", "4", 8), ("1:3", "2", 6), ("1", "gpu", 1)]
)
def test_processes_are_those_that_torchrun_will_start(nodes, per_node, processes, monkeypatch):
    monkeypatch.setenv("PET_NNODES", nodes)
    monkeypatch.setenv("PET_NPROC_PER_NODE", per_node)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # as in a container that asks for none
    assert check.launched_processes() == processes


@pytest.mark.parametrize(("nodes", "per_node"), [("two", "1"), ("1", "many"), ("1", "0")])
def test_numbers_that_torchrun_would_refuse_are_refused(nodes, per_node, monkeypatch):
    monkeypatch.setenv("PET_NNODES", nodes)
    monkeypatch.setenv("PET_NPROC_PER_NODE", per_node)
    with pytest.raises(UserError, match="PET_NNODES and PET_NPROC_PER_NODE must be"):
        check.launched_processes()
