"""State dicts to safetensors and back: every type, every bit, and nothing but tensors."""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from typer.testing import CliRunner

from medgen import cli
from medgen.data.image_set import file_sha256

runner = CliRunner()

TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state() -> dict[str, torch.Tensor]:
    """Types, patterns of NaN, a scalar, nothing, gaps, another memory format and shared memory."""
    torch.manual_seed(0)
    table = torch.randn(6, 5)
    odd = torch.tensor([0x7FC00001, 0xFF800000 - 2**32, -(2**31)], dtype=torch.int32).view(torch.float32)
    return {
        **{str(dtype): (torch.randn(3, 2) * 3).to(dtype) for dtype in TYPES},
        "odd": odd,  # a NaN with a payload, minus infinity, minus zero
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 3),
        "column": table[:, 2],
        "turned": table.T,
        "tied": table,
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "repeated": torch.ones(1).expand(4),
    }


def convert(*arguments: object):
    return runner.invoke(cli.app, ["convert", "safetensors", *map(str, arguments)])


def test_both_ways_keep_type_shape_and_every_bit(tmp_path):
    torch.save(state(), tmp_path / "a.pt")

    there = convert(tmp_path / "a.pt", "--output", tmp_path / "b" / "a.safetensors")
    back = convert(tmp_path / "b" / "a.safetensors", "--output", tmp_path / "c.pt")

    assert there.exit_code == back.exit_code == 0, there.stderr + back.stderr
    assert "20 tensors" in there.stdout
    expected, read = state(), torch.load(tmp_path / "c.pt", weights_only=True)
    theirs = safetensors.torch.load_file(tmp_path / "b" / "a.safetensors")
    for found in (read, theirs):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            assert bits(found[name]) == bits(value), name


def test_metadata_name_the_package_and_the_source(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")

    convert(tmp_path / "a.pt", "--output", tmp_path / "a.safetensors")

    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["source_sha256"] == file_sha256(tmp_path / "a.pt")


def test_a_files_own_content_is_kept_until_forced(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_text("mine")

    refused = convert(tmp_path / "a.pt", "--output", tmp_path / "a.safetensors")

    assert refused.exit_code == 1
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    assert convert(tmp_path / "a.pt", "--output", tmp_path / "a.safetensors", "--force").exit_code == 0
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["w"].tolist() == [1, 1]


class Run:
    def __init__(self, mark: object) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", {"w": torch.eye(2).to_sparse()}, "must hold dense tensors, got a sparse one at w"),
        ("w.pt", {0: torch.ones(1)}, "must name its tensors by text, got 0"),
        ("w.pt", {"net": {"w": torch.ones(1)}}, "must be one flat state dict of tensors, got net"),
        ("w.pt", Run, "is not a file of plain weights"),
        ("w.bin", b"", "expected a file that ends in .pt or .safetensors"),
        ("w.safetensors", b"no tensors", "must be a safetensors file, got a damaged one or another"),
        ("w.safetensors", header({}), "holds no tensors"),
        ("w.safetensors", struct.pack("<Q", 2**62), "must be a safetensors file"),
        (
            "w.safetensors",
            header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            "must be a safetensors file",
        ),
        (
            "w.safetensors",
            header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12"),
            "must be a safetensors file",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path, name, content, message):
    source = tmp_path / name
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content(tmp_path / "mark") if content is Run else content, source)

    result = convert(source, "--output", source.with_suffix(".safetensors" if name.endswith(".pt") else ".pt"))

    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == [name]


def test_absent_file_and_wrong_ending_are_one_line(tmp_path):
    for arguments, message in (
        (("a.safetensors", "--output", tmp_path / "a.pt"), "no weights at a.safetensors"),
        (("a.pt", "--output", tmp_path / "a.pt"), "--output must be a file that ends in .safetensors"),
    ):
        result = convert(*arguments)

        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
