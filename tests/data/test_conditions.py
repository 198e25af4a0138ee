"""Prompts of the command line, a file and a datalist; masks of a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fire.parser import DefaultParseValue

from medgen.data import as_text, check_captions, check_prompts, load_prompts, prompts_line, with_masks, write_datalist
from medgen.errors import UserError


@pytest.mark.parametrize(
    "typed",
    [
        "No acute cardiopulmonary process.",
        "heart enlarged, small effusion",
        "pneumonia",
        "edema, effusion, 3",
        "3",
        "It's the patient's left lung",
        "Herzschatten vergrößert",
    ],
)
def test_prompt_is_what_was_typed_on_the_command_line(typed):
    assert as_text(DefaultParseValue(typed), "prompt") == typed


def test_no_prompt_is_empty():
    assert as_text(None, "negative_prompt") == ""
    assert load_prompts() == []
    assert load_prompts(prompt="") == []


@pytest.mark.parametrize(
    ("prompts", "negative", "expected"),
    [
        ([], "", "no prompt: images of the empty caption"),
        (["edema"], "", "1 prompt: 'edema'"),
        (["a", "b", "c"], "d", "3 prompts: 'a', 'b', 'c'; negative prompt 'd'"),
        (list("abcde"), "", "5 prompts: 'a', 'b', 'c' and 2 more"),
        (["e" * 201], "", f"1 prompt: {'e' * 200!r}..."),
    ],
)
def test_prompts_are_shown_before_images_are_made(prompts, negative, expected):
    assert prompts_line(prompts, negative) == expected


def test_what_the_command_line_made_of_a_prompt_is_shown():
    found = [prompts_line(load_prompts(DefaultParseValue(typed))) for typed in ("1e3", "None", "'quoted'")]
    assert found == ["1 prompt: '1000.0'", "no prompt: images of the empty caption", "1 prompt: 'quoted'"]


@pytest.mark.parametrize("parsed", [True, {"heart": "large"}, ["a"], ("a", ("b",))])
def test_what_the_command_line_has_made_something_else_of_is_refused(parsed):
    with pytest.raises(UserError, match=r"prompt must be a text, got .*; put it in quotes within quotes"):
        as_text(parsed, "prompt")


def test_prompts_of_a_file_are_its_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffPleuraerguß links.\r\n\r\n  Clear lungs. \n".encode())

    assert load_prompts(prompts=file) == ["Pleuraerguß links.", "Clear lungs."]
    assert load_prompts(prompts=str(file)) == ["Pleuraerguß links.", "Clear lungs."]
    assert load_prompts(prompts=["a", "b"]) == ["a", "b"]


def test_prompts_of_a_datalist_are_the_captions_of_its_validation(tmp_path):
    items = [
        {"image": "a.png", "patient": "a", "sentences": ["One.", "Two.", "Three."]},
        {"image": "b.png", "patient": "b", "text": "A text."},
        {"image": "c.png", "patient": "c"},
    ]
    write_datalist(
        tmp_path / "datalist.json", "x", "X-ray", {"test": items, "training": [{"image": "d.png", "patient": "d"}]}
    )

    datalist = tmp_path / "datalist.json"
    assert load_prompts(datalist=datalist, max_sentences=2) == ["One. Two.", "A text.", ""]
    with pytest.raises(UserError, match=r"no item of split training in .* has sentences or a text"):
        load_prompts(datalist=datalist, split="training")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Pleuraerguß".encode("latin-1"), "in UTF-8, got .*, which is none"),
        (b"\n \n", "a prompt on each line, got .* without any"),
        (None, r"\(No such file or directory\); name a single prompt with --prompt"),
    ],
)
def test_file_that_holds_no_prompts_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)

    with pytest.raises(UserError, match=message):
        load_prompts(prompts=tmp_path / "prompts.txt")


def test_prompts_come_from_one_place():
    with pytest.raises(UserError, match="prompts come from one place, got prompt and prompts"):
        load_prompts(prompt="a", prompts=["b"])
    with pytest.raises(UserError, match="a prompt must have words in it"):
        load_prompts(prompts=["a", " "])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", ["pneumonia"]), "conditioned on text, got 'pneumonia' for --conditioning none"),
        (("label", [], "edema"), "got 'edema' for --conditioning label"),
        (("text", [], "edema"), "negative_prompt needs a prompt to guide away from it"),
    ],
)
def test_conditions_that_a_network_cannot_take_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        check_prompts(*arguments)


def test_conditions_that_fit_pass():
    check_prompts("text", ["a"], "b")
    check_prompts("text", [])
    check_prompts("label", [])
    check_prompts("none", [])


def test_masks_are_found_by_the_names_of_the_images(tmp_path):
    for name in ("a.dcm", "p/b.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    for name in ("a.png", "p/b.png"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "masks" / name).touch()
    items = [{"image": str(tmp_path / "images" / name)} for name in ("a.dcm", "p/b.png")]

    found = with_masks(items, tmp_path / "images", tmp_path / "masks")

    assert [item["mask"] for item in found] == [str(tmp_path / "masks" / name) for name in ("a.png", "p/b.png")]
    assert "mask" not in items[0]
    (tmp_path / "masks" / "a.tif").touch()
    with pytest.raises(UserError, match=r"must hold one mask a\.\* for .*a\.dcm, got .*a\.png, .*a\.tif"):
        with_masks(items, tmp_path / "images", tmp_path / "masks")
    with pytest.raises(UserError, match=r"takes a mask for each image, got none for .*a\.dcm \(2 of 2\)"):
        with_masks(items, tmp_path / "images", None)


def test_import_needs_no_framework():
    code = "import sys, medgen.data.conditions, medgen.data.synthetic_set; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_text_is_not_learned_from_images_without_any():
    items = [{"image": "a.png", "sentences": []}, {"image": "b.png", "text": ""}]
    check_captions("none", items, "list.json")
    with pytest.raises(UserError, match=r"no item of the training split of list\.json .* add 'configs/unconditional"):
        check_captions("text", items, "list.json")
    check_captions("text", [*items, {"image": "c.png", "text": "Clear lungs."}], "list.json")
