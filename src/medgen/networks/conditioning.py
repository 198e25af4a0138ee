"""What a diffusion model is conditioned on: captions through a frozen CLIP text model, or labels."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medgen.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizerFast

__all__ = ["CLIPTextConditioner", "LabelConditioner", "make_conditioner"]

_logger = logging.getLogger(__name__)

CONDITIONINGS = ("none", "label", "text")
NULL_CAPTIONS = ("empty", "eos")
CONTEXT_DTYPE = torch.float16  # what the cache holds; 11 significant bits, where autocast to bf16 keeps 8
CUDA_BATCH = 32  # captions of one pass over the text model
MAX_NAMED = 100  # prompts whose truncation is spelled out
SHOWN = 100  # characters of what was cut off
# Of config.json, what decides the last hidden state beside the weights
ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)


class CLIPTextConditioner:
    """Captions to the token vectors of a frozen CLIP text model, the context of a network's cross-attention.

    The context is the text model's last hidden state, its final layer norm included, over all its positions (77 in
    Stable Diffusion 2.1 base), without attention mask. The same caption always gives the same bits, whatever batch it
    comes in and whether or not it was computed before: on the CPU captions pass the text model one at a time, on CUDA
    in batches filled up to one fixed size, and all are rounded to what the cache holds.

    On the CPU the text model computes in float32, on CUDA in float16, autocast or not; never with gradients. It is no
    submodule of anything and has nothing to be trained or saved: :attr:`fingerprint` is what a checkpoint needs.

    Args:
        folder: local folder with ``text_encoder`` and ``tokenizer`` in it (the layout of Stable Diffusion), or of a
            CLIP text model with its tokenizer's files beside the weights. Nothing is ever downloaded. Weights are read
            from ``model.safetensors``, or else from ``pytorch_model.bin`` with ``weights_only=True``.
        context_dim: width that the network's cross-attention takes.
        null_caption: what stands for the empty caption, in training and in sampling alike: "empty" (the tokenised ""
            in the tokenizer's own padding, which is token 0 in Stable Diffusion 2) or "eos" (start, then end tokens,
            which the weights of generative_chestxray were trained with).
        device: where to compute, and to keep what was computed.
        cache_megabytes: of the contexts kept, those used last; 0 keeps none.

    Raises:
        UserError: the folder, the tokenizer or the weights are missing, damaged or of another width.
    """

    key = "caption"

    def __init__(
        self,
        folder: str | Path,
        context_dim: int = 1024,
        null_caption: str = "empty",
        device: str | torch.device = "cpu",
        cache_megabytes: float = 512,
    ) -> None:
        if null_caption not in NULL_CAPTIONS:
            raise UserError(f"--null_caption must be {' or '.join(NULL_CAPTIONS)}, got {null_caption!r}")
        if type(context_dim) is not int or context_dim < 1:
            raise UserError(f"--context_dim must be a whole number of at least 1, got {context_dim!r}")
        self.null_caption = null_caption
        self.device = torch.device(device)
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._named: set[str] = set()
        # One size, since a matrix product of another shape may round otherwise. A single caption keeps a core busy.
        self._batch = CUDA_BATCH if self.device.type == "cuda" else 1

        encoder, tokenizer = _find_parts(Path(folder))
        self._weights = _find_weights(encoder)
        width = _hidden_size(encoder)
        if width != context_dim:
            raise UserError(
                f"the text model in {encoder} is {width} wide, but --context_dim is {context_dim}; set --context_dim "
                f"{width}, or name with --text_encoder the one that the network was trained with"
            )
        self._tokenizer = _load_tokenizer(tokenizer)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        model = _load_text_model(self._weights, dtype)
        if len(self._tokenizer) > model.config.vocab_size:
            raise UserError(
                f"the tokenizer in {tokenizer} has {len(self._tokenizer)} tokens, the text model in {encoder} "
                f"{model.config.vocab_size}; take both from the same model"
            )
        self._model = model.eval().requires_grad_(False).to(self.device)
        self.max_tokens: int = model.config.max_position_embeddings
        self._cache_entries = int(cache_megabytes * 2**20 / (self.max_tokens * width * CONTEXT_DTYPE.itemsize))

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Context of captions.

        Args:
            captions: B texts; "" (or blank) is the null caption. What goes beyond ``max_tokens`` is cut off, with a
                warning that names it.

        Returns:
            ``{"context": (B, max_tokens, context_dim)}``, float32 on the device; of no captions, B is 0.

        Raises:
            UserError: what was given is not a list of texts.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"captions must be a list of texts, got {captions!r}; write [] around a single one")
        captions = [caption.strip() for caption in captions]
        contexts = {caption: self._cache[caption] for caption in captions if caption in self._cache}
        with torch.autocast(self.device.type, enabled=False):
            contexts |= self._compute([caption for caption in dict.fromkeys(captions) if caption not in contexts])
            empty = torch.empty(0, self.max_tokens, self._model.config.hidden_size, device=self.device)
            stacked = torch.stack([contexts[caption] for caption in captions]).float() if captions else empty
        for caption, context in contexts.items():
            self._cache[caption] = context
            self._cache.move_to_end(caption)
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)
        return {"context": stacked}

    def null(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Context of ``batch_size`` empty captions, by the same way as any other."""
        return self([""] * batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """Weights, architecture, tokenizer and null caption in a line: equal where captions give the same contexts."""
        with open(self._weights, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        architecture = _sha256({name: getattr(self._model.config, name) for name in ARCHITECTURE})
        # pairs of texts, or texts with a space in between, by the version of tokenizers
        merges = json.loads(self._tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        tokenizer = _sha256([sorted(self._tokenizer.get_vocab().items()), merges])
        null = " ".join(map(str, self.tokenize([""])[0, :3].tolist()))
        return (
            f"text weights={weights[:16]} architecture={architecture[:16]} tokenizer={tokenizer[:16]} "
            f"null_caption={self.null_caption} ({null} ...)"
        )

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids of captions, (B, max_tokens): start, tokens, end, padding; those of the null caption for ""."""
        rows = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).input_ids
        for row, caption in zip(rows, captions, strict=True):
            if not caption and self.null_caption == "eos":
                row[0], row[1:] = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
            elif row[-1] == self._tokenizer.eos_token_id:  # no room left: perhaps for more than there was
                self._say_if_truncated(caption)
        return rows

    def _say_if_truncated(self, caption: str) -> None:
        full = self._tokenizer(caption, return_offsets_mapping=True, verbose=False)
        number = len(full["input_ids"])
        if number <= self.max_tokens or caption in self._named or len(self._named) >= MAX_NAMED:
            return
        self._named.add(caption)
        # the last place is the end token's, so the first token left out is the one that would have stood there
        dropped = caption[full["offset_mapping"][self.max_tokens - 1][0] :]
        _logger.warning(
            "the text model reads %d tokens, the prompt %r... has %d: dropped from its end: %d tokens, %r%s",
            self.max_tokens,
            caption[:40],
            number,
            number - self.max_tokens,
            dropped[:SHOWN],
            "..." if len(dropped) > SHOWN else "",
        )
        if len(self._named) == MAX_NAMED:
            _logger.warning("%d prompts were truncated so far; no more are named", MAX_NAMED)

    @torch.no_grad()
    def _compute(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Contexts of different captions, each (max_tokens, context_dim) in the cache's type."""
        contexts = {}
        for start in range(0, len(captions), self._batch):
            part = captions[start : start + self._batch]
            tokens = self.tokenize([*part, *[""] * (self._batch - len(part))]).to(self.device)
            hidden = self._model(input_ids=tokens).last_hidden_state.to(CONTEXT_DTYPE)
            # clone: else one row that stays in the cache keeps its whole batch in memory
            contexts |= {caption: row.clone() for caption, row in zip(part, hidden, strict=False)}
        return contexts


class LabelConditioner:
    """Labels to the class indices of a network with ``num_classes + 1`` class embeddings, the last for no label.

    Args:
        num_classes: labels are 0 to ``num_classes - 1``.
        device: where the indices go.

    Raises:
        UserError: if ``num_classes`` is less than 1.
    """

    key = "label"

    def __init__(self, num_classes: int, device: str | torch.device = "cpu") -> None:
        if num_classes < 1:
            raise UserError(f"--num_classes must be at least 1 to condition on labels, got {num_classes}")
        self.num_classes, self.device = num_classes, torch.device(device)

    def __call__(self, labels: Sequence[int | None] | torch.Tensor) -> dict[str, torch.Tensor]:
        """Class indices of labels.

        Args:
            labels: B whole numbers; None and ``num_classes`` stand for no label.

        Returns:
            ``{"class_labels": (B,)}``, int64 on the device.

        Raises:
            UserError: a label is none of 0 to ``num_classes``.
        """
        given = labels.tolist() if isinstance(labels, torch.Tensor) else labels
        indices = [self.num_classes if label is None else label for label in given]
        for label in indices:
            if label not in range(self.num_classes + 1):
                raise UserError(
                    f"labels must be whole numbers from 0 to {self.num_classes - 1}, or {self.num_classes} for none, "
                    f"got {label!r}; check the datalist, or raise --num_classes"
                )
        return {"class_labels": torch.tensor([int(label) for label in indices], dtype=torch.long, device=self.device)}

    def null(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Class indices of ``batch_size`` images without label."""
        return self([None] * batch_size)

    @property
    def fingerprint(self) -> str:
        """What the class embeddings of a network depend on, in a line."""
        return f"label num_classes={self.num_classes}"


def make_conditioner(
    conditioning: str,
    text_encoder: str | Path | None = None,
    context_dim: int = 1024,
    null_caption: str = "empty",
    num_classes: int = 0,
    device: str | torch.device = "cpu",
    cache_megabytes: float = 512,
) -> CLIPTextConditioner | LabelConditioner | None:
    """What turns a batch's captions or labels into arguments of the network.

    Args:
        conditioning: "none", "label" or "text".
        text_encoder: for text, local folder of a CLIP text model (see :class:`CLIPTextConditioner`).
        context_dim: for text, width that the network's cross-attention takes.
        null_caption: for text, "empty" or "eos".
        num_classes: for labels, their number.
        device: where the network is.
        cache_megabytes: for text, memory on the device for contexts computed before.

    Returns:
        The conditioner, or None.

    Raises:
        UserError: names the setting that does not fit.
    """
    if conditioning not in CONDITIONINGS:
        raise UserError(f"--conditioning must be one of {', '.join(CONDITIONINGS)}, got {conditioning!r}")
    if conditioning == "none":
        return None
    if conditioning == "label":
        return LabelConditioner(num_classes, device)
    if not text_encoder:
        raise UserError(
            "--conditioning text needs --text_encoder, the local folder of a CLIP text model in the layout of Stable "
            "Diffusion 2.1 base; or set --conditioning none"
        )
    return CLIPTextConditioner(text_encoder, context_dim, null_caption, device, cache_megabytes)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _find_parts(folder: Path) -> tuple[Path, Path]:
    """Folders of the text model and of its tokenizer."""
    if not folder.is_dir():
        raise UserError(
            f"no text model at {folder}; name with --text_encoder a local folder with text_encoder/ and tokenizer/ in "
            "it, copied from Stable Diffusion 2.1 base: nothing is downloaded"
        )
    inside = (folder / "text_encoder").is_dir()
    encoder, tokenizer = (folder / "text_encoder", folder / "tokenizer") if inside else (folder, folder)
    if not (tokenizer / "tokenizer.json").is_file() and not all(
        (tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise UserError(
            f"no tokenizer (vocab.json and merges.txt, or tokenizer.json) in {tokenizer}; name with --text_encoder the "
            "folder that holds both text_encoder/ and tokenizer/"
        )
    return encoder, tokenizer


def _find_weights(encoder: Path) -> Path:
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (encoder / name).is_file():
            return encoder / name
    raise UserError(f"no weights ({' or '.join(names)}) in {encoder}; copy them from Stable Diffusion 2.1 base")


def _hidden_size(encoder: Path) -> int:
    from transformers import CLIPTextConfig

    try:
        # from a folder without the file transformers makes a configuration of defaults
        return CLIPTextConfig.from_pretrained(encoder / "config.json", local_files_only=True).hidden_size
    # whatever stands in it: no JSON, a list, a text for a number, no heads
    except Exception as error:
        raise UserError(
            f"no config.json of a CLIP text model in {encoder} ({type(error).__name__}); copy the whole folder"
        ) from error


def _load_tokenizer(folder: Path) -> CLIPTokenizerFast:
    from transformers import CLIPTokenizerFast

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    # a damaged file raises whatever its bytes lead to
    except Exception as error:
        raise UserError(
            f"{folder} holds no tokenizer that can be read ({type(error).__name__}); copy it anew"
        ) from error


def _load_text_model(weights: Path, dtype: torch.dtype) -> CLIPTextModel:
    from transformers import CLIPTextModel

    try:
        model, report = CLIPTextModel.from_pretrained(
            weights.parent,
            local_files_only=True,
            use_safetensors=weights.suffix == ".safetensors",
            weights_only=True,
            dtype=dtype,
            output_loading_info=True,
        )
    # as above; among them a pickle that would run code, which weights_only refuses
    except Exception as error:
        raise UserError(
            f"{weights} is not a file of plain weights of the text model beside it ({type(error).__name__}); copy "
            "text_encoder/ anew, with model.safetensors"
        ) from error
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        raise UserError(
            f"{weights} lacks {len(report['missing_keys'])} of the text model's weights, among them "
            f"{min(report['missing_keys'])}; name the folder of a CLIP text model with --text_encoder"
        )
    # what config.json has no layer for would be left out: a text model cut short
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith("position_ids")]
    if unexpected:
        raise UserError(
            f"{weights} holds {len(unexpected)} weights that the config.json beside it has no place for, among them "
            f"{min(unexpected)}; copy text_encoder/ anew, both files from the same model"
        )
    return model
