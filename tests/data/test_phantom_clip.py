"""The CLIP phantom: what transformers makes of it, and what it refuses to overwrite."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from medgen import cli
from medgen.data.phantom import write_clip
from medgen.errors import UserError

REPORT = (
    "Heart size is normal. The mediastinal and hilar contours are unremarkable. There is a small left pleural effusion "
    "with adjacent atelectasis. No focal consolidation, pneumothorax or pulmonary edema is seen. An endotracheal tube "
    "terminates 4 cm above the carina."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_transformers_finds_every_weight_and_no_other(folder):
    from transformers import CLIPTextModel

    model, report = CLIPTextModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, output_loading_info=True
    )

    assert not any(report.values())
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == sum(value.numel() for value in stored.values())


def test_tokenizer_pads_as_that_of_stable_diffusion_2(tokenizer):
    ids = tokenizer("", padding="max_length", truncation=True).input_ids

    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens([0, start, end]) == ["!", "<|startoftext|>", "<|endoftext|>"]
    assert ids == [start, end] + 75 * [0]


def test_words_of_reports_are_one_token_each_and_any_text_comes_back(tokenizer):
    tokens = tokenizer.tokenize(REPORT)

    assert {"heart</w>", "mediastinal</w>", "atelectasis</w>", "pneumothorax</w>", ".</w>"} <= set(tokens)
    assert len(tokenizer(REPORT).input_ids) <= 77
    odd = "zymurgy of 37 μg/dl ❤ naïve"
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True).replace(" ", "") == odd.replace(" ", "")


def test_every_position_after_a_caption_knows_its_words(folder, tokenizer):
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    captions = ["", "no pleural effusion", "no pneumothorax", "effusion pleural no"]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        last = model(ids).last_hidden_state[:, -1]

    distances = torch.cdist(last, last)[~torch.eye(4, dtype=torch.bool)]
    assert distances.min() > 0.005 * last.norm(dim=1).mean()


def test_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    write_clip(tmp_path / "again")
    write_clip(tmp_path / "other", seed=1)

    assert files(tmp_path / "again") == files(folder)
    weights = "text_encoder/model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()


def test_sizes_are_those_asked_for(tmp_path):
    write_clip(tmp_path / "clip", width=48, layers=3, heads=4)
    config = json.loads((tmp_path / "clip" / "text_encoder" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (48, 3, 4)


def test_other_options_need_force_and_foreign_files_are_never_touched(tmp_path):
    out = tmp_path / "clip"
    write_clip(out)
    write_clip(out)
    with pytest.raises(UserError, match=r"made with other options.*--force"):
        write_clip(out, width=64)
    write_clip(out, width=64, force=True)
    assert '"hidden_size": 64' in (out / "text_encoder" / "config.json").read_text()

    real = tmp_path / "stable-diffusion"
    (real / "text_encoder").mkdir(parents=True)
    (real / "text_encoder" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match="files of another origin"):
        write_clip(real, force=True)
    assert [path.read_bytes() for path in real.rglob("*.safetensors")] == [b"precious"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 33}, "width must be a multiple of the 2 attention heads, got 33; change --width"),
        ({"width": 0}, "width must be at least 8, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_clip(tmp_path / "clip", **options)
    assert not (tmp_path / "clip").exists()


def test_a_file_in_the_way_is_an_error_in_one_line(tmp_path):
    (tmp_path / "clip").write_text("x")
    with pytest.raises(UserError, match="choose another folder"):
        write_clip(tmp_path / "clip")


def test_command_says_how_to_name_the_model(tmp_path):
    out = tmp_path / "a clip"

    result = CliRunner().invoke(cli.app, ["phantom", "clip", str(out), "--width", "16", "--seed", "2"])

    assert result.exit_code == 0, result.stderr
    assert "for demonstration and tests only" in result.stdout
    assert f"--conditioning text --text_encoder '{out}' --context_dim 16" in result.stdout


def test_writing_a_clip_imports_no_framework(tmp_path):
    code = (
        "import sys; from pathlib import Path; from medgen.data.phantom import write_clip\n"
        f"write_clip(Path({str(tmp_path / 'clip')!r}))\n"
        "heavy = {'torch', 'monai', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
