"""Captions and labels to arguments of the network: one function for training and sampling, bit for bit."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from safetensors.torch import load_file, save_file

from medgen.data.phantom import write_clip
from medgen.errors import UserError
from medgen.networks import CLIPTextConditioner, LabelConditioner, conditioning, make_conditioner
from medgen.transforms import RandCaptiond, RandDropLabeld

WIDTH = 32
CAPTIONS = ["No pleural effusion.", "Heart size is normal.", "", "Small left pneumothorax.", "No pleural effusion."]
ENTRY_MEGABYTES = 77 * WIDTH * 2 / 2**20  # of one context in float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(out, width=WIDTH)
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def text(folder):
    return CLIPTextConditioner(folder, WIDTH)


@pytest.fixture(scope="module")
def oracle(folder):
    """Tokenizer and text model as transformers gives them."""
    from transformers import CLIPTextModel, CLIPTokenizerFast

    return (
        CLIPTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True),
        CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval(),
    )


def context(conditioner, captions):
    return conditioner(captions)["context"]


def passes(conditioner, monkeypatch):
    """Token ids of each pass over the text model from now on."""
    seen, forward = [], conditioner._model.forward
    monkeypatch.setattr(
        conditioner._model, "forward", lambda input_ids: seen.append(input_ids) or forward(input_ids=input_ids)
    )
    return seen


def test_context_is_the_last_hidden_state_that_transformers_gives(text, oracle):
    tokenizer, model = oracle
    found = context(text, CAPTIONS)

    assert (found.shape, found.dtype) == ((5, 77, WIDTH), torch.float32)
    for row, caption in zip(found, CAPTIONS, strict=True):
        tokens = tokenizer(caption, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model(tokens).last_hidden_state[0]
        assert torch.equal(row, hidden.half().float())


@pytest.mark.parametrize("null_caption", ["empty", "eos"])
def test_null_caption_is_the_same_in_training_and_in_sampling(folder, null_caption):
    training = make_conditioner("text", folder, WIDTH, null_caption)
    sampling = make_conditioner("text", folder, WIDTH, null_caption)
    drop = RandCaptiond(drop_prob=1)
    batch = [drop({"sentences": ["Lungs are clear.", "Normal heart."]})["caption"] for _ in range(2)]

    trained_on = context(training, ["Normal heart.", *batch])[1:]

    assert torch.equal(trained_on, sampling.null(2)["context"])
    assert torch.equal(trained_on, context(sampling, [" ", "\n"]))


def test_empty_null_caption_is_padded_as_the_tokenizer_pads(text, oracle):
    tokenizer, _ = oracle
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert text.tokenize([""]).tolist() == [[start, end] + 75 * [0]]


def test_eos_null_caption_is_that_of_the_published_weights_and_changes_no_other(folder, text, oracle):
    tokenizer, model = oracle
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = tokenizer.convert_tokens_to_ids(["no</w>", "pleural</w>", "effusion</w>", ".</w>"])
    eos = CLIPTextConditioner(folder, WIDTH, null_caption="eos")

    assert eos.tokenize(["", "No pleural effusion."]).tolist() == [
        [start] + 76 * [end],
        [start, *words, end] + 71 * [0],
    ]
    with torch.no_grad():
        hidden = model(torch.tensor([[start] + 76 * [end]])).last_hidden_state
    assert torch.equal(eos.null(1)["context"], hidden.half().float())
    assert not torch.equal(eos.null(1)["context"], text.null(1)["context"])
    assert torch.equal(context(eos, CAPTIONS[:1]), context(text, CAPTIONS[:1]))


@pytest.mark.parametrize("entries", [0, 1, 2, 100])
def test_neither_cache_nor_batch_changes_a_bit(folder, entries):
    fresh = {caption: context(CLIPTextConditioner(folder, WIDTH), [caption])[0] for caption in CAPTIONS}
    text = CLIPTextConditioner(folder, WIDTH, cache_megabytes=entries * ENTRY_MEGABYTES)

    for batch in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[1:3], CAPTIONS):
        assert torch.equal(context(text, batch), torch.stack([fresh[caption] for caption in batch]))


def test_cache_drops_what_was_used_least_recently(folder, monkeypatch):
    text = CLIPTextConditioner(folder, WIDTH, cache_megabytes=2.5 * ENTRY_MEGABYTES)
    seen = passes(text, monkeypatch)
    computed = []
    for batch in (["a", "b"], ["a", "b", "a"], ["a"], ["c"], ["a"], ["b"]):
        before = len(seen)
        text(batch)
        computed.append(len(seen) - before)

    # c takes the place of b, which was last used before a
    assert computed == [2, 0, 0, 1, 0, 1]


def test_batches_of_the_text_model_have_one_size(folder, text, monkeypatch):
    batched = CLIPTextConditioner(folder, WIDTH)
    batched._batch = 3  # as on CUDA, where it is more
    seen = passes(batched, monkeypatch)

    found = context(batched, CAPTIONS)

    assert [len(tokens) for tokens in seen] == [3, 3]
    torch.testing.assert_close(found, context(text, CAPTIONS), rtol=0, atol=2e-3)


def test_gradients_reach_the_network_but_not_the_text_model(text):
    network = DiffusionModelUNet(
        2,
        3,
        3,
        1,
        (8, 16),
        (False, True),
        norm_num_groups=8,
        num_head_channels=16,
        with_conditioning=True,
        cross_attention_dim=WIDTH,
    )
    network.out[-1].conv.weight.data.fill_(0.1)  # starts at zero, and so would every other gradient

    found = context(text, CAPTIONS[:2])
    network(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), context=found).sum().backward()

    assert not found.requires_grad
    to_k = [p.grad for name, p in network.named_parameters() if "attn2.to_k" in name]
    assert to_k
    assert all(grad is not None for grad in to_k)
    assert not text._model.training
    assert not any(p.requires_grad for p in text._model.parameters())


def test_autocast_around_it_changes_nothing(folder):
    inside, outside = CLIPTextConditioner(folder, WIDTH), CLIPTextConditioner(folder, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = context(inside, CAPTIONS)
    assert torch.equal(found, context(outside, CAPTIONS))


def test_prompt_of_300_words_is_cut_off_and_said_so_once(folder, caplog):
    text = CLIPTextConditioner(folder, WIDTH, cache_megabytes=0)
    words = [f"{word}{number}" for number in range(100) for word in ("lung", "heart", "effusion")]
    prompt = " ".join(["normal"] * 70 + ["cardiohepatopathy", "left", "Right\n", *words])[:-1]

    with caplog.at_level(logging.WARNING):
        found = [context(text, [prompt]) for _ in range(2)]
        context(text, ["normal " * 75])

    (record,) = caplog.records
    number = len(text._tokenizer(prompt, verbose=False).input_ids)
    dropped = prompt[prompt.index("pathy") :]
    assert f"reads 77 tokens, the prompt 'normal normal normal normal normal norma'... has {number}: " in record.message
    assert record.message.endswith(f"dropped from its end: {number - 77} tokens, {dropped[:100]!r}...")
    with caplog.at_level(logging.WARNING):
        context(text, [prompt + " again"])
    assert len(caplog.records) == 2
    # what is left is the prompt up to there, the cut word in part
    assert torch.equal(found[0], found[1])
    kept = text._tokenizer.decode(text.tokenize([prompt])[0], skip_special_tokens=True)
    assert (kept + dropped).replace("\n", "").startswith(prompt[:120])


def test_log_is_not_flooded_by_long_reports(folder, caplog, monkeypatch):
    monkeypatch.setattr(conditioning, "MAX_NAMED", 2)
    text = CLIPTextConditioner(folder, WIDTH)
    with caplog.at_level(logging.WARNING):
        context(text, [f"{number} " + "normal " * 90 for number in range(5)])
    assert [record.message[:14] for record in caplog.records] == ["the text model", "the text model", "2 prompts were"]


def test_nothing_is_asked_of_the_network(folder, monkeypatch):
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    context(CLIPTextConditioner(folder, WIDTH), CAPTIONS)
    with pytest.raises(UserError, match="nothing is downloaded"):
        CLIPTextConditioner("stabilityai/stable-diffusion-2-1-base", WIDTH)
    assert not asked


def test_plain_folder_with_the_tokenizer_beside_the_weights(folder, text, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder / "text_encoder", plain)
    shutil.copytree(folder / "tokenizer", plain, dirs_exist_ok=True)
    found = CLIPTextConditioner(plain, WIDTH)
    assert torch.equal(context(found, CAPTIONS), context(text, CAPTIONS))
    assert found.fingerprint == text.fingerprint


def test_tokenizer_in_one_file(copy, text, oracle):
    shutil.rmtree(copy / "tokenizer")
    oracle[0].save_pretrained(copy / "tokenizer")
    assert (copy / "tokenizer" / "tokenizer.json").is_file()
    assert torch.equal(context(CLIPTextConditioner(copy, WIDTH), CAPTIONS), context(text, CAPTIONS))


def replace_by_bin(copy):
    weights = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    return weights.with_name("pytorch_model.bin")


def test_bin_of_plain_weights_is_read(copy, text):
    replace_by_bin(copy)
    assert torch.equal(context(CLIPTextConditioner(copy, WIDTH), CAPTIONS), context(text, CAPTIONS))


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickle_in_a_bin_is_refused_and_not_run(copy, tmp_path, save):
    save({"text_model.final_layer_norm.weight": Attack(tmp_path / "ran")}, replace_by_bin(copy))
    with pytest.raises(UserError, match="not a file of plain weights"):
        CLIPTextConditioner(copy, WIDTH)
    assert not (tmp_path / "ran").exists()


def edit_weights(copy, change):
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(copy, **changes):
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_tokens(copy):
    def change(weights):
        name = "text_model.embeddings.token_embedding.weight"
        weights[name] = weights[name][:100].clone()

    edit_weights(copy, change)
    edit_config(copy, vocab_size=100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: shutil.rmtree(copy), "no text model at .*copy; name with --text_encoder"),
        (lambda copy: shutil.rmtree(copy / "tokenizer"), "no tokenizer .* in .*tokenizer; name with --text_encoder"),
        (lambda copy: (copy / "tokenizer" / "merges.txt").unlink(), "no tokenizer"),
        (lambda copy: (copy / "tokenizer" / "vocab.json").write_text("{"), "no tokenizer that can be read"),
        (lambda copy: (copy / "text_encoder" / "model.safetensors").unlink(), "no weights .* in .*text_encoder"),
        (lambda copy: (copy / "text_encoder" / "config.json").unlink(), "no config.json of a CLIP text model"),
        *(
            (
                lambda copy, text=text: (copy / "text_encoder" / "config.json").write_text(text),
                "no config.json of a CLIP text model",
            )
            for text in ("{", "", "[1]", '{"hidden_size": "32"}', '{"hidden_size": 32, "num_attention_heads": 0}')
        ),
        (
            lambda copy: edit_config(copy, num_hidden_layers=1),
            "holds 16 weights that the config.json beside it has no place for, among them encoder.layers.1",
        ),
        (
            lambda copy: (copy / "text_encoder" / "model.safetensors").write_bytes(b"short"),
            "not a file of plain weights",
        ),
        (
            lambda copy: edit_weights(copy, lambda weights: weights.pop("text_model.final_layer_norm.bias")),
            "lacks 1 of the text model's weights, among them final_layer_norm.bias",
        ),
        (remove_tokens, r"has \d+ tokens, the text model in .* 100; take both from the same model"),
    ],
)
def test_damaged_folder_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        CLIPTextConditioner(copy, WIDTH)
    assert "\n" not in str(caught.value)


def test_inner_folder_is_answered_with_the_outer_one(folder):
    with pytest.raises(UserError, match="the folder that holds both text_encoder/ and tokenizer/"):
        CLIPTextConditioner(folder / "text_encoder", WIDTH)


def test_text_model_of_another_width_is_refused(folder):
    with pytest.raises(UserError, match=r"is 32 wide, but --context_dim is 1024; set --context_dim 32"):
        make_conditioner("text", folder)


@pytest.mark.parametrize("captions", ["one text", [None], [3]])
def test_what_is_no_list_of_texts_is_refused(text, captions):
    with pytest.raises(UserError, match="captions must be a list of texts"):
        text(captions)


def test_fingerprint_tells_text_models_and_null_captions_apart(folder, copy, text):
    assert CLIPTextConditioner(copy, WIDTH).fingerprint == text.fingerprint
    eos = CLIPTextConditioner(folder, WIDTH, null_caption="eos").fingerprint
    edit_weights(copy, lambda weights: weights["text_model.final_layer_norm.bias"].add_(1e-3))
    retrained = CLIPTextConditioner(copy, WIDTH).fingerprint

    assert len({text.fingerprint, eos, retrained}) == 3
    assert "null_caption=eos" in eos
    assert eos.split()[:4] == text.fingerprint.split()[:4]


@pytest.mark.parametrize("change", [{"hidden_act": "quick_gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 0.1}])
def test_fingerprint_tells_architectures_apart(copy, text, change):
    edit_config(copy, **change)
    other = CLIPTextConditioner(copy, WIDTH)
    assert not torch.equal(context(other, CAPTIONS[:1]), context(text, CAPTIONS[:1]))
    assert other.fingerprint != text.fingerprint


def test_fingerprint_tells_merges_apart(copy, text):
    path = copy / "tokenizer" / "merges.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:50]) + "\n")
    other = CLIPTextConditioner(copy, WIDTH)
    assert not torch.equal(other.tokenize(CAPTIONS[:1]), text.tokenize(CAPTIONS[:1]))
    assert other.fingerprint != text.fingerprint


def test_position_ids_of_older_files_do_not_matter(copy, text):
    edit_weights(copy, lambda weights: weights.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    assert torch.equal(context(CLIPTextConditioner(copy, WIDTH), CAPTIONS), context(text, CAPTIONS))


def test_no_captions_have_an_empty_context(text):
    assert context(text, []).shape == (0, 77, WIDTH)


@pytest.mark.parametrize("width", ["32", 32.0, True, 0])
def test_width_that_is_no_whole_number_is_refused(folder, width):
    with pytest.raises(UserError, match="--context_dim must be a whole number of at least 1, got"):
        CLIPTextConditioner(folder, width)


def test_fingerprint_tells_paddings_apart(copy, text):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = copy / "tokenizer" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|endoftext|>"}))
    padded = CLIPTextConditioner(copy, WIDTH)
    assert padded.tokenize([""])[0, -1] == padded._tokenizer.eos_token_id
    assert padded.fingerprint != text.fingerprint


def test_labels_become_indices_and_no_label_the_last():
    label = make_conditioner("label", num_classes=3)
    for given in ([0, 2, None, 3], torch.tensor([0, 2, 3, 3])):
        found = label(given)["class_labels"]
        assert found.dtype == torch.long
        assert found.tolist() == [0, 2, 3, 3]
    dropped = RandDropLabeld("label", num_classes=3, drop_prob=1)({"label": 1})["label"]
    assert torch.equal(label([dropped] * 2)["class_labels"], label.null(2)["class_labels"])
    assert label.fingerprint != LabelConditioner(4).fingerprint


@pytest.mark.parametrize("labels", [[-1], [4], [1.5], ["edema"], torch.tensor([0, 7])])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(
        UserError, match=r"labels must be whole numbers from 0 to 2, or 3 for none, got .*--num_classes"
    ):
        LabelConditioner(3)(labels)


def test_no_conditioning_is_none():
    assert make_conditioner("none") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditioning": "image"}, "--conditioning must be one of none, label, text, got 'image'"),
        ({"conditioning": None}, "--conditioning must be one of none, label, text, got None"),
        ({"conditioning": "text"}, "--conditioning text needs --text_encoder"),
        ({"conditioning": "text", "text_encoder": "x", "null_caption": "bos"}, "--null_caption must be empty or eos"),
        ({"conditioning": "label"}, "--num_classes must be at least 1 to condition on labels, got 0"),
    ],
)
def test_wrong_settings_name_themselves(settings, message):
    with pytest.raises(UserError, match=message):
        make_conditioner(**settings)


def test_importing_it_imports_no_transformers():
    # by its path: the package imports MONAI, which imports transformers itself
    code = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('conditioning', {conditioning.__file__!r})\n"
        "spec.loader.exec_module(u.module_from_spec(spec))\n"
        "sys.exit('transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
