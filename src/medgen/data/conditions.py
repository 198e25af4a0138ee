"""What images are generated from: prompts, and masks of what is to be painted anew."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen.data.datalist import file_stem, list_files, load_datalist
from medgen.errors import UserError

__all__ = ["as_text", "check_captions", "check_prompts", "load_prompts", "prompts_line", "with_masks"]

SHOWN = 3  # prompts that a run names as it begins
CHARACTERS = 200  # of each of them


def as_text(text: Any, name: str) -> str:
    """A prompt as it was typed.

    The command line takes ``heart enlarged, small effusion`` for a tuple of two, and ``3`` for a number: their parts
    are put together again. Not all comes back: of ``1e3`` there is left ``1000.0``, of ``None`` nothing.
    :func:`prompts_line` shows what there is.

    Args:
        text: the prompt; None is empty.
        name: of the setting, for the message.

    Raises:
        UserError: a command line that cannot be put together again.
    """
    if text is None:
        return ""
    if isinstance(text, tuple) and all(isinstance(part, str | int | float) for part in text):
        return ", ".join(map(str, text))
    if isinstance(text, str | int | float) and not isinstance(text, bool):
        return str(text).strip()
    raise UserError(f"{name} must be a text, got {text!r}; put it in quotes within quotes, such as --{name} '\"...\"'")


def load_prompts(
    prompt: Any = None,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    datalist: str | os.PathLike[str] | None = None,
    split: str = "test",
    max_sentences: int = 5,
) -> list[str]:
    """Prompts of the command line, a file or a datalist.

    Args:
        prompt: one text.
        prompts: text file in UTF-8 with a prompt on each line (empty lines are passed over), or a list.
        datalist: whose items' captions are the prompts, those of the validation: the first sentences, or the text.
        split: of the datalist.
        max_sentences: of a caption.

    Returns:
        The prompts; none where all three are None.

    Raises:
        UserError: more than one of the three, a file that cannot be read, or nothing in it.
    """
    given = {
        name: value
        for name, value in {"prompt": prompt, "prompts": prompts, "prompt_datalist": datalist}.items()
        if value not in (None, "")
    }
    if len(given) > 1:
        raise UserError(f"prompts come from one place, got {' and '.join(given)}; leave out all but one of them")
    if "prompt" in given:
        found = [as_text(prompt, "prompt")]
    elif datalist:
        from medgen.transforms import Captiond  # here, since this package must import neither torch nor MONAI

        caption = Captiond(max_sentences=max_sentences)
        items = load_datalist(datalist, split, require_files=False)
        found = [caption(item)["caption"] for item in items]
        if not any(found):
            raise UserError(f"no item of split {split} in {datalist} has sentences or a text; name another --split")
        return found
    elif isinstance(prompts, str | os.PathLike):
        found = _read_lines(Path(prompts))
    else:
        found = [as_text(text, "prompts") for text in prompts or ()]
    if given and not all(found):
        raise UserError("a prompt must have words in it, got an empty one; leave it out for images without a prompt")
    return found


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"prompts must be a text file in UTF-8, got {path}, which is none; save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"prompts must be a text file with a prompt on each line, got {path} ({error.strerror}); name a single "
            "prompt with --prompt"
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"prompts must be a text file with a prompt on each line, got {path} without any")
    return found


def prompts_line(prompts: Sequence[str], negative_prompt: str = "") -> str:
    """What images will be of, for the user to compare with what was typed.

    Args:
        prompts: of the images.
        negative_prompt: what the guidance leads away from.

    Returns:
        A line with the first prompts and how many there are.
    """
    if not prompts:
        return "no prompt: images of the empty caption"
    more = f" and {len(prompts) - SHOWN:,} more" if len(prompts) > SHOWN else ""
    negative = f"; negative prompt {_quoted(negative_prompt)}" if negative_prompt else ""
    plural = "s" if len(prompts) > 1 else ""
    return f"{len(prompts):,} prompt{plural}: {', '.join(map(_quoted, prompts[:SHOWN]))}{more}{negative}"


def _quoted(prompt: str) -> str:
    return repr(prompt[:CHARACTERS]) + ("..." if len(prompt) > CHARACTERS else "")


def check_prompts(conditioning: str, prompts: Sequence[str], negative_prompt: str = "") -> None:
    """See that prompts fit what a network is conditioned on.

    Args:
        conditioning: ``none``, ``label`` or ``text``.
        prompts: of the images.
        negative_prompt: what the guidance leads away from.

    Raises:
        UserError: they do not.
    """
    if conditioning != "text" and (any(prompts) or negative_prompt):
        raise UserError(
            f"prompts are for a network that is conditioned on text, got {(*prompts, negative_prompt)[0]!r:.60} for "
            f"--conditioning {conditioning}; leave prompt, prompts, prompt_datalist and negative_prompt out"
        )
    if negative_prompt and not prompts:
        raise UserError("negative_prompt needs a prompt to guide away from it, got none; set --prompt")


def check_captions(conditioning: str, items: Sequence[Mapping[str, Any]], datalist: str | os.PathLike[str]) -> None:
    """See that a network of text has text to learn from: without any, it would learn the empty caption.

    Args:
        conditioning: ``text``, or another, of which nothing is asked.
        items: of the training split.
        datalist: where they come from, for the message.

    Raises:
        UserError: no item has ``sentences`` or a ``text``.
    """
    if conditioning == "text" and not any(item.get("sentences") or item.get("text") for item in items):
        raise UserError(
            f"no item of the training split of {datalist} has sentences or a text; run preprocessing.mimic_cxr "
            "sentences, or train without text: add 'configs/unconditional.json' to --config_file"
        )


def with_masks(
    items: Sequence[Mapping[str, Any]], data_root: str | os.PathLike[str], mask_dir: str | os.PathLike[str] | None
) -> list[dict[str, Any]]:
    """Items with the masks of what is to be painted anew.

    Args:
        items: with ``image``; where there is no ``mask_dir``, with ``mask``, too.
        data_root: folder of the images.
        mask_dir: folder whose masks are named like the images below ``data_root``, of any suffix; None: the items'
            own masks.

    Returns:
        Copies of the items with ``mask``.

    Raises:
        UserError: an image has no mask, or two.
    """
    if mask_dir is None:
        missing = [item["image"] for item in items if not item.get("mask")]
        if missing:
            raise UserError(
                f"inpainting takes a mask for each image, got none for {missing[0]} ({len(missing)} of {len(items)}); "
                "name a folder with --mask_dir, or leave out --inpaint"
            )
        return [dict(item) for item in items]
    masks: dict[str, list[str]] = {}
    for file in list_files(mask_dir):
        masks.setdefault(_stem(file), []).append(os.path.join(mask_dir, file))
    paired = []
    for item in items:
        stem = _stem(os.path.relpath(item["image"], data_root).replace(os.sep, "/"))
        found = masks.get(stem, [])
        if len(found) != 1:
            got = ", ".join(found) or "none"
            raise UserError(
                f"mask_dir must hold one mask {stem}.* for {item['image']}, got {got}; name another --mask_dir"
            )
        paired.append({**item, "mask": found[0]})
    return paired


def _stem(path: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{file_stem(path)}"
