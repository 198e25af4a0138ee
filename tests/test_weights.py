"""Files of plain weights: what is refused that ``torch.load`` would read."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch
from torch import nn

from medgen.errors import UserError
from medgen.weights import load_weights, read_state_dict


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Linear(30, 20)


@pytest.mark.parametrize("component", [None, "network"])
def test_flipped_bit_is_refused(component, network, tmp_path):
    state = network.state_dict()
    torch.save({"components": {"network": state}} if component else state, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    read_state_dict(tmp_path / "model.pt", component=component)
    content[content.index(state["weight"].numpy().tobytes()) + 2] ^= 4
    (tmp_path / "model.pt").write_bytes(content)

    with pytest.raises(
        UserError, match=r"model\.pt is damaged \(.* is not what was written\); copy or download"
    ) as error:
        load_weights(network, tmp_path / "model.pt", component=component)

    assert "\n" not in str(error.value)


def test_file_of_the_legacy_format_and_one_that_another_program_packed_are_read(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "packed.pt", "w") as new:
        for name in old.namelist():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16  # permissions, as the zip command notes them
            new.writestr(entry, old.read(name))

    for name in ("legacy.pt", "packed.pt"):
        state = read_state_dict(tmp_path / name)
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_file_that_is_cut_is_refused_in_one_line(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "model.pt")
    os.truncate(tmp_path / "model.pt", 2000)

    with pytest.raises(UserError, match=r"model\.pt is not a file of plain weights") as error:
        read_state_dict(tmp_path / "model.pt")

    assert "\n" not in str(error.value)
