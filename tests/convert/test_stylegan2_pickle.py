"""Official snapshots: images as the official code rendered them; nothing out of a hostile file is run."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.convert import convert_stylegan2_pickle, module_state_dict, read_stylegan2_pickle, to_official
from medgen.errors import UserError
from medgen.networks import StyleGAN2Discriminator, StyleGAN2Generator

ASSETS = Path(__file__).parents[1] / "assets"
REFERENCES = ("gray32", "rgb16_cond2")
BUFFERS = {"resample_filter", "noise_const", "w_avg"}
SOURCE = "import pathlib\npathlib.Path({!r}).write_text('run')\n"  # what a snapshot carries, and nobody runs

# ---------------------------------------------------------------------------------------------------------------------
# snapshots in the official form, without the official code


class Network:
    """Pickles as the official networks do: a call of one function, with the source code and all attributes."""

    def __init__(self, class_name: str, **attributes: object) -> None:
        self.class_name = class_name
        self.version = 6
        self.source = "raise SystemExit"
        self.state = {"training": False, "_parameters": OrderedDict(), "_buffers": OrderedDict()}
        self.state |= {"_non_persistent_buffers_set": set(), "_backward_hooks": OrderedDict()}
        self.state |= {"_modules": OrderedDict(), "_init_args": (), "_init_kwargs": {}, **attributes}

    def child(self, path: str) -> Network:
        network = self
        for name in path.split(".") if path else ():
            network = network.state["_modules"].setdefault(name, Network("Layer"))
        return network

    def __reduce__(self) -> tuple:
        meta = {"type": "class", "version": self.version, "module_src": self.source}
        function = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return function, ({**meta, "class_name": self.class_name, "state": self.state},)


@contextlib.contextmanager
def official_names() -> Iterator[type[dict]]:
    """The modules that a snapshot names, for as long as one is written; gives the class of dictionaries."""

    def _reconstruct_persistent_obj(meta: dict) -> None: ...

    class EasyDict(dict): ...

    modules = {"torch_utils": None, "torch_utils.persistence": _reconstruct_persistent_obj}
    modules |= {"dnnlib": None, "dnnlib.util": EasyDict}
    for module_name, content in modules.items():
        sys.modules[module_name] = module = types.ModuleType(module_name)
        if content is not None:
            content.__module__, content.__qualname__ = module_name, content.__name__
            setattr(module, content.__name__, content)
    try:
        yield EasyDict
    finally:
        for module_name in modules:
            del sys.modules[module_name]


def arrays_of(reference: str) -> dict[str, torch.Tensor]:
    with np.load(ASSETS / f"stylegan2_{reference}.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def filled(network: Network, arrays: dict[str, torch.Tensor], prefix: str) -> Network:
    for name, value in arrays.items():
        if name.startswith(prefix):
            path, _, leaf = name.removeprefix(prefix).rpartition(".")
            state = network.child(path).state
            if leaf in BUFFERS:
                state["_buffers"][leaf] = value
            else:
                state["_parameters"][leaf] = torch.nn.Parameter(value)
    return network


def make_generator(arrays: dict[str, torch.Tensor], halves: int = 0) -> Network:
    """With the attributes that the official constructors leave."""
    side, channels = arrays["image_noise_const"].shape[-1], arrays["image_noise_const"].shape[1]
    z_dim, (_, num_ws, w_dim) = arrays["z"].shape[1], arrays["w"].shape
    classes = arrays["c"].shape[1] if "c" in arrays else 0
    network = filled(Network("Generator", z_dim=z_dim, c_dim=classes, w_dim=w_dim, num_ws=num_ws), arrays, "G.")
    network.state |= {"img_resolution": side, "img_channels": channels}
    mapping = network.child("mapping").state
    mapping |= {"num_layers": sum(name.startswith("fc") for name in mapping["_modules"]), "w_avg_beta": 0.995}
    for name, dense in mapping["_modules"].items():
        activation = "linear" if name == "embed" else "lrelu"
        dense.state |= {"activation": activation, "weight_gain": 0.01 / np.sqrt(w_dim), "bias_gain": 0.01}
    for name, block in network.child("synthesis").state["_modules"].items():
        block.state["use_fp16"] = int(name[1:]) > side // 2**halves
        for kind, layer in block.state["_modules"].items():
            layer.state |= {"conv_clamp": 256, "up": 2 if kind == "conv0" else 1, "act_gain": np.sqrt(2)}
            if kind != "torgb":
                layer.state["activation"] = "lrelu"
    return network


def make_discriminator(arrays: dict[str, torch.Tensor]) -> Network:
    side, channels = arrays["image_noise_const"].shape[-1], arrays["image_noise_const"].shape[1]
    classes = arrays["c"].shape[1] if "c" in arrays else 0
    network = filled(Network("Discriminator", c_dim=classes, img_resolution=side, img_channels=channels), arrays, "D.")
    for name, module in network.state["_modules"].items():
        for kind, layer in module.state["_modules"].items():
            if name == "mapping":
                layer.state |= {"activation": "linear" if kind == "embed" else "lrelu", "bias_gain": 0.01}
            else:
                layer.state |= {"activation": "linear" if kind in ("skip", "out") else "lrelu"}
                layer.state["conv_clamp"] = None if kind in ("skip", "fc", "out") else 256
    if classes:
        network.child("mapping").state["num_layers"] = 8
    network.child("b4.mbstd").state |= {"group_size": 4, "num_channels": 1}
    return network


def written(path: Path, content: object, protocol: int = 4) -> Path:
    with official_names(), open(path, "wb") as file:
        pickle.dump(content, file, protocol)
    return path


def make_snapshot(path: Path, reference: str, protocol: int = 4, halves: int = 0) -> Path:
    arrays = arrays_of(reference)
    augment = Network("AugmentPipe", xint_max=0.125)
    augment.state["_buffers"]["p"] = torch.tensor(0.2)
    with official_names() as easy_dict:
        content = {"G": make_generator(arrays), "D": make_discriminator(arrays)}
        content |= {"G_ema": make_generator(arrays, halves), "augment_pipe": augment}
        content["training_set_kwargs"] = easy_dict(class_name="training.dataset.ImageFolderDataset", resolution=32)
        path.write_bytes(pickle.dumps(content, protocol))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# what is read


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request, tmp_path_factory):
    return arrays_of(request.param), make_snapshot(tmp_path_factory.mktemp("official") / "n.pkl", request.param)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["G_ema", "G"])
def test_images_of_a_converted_snapshot_equal_the_official_ones(reference, name):
    arrays, path = reference

    network, settings, state = convert_stylegan2_pickle(path, name)
    generator = network(**settings).eval()
    generator.load_state_dict(state)

    assert network is StyleGAN2Generator
    assert settings["conv_clamp"] == 256
    labels = arrays.get("c") if settings["num_classes"] else None
    for array, psi, noise in (("image_noise_const", 1, "const"), ("image_noise_none", 1, "none")):
        assert relative_error(generator(arrays["z"], labels, psi, noise=noise), arrays[array]) < 1e-4
    assert relative_error(generator(arrays["z"], labels, 0.7, noise="const"), arrays["image_psi07"]) < 1e-4


@torch.no_grad()
def test_logits_of_a_converted_snapshot_equal_the_official_ones(reference):
    arrays, path = reference

    network, settings, state = convert_stylegan2_pickle(path, "D")
    discriminator = network(**settings).eval()
    discriminator.load_state_dict(state)

    assert network is StyleGAN2Discriminator
    assert settings["minibatch_group_size"] == 4
    labels = arrays.get("c") if settings["num_classes"] else None
    assert relative_error(discriminator(arrays["image_noise_const"], labels), arrays["logits"]) < 1e-4


def test_official_names_come_back_exactly(reference):
    arrays, path = reference

    for name, prefix in (("G_ema", "G."), ("D", "D.")):
        back = to_official(convert_stylegan2_pickle(path, name).state)

        expected = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[key], value) for key, value in expected.items())


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_and_both_spellings_of_numpy_are_read(tmp_path, protocol):
    path = make_snapshot(tmp_path / "n.pkl", "gray32", protocol)
    if protocol == 3:  # names end with a line there, so that their length may change
        new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
        data = path.read_bytes()
        assert new in data or old in data
        for spelling in (new, old):
            path.write_bytes(data.replace(new, spelling).replace(old, spelling))
            assert "G_ema" in read_stylegan2_pickle(path)

    state = convert_stylegan2_pickle(path).state

    assert torch.equal(state["w_avg"], arrays_of("gray32")["G.mapping.w_avg"])


def test_highest_resolutions_in_float16_are_bfloat16_here(tmp_path):
    path = make_snapshot(tmp_path / "n.pkl", "gray32", halves=2)

    assert convert_stylegan2_pickle(path, "G_ema").settings["num_bf16_resolutions"] == 2
    assert convert_stylegan2_pickle(path, "G").settings["num_bf16_resolutions"] == 0


def test_source_code_is_neither_run_nor_kept(tmp_path):
    network = make_generator(arrays_of("gray32"))
    network.source = SOURCE.format(str(tmp_path / "mark"))
    path = written(tmp_path / "n.pkl", {"G_ema": network})

    record = read_stylegan2_pickle(path)["G_ema"]

    convert_stylegan2_pickle(path)
    assert not (tmp_path / "mark").exists()
    assert record.type_name == "Generator"
    assert record.arguments == ()
    assert "write_text" not in repr(record.state)
    assert not {"torch_utils", "dnnlib"} & set(sys.modules)


def test_numpy_values_are_records_that_nothing_is_made_of(tmp_path):
    record = read_stylegan2_pickle(make_snapshot(tmp_path / "n.pkl", "gray32"))["G"]

    gain = record.state["_modules"]["mapping"].state["_modules"]["fc0"].state["weight_gain"]
    assert gain.type_name == "numpy.scalar"
    assert "mapping.w_avg" in module_state_dict(record)


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be built


def broken(part: str, **attributes: object) -> Network:
    network = make_generator(arrays_of("gray32"))
    network.child(part).state.update(attributes)
    return network


@pytest.mark.parametrize(
    ("part", "attributes", "said"),
    [
        ("", {"z_dim": 31}, r"z_dim of Generator .* must be 32 .* got 31"),
        ("", {"img_resolution": 64}, r"img_resolution .* must be 32 .* got 64"),
        ("", {"num_ws": None}, r"num_ws .* got None"),
        ("mapping", {"num_layers": 2}, r"num_layers .* must be 8 .* got 2"),
        ("mapping.fc1", {"bias_gain": 1.0}, r"bias_gain .* must be 0.01 .* got 1.0"),
        ("synthesis.b8.conv0", {"activation": "relu"}, r"activation .* must be 'lrelu' .* got 'relu'"),
        ("synthesis.b8.conv0", {"conv_clamp": None}, "one conv_clamp for all layers"),
        ("synthesis.b8", {"use_fp16": True}, "float16 in its highest resolutions only"),
        ("synthesis", {"_modules": OrderedDict()}, "state dict of an official StyleGAN2-ADA network"),
        ("synthesis", {"_modules": {"b4": 3}}, r"expected a module at synthesis.b4, got a int"),
    ],
)
def test_attributes_that_contradict_the_weights_are_refused(tmp_path, part, attributes, said):
    path = written(tmp_path / "n.pkl", {"G_ema": broken(part, **attributes)})

    with pytest.raises(UserError, match=said):
        convert_stylegan2_pickle(path)


def test_other_content_is_refused_in_words(tmp_path):
    older, strange = make_generator(arrays_of("gray32")), make_generator(arrays_of("gray32"))
    older.version = 5
    strange.class_name = "Generator\x1b[2J"
    for content, said in (
        ({"D": make_discriminator(arrays_of("gray32"))}, r"expected a network G_ema in .*, got D; set --network"),
        ({"G_ema": {"a": 1}}, "got none"),
        ([1], "holds a list"),
        ({"G_ema": older}, "version 5 instead of 6"),
        ({"G_ema": strange}, "without its class"),
    ):
        path = written(tmp_path / "n.pkl", content)
        with pytest.raises(UserError, match=said):
            convert_stylegan2_pickle(path)
    with pytest.raises(UserError, match=r"network must be one of G_ema, G, D, got 'g_ema'"):
        convert_stylegan2_pickle(path, "g_ema")
    with pytest.raises(UserError, match="No such file"):
        convert_stylegan2_pickle(tmp_path / "absent.pkl")
    torch.save({"g_ema": {}}, tmp_path / "r.pt")
    with pytest.raises(UserError, match="a torch file and no pickle"):
        convert_stylegan2_pickle(tmp_path / "r.pt")


@pytest.mark.parametrize("module", ["dnnlib.tflib.network", "tfutil"])
def test_tensorflow_snapshots_are_refused_by_name(tmp_path, module):
    path = tmp_path / "n.pkl"
    path.write_bytes(f"\x80\x03c{module}\nNetwork\n)\x81}}b.".encode("latin-1"))

    with pytest.raises(UserError, match=rf"TensorFlow network \(it names {module}.Network\)"):
        convert_stylegan2_pickle(path)


def test_damaged_files_give_one_line(tmp_path):
    path = make_snapshot(tmp_path / "n.pkl", "gray32")
    whole = path.read_bytes()
    for length in (0, 1, 10, 200, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])

        with pytest.raises(UserError) as caught:
            convert_stylegan2_pickle(path)

        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# hostile files


class Run:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def inner(content: bytes) -> bytes:
    """A tensor's numbers, with this pickle in the place of the storage."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    data = b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps([], 2)
    return b"\x80\x03ctorch.storage\n_load_from_bytes\n" + pickle.dumps(data, 3)[2:-1] + b"\x85R."


