"""A CLIP text model of a few thousand random weights, in the folder layout of Stable Diffusion 2.1 base."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medgen import __version__
from medgen.errors import UserError

__all__ = ["write_clip"]

MANIFEST = "phantom.json"
CONTEXT_TOKENS = 77
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"  # "!" is token 0, with which Stable Diffusion 2 pads
END_OF_WORD = "</w>"

# One token each, so that a report of a few sentences stays below 77
WORDS = """
a acute after air airspace all an and angle angles anterior aorta aortic apical are area areas arthroplasty as
aspiration asymmetric at atelectasis atelectatic atherosclerotic atrium background base bases basilar be been below
bibasilar bilateral bilaterally blunting blunts blurred bone bones bony borderline both bronchovascular but by
calcification calcifications calcified cardiac cardiomediastinal cardiomediastinum cardiomegaly cardiopulmonary catheter
cavity central changes chest chf chronic clavicle clear clips cm compared comparison compression concerning
configuration congestion congestive consistent consolidation consolidations contour contours contrast costophrenic cough
could crowding ct defined degenerative demonstrate demonstrated demonstrates dense density device devices diaphragm
diaphragmatic diffuse disease displaced dual due edema effusion effusions elevated elevation emphysema emphysematous end
endotracheal enlarged enlargement enteric evaluation evidence examination exclude excluded exclusion existing extending
failure fever fibrosis field film final finding findings fluid focal for fracture fractures free frontal gas given
grossly half has have heart hemidiaphragm hemithorax hernia hiatal high hila hilar hilum hyperinflated hyperinflation
identified image imaging impression in increased increasing indication infection infectious infiltrate interim internal
interstitial interval into intubated is it jugular large lateral layering lead leads left lesion lesions lies likely
limits line linear lines lingula lobe lobes lobulated location low lower lung lungs major margins mass masses may
measures median mediastinal mediastinum mid mild mildly minimal minor moderate moderately more multifocal multiple new
no node nodes nodular nodule nodules normal not noted obscuring obtained of older on one opacification opacified
opacities opacity or osseous other over overload overlying pa pacemaker parenchymal patchy patient pericardial perihilar
peripheral persistent picc place placement plate platelike pleural pneumonia pneumonic pneumothoraces pneumothorax port
portable position positioned possible post posterior predominantly present previous previously prior probable probably
process projecting projects prominence prominent pulmonary radiograph radiographs recent recommended region related
remain remains represent resolved retrocardiac rib ribs right rotated round rounded scar scarring scoliosis seen semi
setting severe severely shadow shift shoulder side silhouette since sinus size slight slightly small soft spine stable
status sternal sternotomy structures study subclavian subcutaneous subsegmental subtle suggest suggesting suggestive
superimposed superior support surgical suspected technique terminates than that the there thickening this thoracic
thorax tip tissue tissues to top tortuous trace trachea tracheostomy tube tubes two unchanged under underlying
unremarkable upper upright vague valve vascular vasculature vena venous vertebral vessels view views visible visualized
volume volumes well were which wide widened widening wider wires with within without worsened worsening xray . , : ; - (
) / ? 1 2 3 4 5 6 7 8 9 0
""".split()


def write_clip(
    folder: Path, width: int = 32, layers: int = 2, heads: int = 2, seed: int = 0, force: bool = False
) -> list[str]:
    """Write a CLIP text model with random weights and its tokenizer, for demonstration and tests only.

    A transformer that was never trained is still a fixed function that tells captions apart, which is enough to train
    a small text-conditioned model on; but it knows no synonyms, and captions of similar meaning lie no closer than
    others. For anything else take the text model of Stable Diffusion 2.1 base. The same arguments write the same bytes.

    Args:
        folder: what to write, with ``text_encoder/`` (safetensors) and ``tokenizer/`` in it; new, empty, or made by
            this function.
        width: of the token vectors, the ``context_dim`` of the network that is conditioned on them.
        layers: transformer blocks.
        heads: attention heads of a block.
        seed: of the weights.
        force: replace a model of other arguments.

    Returns:
        what was made and how to name it, one line each.

    Raises:
        UserError: a number is out of range, or ``folder`` holds something else.
    """
    for name, value, low in (("width", width, 8), ("layers", layers, 1), ("heads", heads, 1), ("seed", seed, 0)):
        if value < low:
            raise UserError(f"{name} must be at least {low}, got {value}; change --{name}")
    if width % heads:
        raise UserError(f"width must be a multiple of the {heads} attention heads, got {width}; change --width")

    from safetensors.numpy import save_file

    sizes = {"width": width, "layers": layers, "heads": heads, "seed": seed}
    vocabulary, merges = _byte_pairs(WORDS)
    weights = _random_weights(len(vocabulary), width, layers, seed)
    try:
        _claim(folder, {"made_by": "medgen phantom", "version": __version__, "layout": "clip", **sizes}, force)
        for part in ("text_encoder", "tokenizer"):
            (folder / part).mkdir(exist_ok=True)
        _write_json(folder / "text_encoder" / "config.json", _config(vocabulary, width, layers, heads))
        save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "tokenizer" / "vocab.json", vocabulary)
        lines = ["#version: 0.2", *map(" ".join, merges)]
        _write_text(folder / "tokenizer" / "merges.txt", "\n".join(lines) + "\n")
        special = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": END}
        _write_json(folder / "tokenizer" / "special_tokens_map.json", special)
        _write_json(
            folder / "tokenizer" / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT_TOKENS, "do_lower_case": True, **special},
        )
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"expected to write {where}, got {error.strerror or error}; choose another folder") from error
    number = sum(array.size for array in weights.values())
    return [
        f"wrote a CLIP text model of {number} random weights, for demonstration and tests only: {folder}",
        f"next: --conditioning text --text_encoder {shlex.quote(str(folder))} --context_dim {width}",
    ]


def _claim(folder: Path, manifest: dict[str, Any], force: bool) -> None:
    """Make the folder, or see that what is in it may be replaced: a real text model is a long download."""
    path = folder / MANIFEST
    if folder.is_dir() and any(folder.iterdir()):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            made = None
        if not isinstance(made, dict) or made.get("layout") != "clip":
            raise UserError(
                f"OUT must be new or empty, got {folder} with files of another origin; choose another folder"
            )
        if made != manifest and not force:
            raise UserError(
                f"{folder} holds a CLIP phantom made with other options; choose another folder, or give --force to "
                "replace it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, manifest)


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding in which each word is one token: vocabulary and merges, in CLIP's order.

    Sennrich et al. 2016, arXiv 1508.07909, algorithm 1, with every word counted once and run to its end.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    parts = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while pairs := Counter(pair for word in parts for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in parts:
            index = 0
            while index < len(word) - 1:
                if (word[index], word[index + 1]) == best:
                    word[index : index + 2] = ["".join(best)]
                index += 1
    letters = sorted(ByteLevel.alphabet())  # CLIP's order: printable bytes first, "!" being the first of them
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _config(vocabulary: dict[str, int], width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT_TOKENS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[PAD],
    }


def _random_weights(vocabulary: int, width: int, layers: int, seed: int) -> dict[str, np.ndarray]:
    """Weights that keep the variance of what they are applied to, under the names of the published model.

    The published initialisation (deviation 0.02) would leave a text model that was never trained with vectors in which
    a token's neighbours hardly show.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        deviation = np.float32(inputs**-0.5)
        weights[f"text_model.{name}.weight"] = deviation * rng.standard_normal((outputs, inputs), dtype=np.float32)
        weights[f"text_model.{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name: str) -> None:
        weights[f"text_model.{name}.weight"] = np.ones(width, np.float32)
        weights[f"text_model.{name}.bias"] = np.zeros(width, np.float32)

    for name, rows in (("token", vocabulary), ("position", CONTEXT_TOKENS)):
        table = rng.standard_normal((rows, width), dtype=np.float32)
        weights[f"text_model.embeddings.{name}_embedding.weight"] = table
    for layer in range(layers):
        block = f"encoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{block}.self_attn.{name}", width, width)
        linear(f"{block}.mlp.fc1", width, 4 * width)
        linear(f"{block}.mlp.fc2", 4 * width, width)
        norm(f"{block}.layer_norm1")
        norm(f"{block}.layer_norm2")
    norm("final_layer_norm")
    return weights


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
