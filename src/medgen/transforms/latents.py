"""Latents from the disk, and the augmented copies that they are made of."""

from __future__ import annotations

import dis
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import Compose, LoadImage, MapTransform, Randomizable, RandomizableTransform, Transform

from medgen.data.latents import LatentScaling
from medgen.data.stream import derive_seed
from medgen.errors import UserError

__all__ = ["AugmentedCopiesd", "LoadLatentd", "transform_digest"]

POSTERIORS = ("sample", "mean")


class LoadLatentd(RandomizableTransform, MapTransform):
    """Whitened latents of an item that :func:`medgen.data.load_latents` gave.

    Mean and standard deviation on the disk => a draw from the posterior => whitened latent, new at each load (as EDM2,
    Karras et al. 2024, arXiv 2312.02696, reads its data).

    Args:
        keys: keys of the places; they are taken out of the item.
        scaling: how latents are whitened.
        output_key: key of the latent; one for each key.
        posterior: ``sample`` draws mean + std · N(0, I); ``mean`` takes the mean, for validation.
        augment_prob: probability that one of the image's augmented copies takes its place. Without copies on the disk
            the image itself is taken always.
        allow_missing_keys: whether to skip keys that an item lacks.

    Raises:
        UserError: an unknown ``posterior`` or a probability out of range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        scaling: LatentScaling,
        output_key: KeysCollection = "image",
        posterior: str = "sample",
        augment_prob: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        if posterior not in POSTERIORS:
            raise UserError(f"posterior must be {' or '.join(POSTERIORS)}, got {posterior!r}; set --posterior sample")
        if not 0 <= augment_prob <= 1:
            raise UserError(f"augment_prob must be from 0 to 1, got {augment_prob!r}; set --augment_prob")
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=augment_prob)
        self.scaling, self.posterior = scaling, posterior
        self.output_keys = (output_key,) if isinstance(output_key, str) else tuple(output_key)
        self._shards: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a memory-mapped array would be pickled with all its data on the way to a worker process
        return {**self.__dict__, "_shards": {}}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load the latents of one item.

        Returns:
            A new dictionary with (C, h, w) float32 under ``output_key``.

        Raises:
            UserError: the array is gone, or none.
        """
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            self.randomize(None)
            place = d.pop(key)
            posteriors = self._shard(place["file"])[place["row"]]
            copy = self.R.randint(1, len(posteriors)) if self._do_transform and len(posteriors) > 1 else 0
            latent, std = np.float32(posteriors[copy])
            if self.posterior == "sample":
                latent = latent + std * self.R.standard_normal(std.shape).astype(np.float32)
            d[output_key] = self.scaling.whiten(torch.from_numpy(latent))
        return d

    def _shard(self, path: str) -> np.ndarray:
        if path not in self._shards:
            try:
                self._shards[path] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(
                    f"{path} cannot be read as latents ({error}); run encode.json with --resume true"
                ) from error
        return self._shards[path]


class AugmentedCopiesd(MapTransform):
    """An image and random variants of it, stacked: (C, H, W) => (1 + copies, C, H, W), the image itself first.

    Args:
        keys: keys of the images.
        transform: makes a variant; a random transform of dictionaries with the same keys.
        copies: how many variants.
        seed_key: key of the whole number that decides an item's variants, whatever was drawn before.
        allow_missing_keys: whether to skip keys that an item lacks.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Randomizable,
        copies: int,
        seed_key: str = "seed",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform, self.copies, self.seed_key = transform, copies, seed_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make the variants of one item; returns a new dictionary."""
        variants = [dict(data)]
        for copy in range(self.copies):
            self.transform.set_random_state(seed=derive_seed(int(data[self.seed_key]), copy))
            variants.append(self.transform(dict(data)))
        stacked = {key: torch.stack([variant[key] for variant in variants]) for key in self.key_iterator(data)}
        return {**data, **stacked}


def transform_digest(transform: Transform | Sequence[Transform]) -> str:
    """Fingerprint of what transforms do: of their classes, their plain settings, and those of the transforms inside.

    Args:
        transform: one, such as a ``Compose``, or several.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        UserError: a setting that cannot be told apart from another, such as a lambda.
    """
    return hashlib.sha256(json.dumps(_described(transform), sort_keys=True).encode()).hexdigest()


def _described(value: Any) -> Any:
    """What JSON can hold of a transform's settings; numbers of NumPy by value, functions and classes by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(entry) for entry in value]
    if isinstance(value, Compose):
        return [_described(entry) for entry in value.transforms]
    if isinstance(value, Transform):
        return {"class": _name(type(value)), **_settings(value)}
    if isinstance(value, Mapping):
        return {str(name): _described(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, torch.dtype | torch.device | np.dtype | slice):
        return str(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _name(value)
    if hasattr(value, "__dict__") and not callable(value):  # such as an image reader
        return {"class": _name(type(value)), **_settings(value)}
    raise UserError(f"a transform's settings must be plain values, got {value!r:.80}; use a transform of its own")


def _name(value: Any) -> str:
    """Where a class or function is defined; what has no name of its own there cannot be told from another."""
    if "<" in value.__qualname__:
        raise UserError(f"a transform must not hold {value.__qualname__}, got one; use a function of a module")
    return f"{value.__module__}.{value.__qualname__}"


def _settings(value: Any) -> dict[str, Any]:
    """Attributes but those that a random transform sets as it draws, and those that say where and how it runs."""
    drawn = {"R", "_tracing", "device"}
    if isinstance(value, Randomizable):
        methods = (method for base in type(value).__mro__ for method in vars(base).values())
        drawn |= {
            step.argval
            for method in methods
            if isinstance(method, FunctionType) and method.__name__ != "__init__"
            for step in dis.get_instructions(method)
            if step.opname == "STORE_ATTR"
        }
    settings = {name: entry for name, entry in vars(value).items() if name not in drawn}
    if isinstance(value, LoadImage) and not value.auto_select:
        settings["readers"] = value.readers[-1:]  # the one that was named: the others are what MONAI found installed
    return {name: _described(entry) for name, entry in settings.items()}