def persistent(attributes: object) -> bytes:
    with official_names():
        network = Network("Generator")
        network.state = attributes
        return pickle.dumps({"G_ema": network}, 4)


def persistent_id() -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", "os.system", "0", "cpu", 4) if value is ... else None

    whole = io.BytesIO()
    Pickler(whole, 4).dump({"G_ema": ...})
    return whole.getvalue()


CALLS = {
    "os.system": (lambda mark: pickle.dumps(Run(os.system, f"touch {mark}")), "posix.system"),
    "builtins.eval": (lambda mark: pickle.dumps(Run(eval, f"open({mark!r}, 'w')")), "builtins.eval"),
    "builtins.exec in old names": (
        lambda mark: f"c__builtin__\nexec\n(Vopen({mark!r}, 'w')\ntR.".encode(),
        "__builtin__.exec",
    ),
    "in a network": (lambda mark: persistent({"a": [Run(os.system, f"touch {mark}")]}), "posix.system"),
    "as a key": (lambda mark: persistent({Run(os.system, f"touch {mark}"): 1}), "posix.system"),
    "nested reduce": (lambda mark: pickle.dumps(Run(set, Run(os.system, f"touch {mark}"))), "posix.system"),
    "INST opcode": (lambda mark: f"(Vtouch {mark}\nios\nsystem\n.".encode(), "os.system"),
    "in a tensor's numbers": (lambda mark: inner(pickle.dumps(Run(os.system, f"touch {mark}"), 2)), "posix.system"),
    "eval in a tensor's numbers": (lambda mark: inner(pickle.dumps(Run(eval, f"open({mark!r}, 'w')"), 2)), "eval"),
}


