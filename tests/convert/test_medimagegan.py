"""Control files of MedImageGAN: what each key becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from medgen import cli
from medgen.convert import convert_control_file
from medgen.errors import UserError
from medgen.inferers import parse_numbers
from medgen.inferers.generation import MOST_NUMBERS

CONFIGS = Path(__file__).parents[2] / "bundles" / "skin_sngan" / "configs"
TRAINING = {
    "arch": "SNGAN",
    "path": "/data/ISIC images/",
    "out": "/results/",
    "run": "first",
    "seed": 42,
    "n_gpu": 0,
    "num_epochs": 5,
    "learning_rate": 0.0003,
    "beta_adam": 0.4,
    "batch_size": 24,
    "latent_vector": 200,
    "image_size": 128,
    "loader_workers": 2,
    "number_channels": 1,
    "gen_feature_maps": 48,
    "dis_feature_maps": 32,
}
SAMPLING = {
    "arch": "Generator",
    "path": "/w/netG",
    "out": "/fakes",
    "run": "a",
    "n_gpu": 1,
    "quantity": 7,
    "image_size": 64,
}


def overlay_of(folder: Path, content: dict[str, Any] | str) -> Any:
    path = folder / "input.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return convert_control_file(path, folder / "overlay.json")


def test_every_key_of_a_training_has_its_place(tmp_path):
    converted = overlay_of(tmp_path, TRAINING)

    assert converted.config == "train.json"
    assert converted.settings == {
        "preset": "spectral_norm",
        "output_dir": "/results/first",
        "seed": 42,
        "device": "cpu",
        "epochs": 5,
        "g_lr": 0.0003,
        "d_lr": 0.0003,
        "beta0": 0.4,
        "batch_size": 24,
        "latent_dim": 200,
        "image_size": 128,
        "num_workers": 2,
        "in_channels": 1,
        "g_channels": 48,
        "d_channels": 32,
        "real_label": 1.0,  # the source's code smooths nothing
    }
    text = "\n".join(converted.notes)
    data = f"{tmp_path}/overlay_data"
    assert f"preprocessing.images --source '/data/ISIC images' --target {data} --folder-labels --size 128" in text
    assert f"--config_file \"['configs/train.json','{tmp_path}/overlay.json']\" --datalist {data}/datalist.json" in text


@pytest.mark.parametrize("control", [TRAINING, {**TRAINING, "arch": "DCGAN", "n_gpu": 2}, SAMPLING])
def test_overlays_set_what_the_bundles_configs_have(tmp_path, control):
    converted = overlay_of(tmp_path, control)

    config = json.loads((CONFIGS / converted.config).read_text())
    assert converted.settings.keys() <= config.keys()


@pytest.mark.parametrize(
    ("rate", "g_lr", "d_lr"),
    [(0.0002, 0.0002, 0.0002), ("2e-5", 2e-5, 2e-5), (1, 2e-4, 2e-4), (10, 2e-4, 2e-3), (100, 2e-4, 2e-2)],
)
def test_learning_rate_from_one_on_is_a_factor_of_the_discriminators(tmp_path, rate, g_lr, d_lr):
    settings = overlay_of(tmp_path, {"arch": "DCGAN", "learning_rate": rate}).settings

    assert (settings["g_lr"], settings["d_lr"]) == pytest.approx((g_lr, d_lr), rel=1e-12)
    assert settings["preset"] == "batch_16"


def test_missing_keys_keep_the_presets(tmp_path):
    settings = overlay_of(tmp_path, {"arch": "SNGAN", "seed": 1}).settings

    assert settings == {"preset": "spectral_norm", "seed": 1, "real_label": 1.0}


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda:0")])
def test_number_of_gpus_chooses_the_device(tmp_path, gpus, device):
    assert overlay_of(tmp_path, {**TRAINING, "n_gpu": gpus}).settings["device"] == device


def test_several_gpus_share_the_batch(tmp_path):
    converted = overlay_of(tmp_path, {**TRAINING, "n_gpu": 2})

    assert "device" not in converted.settings
    assert converted.settings["batch_size"] == "$medgen.engines.batch_per_process(24)"
    assert "torchrun --standalone --nproc_per_node 2 -m monai.bundle run" in converted.notes[-1]
    assert "'configs/multi_gpu_train.json'" in converted.notes[-1]


def test_generator_becomes_an_overlay_of_the_inference(tmp_path):
    converted = overlay_of(tmp_path, SAMPLING)

    assert converted.config == "inference.json"
    assert converted.settings == {
        "image_size": 64,
        "seeds": "0-6",
        "device": "cuda:0",
        "output_dir": "/fakes/a",
        "model_path": "/fakes/a/model.pt",
    }
    assert converted.notes[0] == "the weights: medgen convert dcgan /w/netG --output /fakes/a/model.pt"
    assert f"['configs/inference.json','/fakes/a/model.json','{tmp_path}/overlay.json']" in converted.notes[1]


def test_relative_paths_are_those_of_the_folder_of_the_conversion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("control.yaml").write_text(yaml.safe_dump({**SAMPLING, "path": "netG", "out": "fakes", "run": "a/../b"}))

    converted = convert_control_file("control.yaml", "o.json")
    assert converted.settings["output_dir"] == f"{tmp_path}/fakes/b"
    assert converted.settings["model_path"] == f"{tmp_path}/fakes/b/model.pt"
    assert (
        converted.notes[0] == f"the weights: medgen convert dcgan {tmp_path}/netG --output {tmp_path}/fakes/b/model.pt"
    )
    assert f"'{tmp_path}/fakes/b/model.json','{tmp_path}/o.json'" in converted.notes[1]
    # neither is named: beside the overlay
    assert overlay_of(tmp_path, "arch: Generator").settings == {"model_path": f"{tmp_path}/overlay/model.pt"}


def test_numbers_end_where_those_of_the_bundle_do(tmp_path):
    settings = overlay_of(tmp_path, {**SAMPLING, "quantity": MOST_NUMBERS}).settings

    assert len(parse_numbers(settings["seeds"], "seeds")) == MOST_NUMBERS
    assert overlay_of(tmp_path, {"arch": "DCGAN", "beta_adam": 0}).settings["beta0"] == 0


def test_repetitions_by_name_do_not_grow(tmp_path):
    lines = ["arch: DCGAN", "path: x", "seed:", "  - &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"  - &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]

    with pytest.raises(UserError, match=r"cannot be read \(a value must be written out, got \*a0\)"):
        overlay_of(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**TRAINING, "bath_size": 3}, "a control file of arch SNGAN has the keys .*, got 'bath_size'"),
        ({**TRAINING, "quantity": 3}, "a control file of arch SNGAN has the keys .*, got 'quantity'"),
        ({**SAMPLING, "seed": 3}, "a control file of arch Generator has the keys .*, got 'seed'"),
        ({"seed": 3}, "must have the key arch with DCGAN, SNGAN or Generator"),
        ({**TRAINING, "arch": "WGAN"}, "arch of .* must be DCGAN, SNGAN or Generator, got 'WGAN'"),
        ({**TRAINING, "image_size": 96}, "image_size of .* must be 16, 32, 64, 128, 256 or 512, got 96"),
        ({**TRAINING, "batch_size": 0}, "batch_size of .* must be a whole number of at least 1, got 0"),
        ({**TRAINING, "seed": True}, "seed of .* must be a whole number of at least 0, got True"),
        ({**TRAINING, "learning_rate": "fast"}, "learning_rate of .* must be a number above 0, got 'fast'"),
        ({**TRAINING, "learning_rate": float("nan")}, "learning_rate of .* must be a number above 0, got nan"),
        ({**TRAINING, "beta_adam": 1}, "beta_adam of .* must be a number from 0 to below 1, got 1"),
        ({**TRAINING, "beta_adam": -1e-13}, "beta_adam of .* must be a number from 0 to below 1, got -1e-13"),
        ({**TRAINING, "learning_rate": 10**400}, "learning_rate of .* must be a number above 0, got 1000"),
        ({**TRAINING, "run": "../../../etc"}, r"run must be a folder within out, /results, got '../../../etc'"),
        ({**TRAINING, "run": "/etc/x"}, r"run must be a folder within out, /results, got '/etc/x'"),
        (
            {**SAMPLING, "quantity": 1_000_001},
            "quantity of .* must be a whole number of at most 1,000,000, got 1000001",
        ),
        ({**TRAINING, "seed": [1]}, r"a number or a short text, got something else in line \d+ \(seed\)"),
        (f"arch: SNGAN\nseed: {'9' * 5000}\n", r"got something else in line 2 \(seed\)"),
        ("#" * 70_000, "must be a control file, got one of more than 65,536 bytes"),
        ("arch: SNGAN\nseed: 2024-13-45\n", "must be a control file in YAML, got one that cannot be read"),
        ({**TRAINING, "number_channels": 4}, "number_channels of .* must be 1 or 3, got 4"),
        ({**TRAINING, "out": "$print(1)"}, r"out of .* must be text that does not begin with \$, @ or %, got"),
        ({**TRAINING, "path": None}, "path of .* must be text"),
        ("arch: SNGAN\nseed: 1\nseed: 2\n", "each key of a control file must stand once, got 'seed' 2 times"),
        (
            "arch: !!python/object/apply:os.system ['true']\n",
            "must be a control file in YAML, got one that cannot be read",
        ),
        ("arch: [SNGAN\n", "must be a control file in YAML, got one that cannot be read"),
        ("- SNGAN\n", "must be a control file in YAML, with lines KEY: VALUE, got list"),
        ("? [a]\n: 1\n", "must be a control file in YAML"),
        ("1: 2\n", "got 1 in"),
        ("", "must be a control file in YAML, with lines KEY: VALUE, got NoneType"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        overlay_of(tmp_path, content)

    assert "\n" not in str(caught.value)


def test_command_writes_the_overlay_and_says_what_is_left_to_do(tmp_path):
    (tmp_path / "input.yaml").write_text(yaml.safe_dump(TRAINING))
    arguments = ["convert", "medimagegan", str(tmp_path / "input.yaml"), "--output", str(tmp_path / "out" / "o.json")]

    result = CliRunner().invoke(cli.app, arguments)

    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'input.yaml'} -> {tmp_path / 'out' / 'o.json'}, an overlay of train.json" in result.output
    assert "python -m preprocessing.images" in result.output
    assert json.loads((tmp_path / "out" / "o.json").read_text())["seed"] == 42
    missing = CliRunner().invoke(cli.app, ["convert", "medimagegan", str(tmp_path / "no.yaml"), "--output", "o.json"])
    assert missing.exit_code == 1
    assert "no.yaml cannot be read (No such file or directory); name a control file" in missing.stderr
