"""The restricted reader: what it reads equals torch's own state dict; what it refuses is never run."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medgen.convert.restricted import Record, StoredTensor, module_state_dict, read_module_weights, read_records
from medgen.errors import UserError

FORMATS = {"zip": True, "legacy": False}
HERE = __name__  # the package whose classes the files below name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU()


class Net(nn.Module):
    """Shared weights, a slice of a larger storage, other types, a buffer that is not saved, an empty slot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        table = torch.arange(20, dtype=torch.float64).reshape(4, 5)
        self.register_buffer("column", table[:, 2])
        self.register_buffer("transposed", table.T)
        self.register_buffer("coarse", torch.tensor([0.5, -2.0], dtype=torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("missing", None)


def save(content: object, path: Path, form: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[form])
    return path


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_state_dict_of_a_whole_module_equals_torchs(tmp_path: Path, form: str) -> None:
    net = Net()

    state = read_module_weights(save(net, tmp_path / "net.pt", form), [HERE])

    expected = net.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("form", FORMATS)
def test_tied_weights_share_memory_again(tmp_path: Path, form: str) -> None:
    state = read_module_weights(save(Net(), tmp_path / "net.pt", form), [HERE])

    assert state["first.weight"].data_ptr() == state["tied.weight"].data_ptr()
    assert state["column"].data_ptr() == state["transposed"][2].data_ptr()
    assert state["first.bias"].data_ptr() != state["tied.bias"].data_ptr()


@pytest.mark.parametrize("form", FORMATS)
def test_plain_state_dict_and_nested_checkpoint(tmp_path: Path, form: str) -> None:
    net = nn.Linear(3, 2)
    path = save({"epoch": 7, "model": net.state_dict(), "name": "x"}, tmp_path / "c.pt", form)

    content = read_records(path)

    assert content["epoch"] == 7
    assert content["name"] == "x"
    assert torch.equal(module_state_dict(content["model"])["weight"], net.weight)
    with pytest.raises(UserError, match="expected a module or a state dict, got epoch, model, name"):
        module_state_dict(content)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_arrays_beside_the_weights_are_records_that_nothing_is_made_of(tmp_path: Path, form: str) -> None:
    net = Block()
    net.labels, net.threshold = np.array(["edema", "mass"], dtype=object), np.float64(0.5)
    path = save(net, tmp_path / "net.pt", form)

    record = read_records(path, [HERE, "numpy", "_codecs"])

    assert isinstance(record.state["labels"], Record)
    assert record.state["labels"].type_name.startswith("numpy.")
    assert torch.equal(module_state_dict(record)["conv.weight"], net.conv.weight)
    with pytest.raises(UserError, match=r"names numpy\..*, which is neither"):
        read_records(path, [HERE])


def test_classes_become_records_and_are_not_imported(tmp_path: Path) -> None:
    source = save(Net(), tmp_path / "net.pt", "zip").read_bytes()
    # same length, so that the zip's own lengths hold; zipfile would notice the checksum, so the entry is made anew
    renamed = HERE.replace(HERE[-4:], "gone")
    path = rewritten(source, tmp_path / "gone.pt", lambda data: data.replace(HERE.encode(), renamed.encode()))

    record = read_records(path, [renamed])

    assert isinstance(record, Record)
    assert record.type_name == f"{renamed}.Net"
    assert record.state["training"] is True
    assert isinstance(record.state["_buffers"]["coarse"], StoredTensor)


def test_classes_of_other_packages_are_refused_by_name(tmp_path: Path) -> None:
    path = save(Net(), tmp_path / "net.pt", "zip")

    with pytest.raises(UserError, match=rf"names {HERE}\.Net, which is neither a tensor nor a class of torch\.nn"):
        read_module_weights(path)


# ---------------------------------------------------------------------------------------------------------------------
# hostile files


def rewritten(source: bytes, path: Path, change) -> Path:
    """A copy of a zip file with another data.pkl."""
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)
    return path


def hostile(pickled: bytes, path: Path, form: str) -> Path:
    """A torch file with this pickle in the place of its own."""
    if form == "zip":
        whole = io.BytesIO()
        torch.save([], whole)
        return rewritten(whole.getvalue(), path, lambda _: pickled)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps([], 2))
    return path