@pytest.mark.parametrize("attack", CALLS)
def test_calls_are_refused_in_one_line_that_names_them_and_not_made(tmp_path, attack):
    mark, path = tmp_path / "mark", tmp_path / "n.pkl"
    make, named = CALLS[attack]
    path.write_bytes(make(str(mark)))

    with pytest.raises(UserError, match=named) as caught:
        convert_stylegan2_pickle(path)

    assert "\n" not in str(caught.value)
    assert "nothing in it was run" in str(caught.value)
    assert not mark.exists()


def test_the_attacks_are_real(tmp_path):
    for attack in ("os.system", "nested reduce", "builtins.eval", "INST opcode", "in a tensor's numbers"):
        mark = tmp_path / attack.replace(" ", "").replace("'", "")
        with contextlib.suppress(Exception):  # what the call returns fits nowhere
            pickle.loads(CALLS[attack][0](str(mark)))
        assert mark.exists(), attack


def short(text: str) -> bytes:
    return b"\x8c" + struct.pack("B", len(text)) + text.encode()


def storage_bytes(data: bytes) -> bytes:
    return b"\x80\x03ctorch.storage\n_load_from_bytes\n" + pickle.dumps(data, 3)[2:-1] + b"\x85R."


def compressed_torch_file() -> bytes:
    saved, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2**18).untyped_storage(), saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return packed.getvalue()


