"""State dicts to safetensors and back, bit for bit."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch

import medgen
from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.output import atomic_file
from medgen.weights import read_state_dict

__all__ = ["from_safetensors", "to_safetensors"]


def to_safetensors(source: str | Path, output: str | Path) -> dict[str, torch.Tensor]:
    """Write a state dict as safetensors.

    Types and bits are kept. Tensors that share memory are written once each, and those with gaps without them: the
    format has neither. Its metadata name the package and the SHA-256 of the source, by which companions know weights.

    Args:
        source: state dict (``.pt``), read with ``weights_only=True``.
        output: file to write, whole or not at all.

    Returns:
        The tensors.

    Raises:
        UserError: not a state dict, a tensor that safetensors has no form for, or the file cannot be written.
    """
    state = read_state_dict(source)
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{source} must name its tensors by text, got {name!r:.80}; save a network's state_dict")
        if value.layout != torch.strided or value.is_quantized:
            raise UserError(
                f"{source} must hold dense tensors, got a {'quantised' if value.is_quantized else 'sparse'} one at "
                f"{name}; safetensors has no form for it"
            )
    # clones are dense and share nothing; the format's own writer refuses anything else
    plain = {
        name: value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    metadata = {"format": "pt", "medgen_version": medgen.__version__, "source_sha256": file_sha256(source)}
    try:
        content = safetensors.torch.save(plain, metadata)
    # a type that it does not know
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} cannot be a safetensors file ({reason}); keep it as it is") from error
    _check_same(source, state, safetensors.torch.load(content))
    _write(content, output)
    return state


def from_safetensors(source: str | Path, output: str | Path) -> dict[str, torch.Tensor]:
    """Write the tensors of a safetensors file as a state dict.

    Args:
        source: safetensors file; it cannot hold code.
        output: file to write (``.pt``), whole or not at all.

    Returns:
        The tensors.

    Raises:
        UserError: no safetensors file or a damaged one, or the output cannot be written.
    """
    if not Path(source).is_file():
        raise UserError(f"no weights at {source}; name a file that is there")
    try:
        state = safetensors.torch.load_file(source)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} must be a safetensors file, got a damaged one or another ({reason})") from error
    if not state:
        raise UserError(f"{source} holds no tensors; name a file with weights")
    try:
        with atomic_file(output) as file:
            torch.save(state, file)
            file.flush()
            _check_same(source, state, read_state_dict(file.name, str(output)))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error
    return state


def _write(content: bytes, output: str | Path) -> None:
    try:
        with atomic_file(output) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error


def _check_same(source: str | Path, given: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    """See that tensors came back with their types, shapes and bits; NaN is like any other pattern of them."""

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))

    if given.keys() != written.keys() or not all(same(value, written[name]) for name, value in given.items()):
        raise UserError(f"{source} did not come back as it was written; nothing was kept")


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