class Run:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def mark(path: str) -> None:
    Path(path).write_text("run")


ATTACKS = {
    "os.system": lambda mark_at: pickle.dumps(Run(os.system, f"touch {mark_at}"), 2),
    "posix.system": lambda mark_at: f"cposix\nsystem\n(Vtouch {mark_at}\ntR.".encode(),
    "builtins.eval": lambda mark_at: pickle.dumps(Run(eval, f"open({mark_at!r}, 'w')"), 2),
    "__builtin__.exec": lambda mark_at: f"c__builtin__\nexec\n(Vopen({mark_at!r}, 'w')\ntR.".encode(),
    "builtins.getattr": lambda mark_at: b"cbuiltins\ngetattr\n(cbuiltins\nset\nVadd\ntR.",
    "nested in a state dict": lambda mark_at: pickle.dumps(
        OrderedDict(a=[{"b": (1, Run(os.system, f"touch {mark_at}"))}]), 2
    ),
    "nested reduce": lambda mark_at: pickle.dumps(Run(os.path.join, Run(os.system, f"touch {mark_at}")), 2),
    "a function of its own": lambda mark_at: pickle.dumps(Run(mark, str(mark_at)), 2),
    "dotted name": lambda mark_at: b"\x80\x04\x8c\x0bcollections\x8c\x10OrderedDict.copy\x93.",
    "dotted name of os": lambda mark_at: b"\x80\x04\x8c\x08torch._x\x8c\x09os.system\x93.",
    "copyreg._reconstructor": lambda mark_at: b"ccopyreg\n_reconstructor\n(cbuiltins\nset\ncbuiltins\nobject\nNtR.",
    "torch.load": lambda mark_at: b"ctorch.serialization\nload\n(Vx\ntR.",
    "storage from bytes": lambda mark_at: b"ctorch.storage\n_load_from_bytes\n(Vx\ntR.",
    "INST opcode": lambda mark_at: f"(Vtouch {mark_at}\nios\nsystem\n.".encode(),
    "OBJ opcode": lambda mark_at: f"(cos\nsystem\nVtouch {mark_at}\no.".encode(),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_calls_are_refused_with_one_line_and_not_made(tmp_path: Path, attack: str, form: str) -> None:
    mark_at = tmp_path / "mark"
    pickled = ATTACKS[attack](mark_at)
    if not pickled.startswith(b"\x80"):
        pickled = b"\x80\x02" + pickled

    with pytest.raises(UserError, match="nothing in it was run") as caught:
        read_records(hostile(pickled, tmp_path / "x.pt", form))

    assert "\n" not in str(caught.value)
    assert not mark_at.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    for attack in ("os.system", "nested in a state dict", "INST opcode"):
        mark_at = tmp_path / attack.replace(" ", "")
        pickle.loads(ATTACKS[attack](mark_at))
        assert mark_at.exists()


def test_extension_registry_is_refused_even_when_filled(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # now cached: the pickle machine hands it out unasked
        with pytest.raises(UserError, match="extension registry"):
            read_records(hostile(b"\x80\x02\x82\xf0.", tmp_path / "x.pt", "zip"))
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"ccollections\nOrderedDict\n", id="class of dictionaries"),
        pytest.param(b"ctorch.nn.modules.conv\nConv2d\n", id="class of records"),
        pytest.param(b"ctorch._utils\n_rebuild_tensor_v2\n", id="builder"),
        pytest.param(b"ctorch\nfloat32\n", id="dtype"),
        pytest.param(b"cbuiltins\nset\n", id="set"),
    ],
)
@pytest.mark.parametrize("state", [b"}Vkeys\ncbuiltins\nset\ns", b"(N}V__call__\ncbuiltins\nset\nst"])
def test_what_pickles_are_answered_with_cannot_be_changed(tmp_path: Path, target: bytes, state: bytes) -> None:
    with pytest.raises(UserError, match="nothing in it was run"):
        read_records(hostile(b"\x80\x02" + target + state + b"b.", tmp_path / "x.pt", "zip"))