def saved_legacy(content: object) -> bytes:
    whole = io.BytesIO()
    torch.save(content, whole, _use_new_zipfile_serialization=False)
    return whole.getvalue()


def storage_of_a_terabyte() -> bytes:
    head = saved_legacy(torch.zeros(4)._typed_storage())
    return head.replace(b"K\x04", b"\x8a\x06" + (2**40).to_bytes(6, "little"))


HOSTILE = {
    "getattr": b"\x80\x04cbuiltins\ngetattr\n(cbuiltins\nset\nVadd\ntR.",
    "dotted name": b"\x80\x04" + short("collections") + short("OrderedDict.copy") + b"\x93.",
    "dotted name of the rebuilder": b"\x80\x04"
    + short("torch_utils.persistence")
    + short("_reconstruct_persistent_obj.__globals__")
    + b"\x93.",
    "dotted module": b"\x80\x04" + short("torch._utils.os") + short("system") + b"\x93.",
    "torch.load": b"ctorch.serialization\nload\n(Vx\ntR.",
    "line breaks in a name": b"\x80\x04" + short("os\n\x1b[31m") + short("system\nerror: fine") + b"\x93.",
    "changed class": b"ccollections\nOrderedDict\n}Vkeys\ncbuiltins\nset\nsb.",
    "changed rebuilder": b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}V__call__\ncbuiltins\nset\nsb.",
    "changed storages": b"ctorch.storage\n_load_from_bytes\n(N}V_read\n]stb.",
    "changed numpy class": b"cnumpy\ndtype\n}V__new__\ncbuiltins\nset\nsb.",
    "memo of two billions": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "bytes of eight exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.",
    "text of four gigabytes": b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "frame of eight exabytes": b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b"N.",
    "number of two gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "persistent id": persistent_id(),
    "numbers that are no file": storage_bytes(b"numbers"),
    "numbers that are text": b"ctorch.storage\n_load_from_bytes\n(Vx\ntR.",
    "numbers that are a list": storage_bytes(saved_legacy([1, 2])),
    "numbers that are compressed": storage_bytes(compressed_torch_file()),
    "numbers of four terabytes": storage_bytes(storage_of_a_terabyte()),
    "tensor beyond its numbers": b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n("
    + storage_bytes(saved_legacy(torch.zeros(4)._typed_storage()))[2:-1]
    + b"K\x00(J\x00\x00\x00\x10t(K\x00tN}tR.",
    "network of no dictionary": b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(]tR.",
    "network without source": b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}tR.",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_tricks_are_refused_in_one_line(tmp_path, attack):
    path = tmp_path / "n.pkl"
    path.write_bytes(HOSTILE[attack])

    with pytest.raises(UserError, match="nothing in it was run") as caught:
        convert_stylegan2_pickle(path)

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_extension_registry_is_refused_even_when_filled(tmp_path):
    path = tmp_path / "n.pkl"
    path.write_bytes(b"\x80\x02\x82\xf0.")
    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(path.read_bytes())  # now cached: the pickle machine hands it out unasked
        with pytest.raises(UserError, match="extension registry"):
            read_stylegan2_pickle(path)
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()


def test_tensor_larger_than_any_layer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("medgen.convert.stylegan2_pickle.LARGEST_STORAGE", 1000)

    with pytest.raises(UserError, match=r"bytes, more than 1000"):
        convert_stylegan2_pickle(make_snapshot(tmp_path / "n.pkl", "gray32"))


def test_layers_that_stand_in_two_places_at_every_level_are_refused(tmp_path):
    network = Network("Generator")
    for _ in range(60):  # 2^60 layers, in a file of a few kilobytes
        above = Network("Generator")
        above.state["_modules"] |= {"a": network, "b": network}
        network = above

    with pytest.raises(UserError, match="without an end"):
        convert_stylegan2_pickle(written(tmp_path / "n.pkl", {"G_ema": network}))


def test_attribute_that_would_be_endless_in_a_message_is_cut(tmp_path):
    value = ["x"]
    for _ in range(60):  # 2^60 when it is printed
        value = [value, value]

    with pytest.raises(UserError, match="z_dim of Generator") as caught:
        convert_stylegan2_pickle(written(tmp_path / "n.pkl", {"G_ema": broken("", z_dim=value)}))

    assert len(str(caught.value)) < 1000
