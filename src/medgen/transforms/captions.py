"""Captions from the sentences of a report, and labels: what a diffusion model is conditioned on, dropped at random."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from medgen.errors import UserError

__all__ = ["Captiond", "RandCaptiond", "RandDropLabeld"]


class Captiond(MapTransform):
    """The first sentences of an item's report, joined by a space: the same caption at every call.

    Sentences that are empty or blank do not count. An item without ``sentences``, or with none that count, takes its
    ``text`` as it stands, and one without either the empty caption.

    Args:
        keys: where an item's list of sentences stands; those of several keys are joined.
        caption_key: where the caption goes.
        max_sentences: how many sentences a caption has at most.

    Raises:
        UserError: if ``max_sentences`` is less than 1.
    """

    def __init__(
        self, keys: KeysCollection = "sentences", caption_key: Hashable = "caption", max_sentences: int = 5
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        if max_sentences < 1:
            raise UserError(f"max_sentences must be at least 1, got {max_sentences}; a caption needs a sentence")
        self.caption_key, self.max_sentences = caption_key, max_sentences

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the caption of one item; returns a new dictionary."""
        d = dict(data)
        d[self.caption_key] = " ".join(self.sentences(d)[: self.max_sentences])
        return d

    def sentences(self, item: Mapping[Hashable, Any]) -> list[str]:
        """What an item's caption is made of: its sentences, else its text as one, else nothing."""
        values = [item[key] for key in self.key_iterator(item) if item[key] is not None]
        return _texts(values) or _texts([item.get("text") or ""])


class RandCaptiond(RandomizableTransform, Captiond):
    """A random number of an item's sentences in random order, joined by a space; at times the empty caption.

    The number is drawn from 1 to ``min(n, max_sentences)``, all equally often and both ends among them; then that many
    different sentences in an order of their own. With probability ``drop_prob`` the caption is empty instead, so that
    one network learns the unconditional model too (classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598,
    algorithm 1). Where sentences come from: :class:`Captiond`.

    Args:
        keys: where an item's list of sentences stands.
        caption_key: where the caption goes.
        max_sentences: how many sentences a caption has at most.
        drop_prob: probability of the empty caption, in [0, 1].

    Raises:
        UserError: if ``max_sentences`` is less than 1 or ``drop_prob`` outside [0, 1].
    """

    def __init__(
        self,
        keys: KeysCollection = "sentences",
        caption_key: Hashable = "caption",
        max_sentences: int = 5,
        drop_prob: float = 0.1,
    ) -> None:
        Captiond.__init__(self, keys, caption_key, max_sentences)
        RandomizableTransform.__init__(self, _probability(drop_prob))
        self._chosen: list[int] = []

    def randomize(self, data: int) -> None:
        """Draw whether to drop the caption, and else which of ``data`` sentences it has, in which order."""
        super().randomize(None)
        self._chosen = []
        if not self._do_transform and data:
            # randint excludes its end
            number = self.R.randint(1, min(data, self.max_sentences) + 1)
            self._chosen = self.R.permutation(data)[:number].tolist()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the caption of one item; returns a new dictionary."""
        d = dict(data)
        sentences = self.sentences(d)
        self.randomize(len(sentences))
        d[self.caption_key] = " ".join(sentences[index] for index in self._chosen)
        return d


class RandDropLabeld(RandomizableTransform, MapTransform):
    """Replaces a label by ``num_classes``, which stands for no label, at times; and None always.

    The counterpart of an empty caption (:class:`RandCaptiond`) for a model conditioned on labels.

    Args:
        keys: keys of the labels; one draw holds for all of them.
        num_classes: labels are 0 to ``num_classes - 1``.
        drop_prob: probability of no label, in [0, 1].
        allow_missing_keys: whether to skip keys that an item lacks.

    Raises:
        UserError: if ``drop_prob`` is outside [0, 1].
    """

    def __init__(
        self, keys: KeysCollection, num_classes: int, drop_prob: float = 0.1, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, _probability(drop_prob))
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Keep or drop the labels of one item; returns a new dictionary."""
        d = dict(data)
        self.randomize(None)
        for key in self.key_iterator(d):
            if self._do_transform or d[key] is None:
                d[key] = self.num_classes
        return d


def _texts(values: Iterable[str | Iterable[str]]) -> list[str]:
    """Those of texts, and of lists of texts, that have something in them."""
    each = [part for value in values for part in ([value] if isinstance(value, str) else value)]
    return [text.strip() for text in each if text.strip()]


def _probability(drop_prob: float) -> float:
    if not 0 <= drop_prob <= 1:
        raise UserError(f"drop_prob must be from 0 (never drop) to 1 (always), got {drop_prob}")
    return drop_prob