def test_state_cannot_shadow_methods(tmp_path: Path) -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R(N}Vitems\ncbuiltins\nset\nstb."

    content = read_records(hostile(pickled, tmp_path / "x.pt", "zip"))

    assert list(content.items()) == []


PIDS = {
    "text": "x",
    "other kind": ("file", "/etc/passwd"),
    "storage without type": ("storage", "FloatStorage", "0", "cpu", 4),
    "view": ("storage", torch.float32, "0", "cpu", 4, ("1", 0, 4)),
    "negative": ("storage", torch.float32, "0", "cpu", -4),
    "path as key": ("storage", torch.float32, 7, "cpu", 4),
}


@pytest.mark.parametrize("pid", PIDS)
def test_persistent_ids_that_torch_does_not_write_are_refused(tmp_path: Path, pid: str) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return PIDS[pid] if value is ... else None

    written = io.BytesIO()
    Pickler(written, 2).dump(...)
    with pytest.raises(UserError, match="nothing in it was run"):
        read_records(hostile(written.getvalue(), tmp_path / "x.pt", "zip"))


def described_tensor(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Pickle of a tensor over storage 0 of four numbers."""
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"
    rest = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, shape, stride, False))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"ccollections\nOrderedDict\n)RtR."


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (4, 1)), (0, (10**6,), (0,)), (-1, (2,), (1,)), (0, (-2,), (1,))],
)
def test_tensors_beyond_their_storage_are_refused(
    tmp_path: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    torch.save([torch.arange(4.0)], tmp_path / "good.pt")
    source = (tmp_path / "good.pt").read_bytes()
    good = rewritten(source, tmp_path / "good2.pt", lambda _: described_tensor(1, (3,), (1,)))
    bad = rewritten(source, tmp_path / "bad.pt", lambda _: described_tensor(offset, shape, stride))

    assert torch.equal(read_records(good).read(), torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(UserError, match=r"does not fit its storage|something other than a storage"):
        read_records(bad)


def test_storage_shorter_than_described_is_refused(tmp_path: Path) -> None:
    torch.save([torch.arange(3.0)], tmp_path / "short.pt")
    source = (tmp_path / "short.pt").read_bytes()
    path = rewritten(source, tmp_path / "bad.pt", lambda _: described_tensor(0, (4,), (1,)))

    with pytest.raises(UserError, match="storage 0 has 12 bytes instead of 16"):
        read_records(path).read()


def test_module_that_contains_itself_is_refused(tmp_path: Path) -> None:
    # a Sequential whose child is itself: memo 1 is put before its state is built
    state = b"}(V_parameters\n}V_buffers\n}V_modules\n}Vme\nh\x01su"
    pickled = b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81q\x01" + state + b"b."

    with pytest.raises(UserError, match="without an end"):
        read_module_weights(hostile(pickled, tmp_path / "x.pt", "zip"))


def test_memo_index_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    pickled = b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b"."

    with pytest.raises(UserError, match="memo index"):
        read_records(hostile(pickled, tmp_path / "x.pt", "zip"))


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_give_one_line(tmp_path: Path, form: str) -> None:
    whole = save(Net(), tmp_path / "net.pt", form).read_bytes()
    path = tmp_path / "cut.pt"
    for length in (0, 1, 10, 200, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])

        with pytest.raises(UserError) as caught:
            read_module_weights(path, [HERE])

        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    scripted, plain, compressed = tmp_path / "s.pt", tmp_path / "p.pkl", tmp_path / "c.pt"
    torch.jit.save(torch.jit.script(nn.ReLU()), scripted)
    plain.write_bytes(pickle.dumps({"a": 1}, 2))
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps([0] * 1000))

    for path, said in ((scripted, "TorchScript"), (plain, "a pickle, but no torch file"), (compressed, "compressed")):
        with pytest.raises(UserError, match=said):
            read_records(path)
    with pytest.raises(UserError, match="No such file"):
        read_records(tmp_path / "absent.pt")
