"""Figures of a classifier from its probabilities: ranking, decisions at a threshold, calibration.

N images, K classes, R weightings of the images. With two classes class 1 is the one to be found: scores are its
probability p1. With more, figures of ranking and decision are means over the classes, each against the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from medgen.errors import UserError

__all__ = [
    "CLASSIFICATION_METRICS",
    "ClassificationMetric",
    "ScoredImages",
    "calibration_slope",
    "check_probabilities",
    "classification_metrics",
    "confidence_and_outcome",
    "equal_bins",
    "pick_threshold",
    "weighted_metrics",
]

THRESHOLD = 0.5
FEWEST_FOR_THRESHOLD = 10  # validation images of each class: below, the best threshold of so few is mostly chance
ECE_BINS = 15  # Guo et al. 2017, section 5
FEWEST_PER_BIN = 10
SMALLEST_PROBABILITY = float(
    np.finfo(np.float32).eps
)  # a softmax in float32 may give a plain 0, whose logarithm is none


@dataclass(frozen=True)
class ClassificationMetric:
    """How a figure is to be read.

    Args:
        title: for tables and axes.
        best: ``high``, ``low`` or ``zero``.
        low: smallest value that is possible.
        high: largest; infinite for a likelihood.
    """

    title: str
    best: str
    low: float = 0.0
    high: float = 1.0


CLASSIFICATION_METRICS = {
    "accuracy": ClassificationMetric("accuracy", "high"),
    "balanced_accuracy": ClassificationMetric("balanced accuracy", "high"),
    "auroc": ClassificationMetric("AUROC", "high"),
    "average_precision": ClassificationMetric("average precision", "high"),
    "sensitivity": ClassificationMetric("sensitivity", "high"),
    "specificity": ClassificationMetric("specificity", "high"),
    "brier": ClassificationMetric("Brier score", "low", 0.0, 2.0),
    "ece": ClassificationMetric("expected calibration error", "low"),
    "calibration_in_the_large": ClassificationMetric("calibration in the large", "zero", -1.0, 1.0),
    "nll": ClassificationMetric("negative log-likelihood", "low", 0.0, float("inf")),
}


@dataclass(frozen=True)
class ScoredImages:
    """What the figures need of each image, so that images can be weighted, drawn and exchanged.

    Made by :meth:`of`; :meth:`joined` puts the predictions of two classifiers side by side.

    Args:
        labels: (N,) class of each image.
        num_classes: K.
        ranks: (N, C) rank of the score among these images, ties sharing their mean; C is 1 for two classes, else K.
            Ranks, since AUROC and average precision know no more, and two classifiers' become comparable by them.
        decisions: (N,) class that the classifier decides for.
        brier: (N,) squared error.
        nll: (N,) minus the logarithm of the probability of the true class.
        excess: (N,) confidence minus outcome: p1 minus the label for two classes, else the largest probability minus
            whether its class is the true one.
        bins: (N,) of the calibration error, about equally many images in each.
    """

    labels: NDArray[np.intp]
    num_classes: int
    ranks: NDArray[np.float64]
    decisions: NDArray[np.intp]
    brier: NDArray[np.float64]
    nll: NDArray[np.float64]
    excess: NDArray[np.float64]
    bins: NDArray[np.intp]

    @classmethod
    def of(cls, probabilities: ArrayLike, labels: ArrayLike, threshold: float | None = None) -> ScoredImages:
        """From the probabilities.

        Args:
            probabilities: (N, K) in [0, 1], the sum of each row 1.
            labels: (N,) class indices; each of the K classes has an image.
            threshold: with two classes an image is of class 1 where p1 is at least this; None: 0.5. With more classes
                None, and the class of the largest probability is taken.

        Raises:
            UserError: shapes or values out of range, a class without images, or a threshold for more than two classes.
        """
        probabilities, labels = check_probabilities(probabilities, labels)
        n, num_classes = probabilities.shape
        present = np.bincount(labels, minlength=num_classes)
        if not present.all():
            raise UserError(
                f"figures of a classifier need images of each of its {num_classes} classes, got none of class "
                f"{int(present.argmin())}; add some, or train without this class"
            )
        own = probabilities[np.arange(n), labels]
        confidence, outcome = confidence_and_outcome(probabilities, labels)
        if num_classes == 2:
            scores = probabilities[:, 1:]
            decisions = (scores[:, 0] >= _checked_threshold(threshold)).astype(np.intp)
            brier = (scores[:, 0] - labels) ** 2
        else:
            if threshold is not None:
                raise UserError(
                    f"a threshold takes two classes, got {num_classes}; give none, and the likeliest class is taken"
                )
            scores, decisions = probabilities, probabilities.argmax(axis=1)
            brier = ((probabilities - np.eye(num_classes)[labels]) ** 2).sum(axis=1)
        nll = -np.log(np.maximum(own, SMALLEST_PROBABILITY))
        ranks = rankdata(scores, axis=0)
        return cls(labels, num_classes, ranks, decisions, brier, nll, confidence - outcome, equal_bins(confidence))

    def one_against_rest(self, k: int) -> ScoredImages:
        """The same of class k alone, for figures of ranking and decision; calibration stays that of all classes."""
        labels, decisions = ((of == k).astype(np.intp) for of in (self.labels, self.decisions))
        return replace(self, labels=labels, num_classes=2, ranks=self.ranks[:, [k]], decisions=decisions)

    def joined(self, other: ScoredImages) -> ScoredImages:
        """(2N) these predictions, then those of another classifier for the same images."""
        columns = ("labels", "ranks", "decisions", "brier", "nll", "excess", "bins")
        return ScoredImages(
            num_classes=self.num_classes,
            **{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in columns},
        )


def classification_metrics(
    probabilities: ArrayLike, labels: ArrayLike, threshold: float | None = None
) -> dict[str, float]:
    """Figures of a classifier.

    - ``accuracy``, ``balanced_accuracy`` (mean over the classes of the share that is recognised);
    - ``sensitivity``, ``specificity``: of class 1 at the threshold; of more classes the mean of each against the rest;
    - ``auroc``, ``average_precision``: of class 1; of more classes the mean of each against the rest. Average precision
      depends on the share of the class, see :func:`medgen.metrics.average_precision`;
    - ``brier``: mean of (p1 - label)^2; of more classes the sum over all of them (Brier 1950), up to 2;
    - ``ece``: expected calibration error (Guo et al. 2017, equation 3), in bins of about equally many images rather
      than of equal width (Nixon et al. 2019), 15 of them or as many as leave 10 images to each. With two classes it
      is that of p1 against the share of class 1; with more that of the largest probability against the accuracy. It is
      above 0 even where calibration is perfect, and the more so the fewer the images;
    - ``calibration_in_the_large``: mean of what ``ece`` compares, with its sign: above 0 the probabilities are too
      high, as they are after a rare class was filled up;
    - ``nll``: negative log-likelihood, probabilities at least 1.2e-7;
    - ``calibration_slope``, ``calibration_intercept``: two classes only, see :func:`calibration_slope`; left out where
      they do not exist.

    Args:
        probabilities: (N, K) in [0, 1], the sum of each row 1.
        labels: (N,) class indices; each of the K classes has an image.
        threshold: with two classes an image is of class 1 where p1 is at least this; None: 0.5.

    Returns:
        The figures by name.

    Raises:
        UserError: shapes or values out of range, a class without images, or a threshold for more than two classes.
    """
    scored = ScoredImages.of(probabilities, labels, threshold)
    found = weighted_metrics(scored, np.ones((len(scored.labels), 1)))
    figures = {name: float(values[0]) for name, values in found.items()}
    line = calibration_slope(np.asarray(probabilities)[:, 1], labels) if scored.num_classes == 2 else None
    if line is not None:
        figures["calibration_slope"], figures["calibration_intercept"] = line
    return figures


def weighted_metrics(
    scored: ScoredImages, weights: NDArray[np.float64], names: Sequence[str] = tuple(CLASSIFICATION_METRICS)
) -> dict[str, NDArray[np.float64]]:
    """Figures of weighted images, for many weightings at once: how often each image was drawn, or whether at all.

    The bins of the calibration error stay those of the images as they are.

    Args:
        scored: N images.
        weights: (N, R) whole numbers, in C order for speed.
        names: of the figures, from ``CLASSIFICATION_METRICS``.

    Returns:
        (R,) values by name; NaN where a class that is needed has no weight.
    """
    found: dict[str, NDArray[np.float64]] = {}
    of_class = np.eye(scored.num_classes)[scored.labels]
    decided = np.eye(scored.num_classes)[scored.decisions]
    by_bin = np.eye(scored.bins.max() + 1)[scored.bins] * scored.excess[:, None]
    plain = np.stack([scored.brier, scored.nll, scored.excess], axis=1)
    # all that is a sum over the images, in one product
    tables = [of_class, decided, of_class * decided, by_bin, plain]
    sums = np.split(np.hstack(tables).T @ weights, np.cumsum([table.shape[1] for table in tables])[:-1])
    there, chosen, hits, of_bins, of_plain = sums  # (K, R) three times, (bins, R), (3, R)
    total = there.sum(axis=0)
    recall = _share(hits, there)
    left_alone = _share(total - there - (chosen - hits), total - there)
    found["accuracy"] = hits.sum(axis=0) / total
    found["balanced_accuracy"] = recall.mean(axis=0)
    found["sensitivity"], found["specificity"] = (
        table[1] if scored.num_classes == 2 else table.mean(axis=0) for table in (recall, left_alone)
    )
    found["brier"], found["nll"], found["calibration_in_the_large"] = of_plain / total
    found["ece"] = np.abs(of_bins).sum(axis=0) / total
    if {"auroc", "average_precision"} & set(names):
        classes = [1] if scored.num_classes == 2 else range(scored.num_classes)
        ranked = [
            _ranking(ranks, scored.labels == k, weights) for k, ranks in zip(classes, scored.ranks.T, strict=True)
        ]
        found["auroc"], found["average_precision"] = np.mean(ranked, axis=0)
    return {name: found[name] for name in names}


def _ranking(
    ranks: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(R,) AUROC and average precision of (N,) ranks under (N, R) weights, ties together as in ``metrics.detection``.

    Sorted by class, each image of the class needs only the sums of weights below it.
    """
    order = np.argsort(ranks, kind="stable")
    ones, zeros = order[positive[order]], order[~positive[order]]
    w_ones, below_ones, below_zeros = weights[ones], _sums_below(weights[ones]), _sums_below(weights[zeros])
    first = below_zeros[np.searchsorted(ranks[zeros], ranks[ones], side="left")]
    last = below_zeros[np.searchsorted(ranks[zeros], ranks[ones], side="right")]
    n, m = below_ones[-1], below_zeros[-1]
    won = (w_ones * (first + last)).sum(axis=0) / 2
    true = n - below_ones[np.searchsorted(ranks[ones], ranks[ones], side="left")]
    precision = true / np.maximum(true + m - first, 1)  # whole numbers: below 1 is none, and then no weight either
    gained = (w_ones * precision).sum(axis=0)
    valid = (n > 0) & (m > 0)
    return np.where(valid, won / np.maximum(n * m, 1), np.nan), np.where(valid, gained / np.maximum(n, 1), np.nan)


def _sums_below(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M + 1, R) sums of the first 0, 1, ..., M rows."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def pick_threshold(probabilities: ArrayLike, labels: ArrayLike) -> float | None:
    """Threshold of p1 with the largest Youden's J (sensitivity + specificity - 1; Youden 1950), of validation images.

    Never of the images that the threshold is then judged by. It lies midway between two scores; of several that are
    equally good the one nearest to 0.5 is taken.

    Args:
        probabilities: (N, K) of the validation images, in [0, 1], the sum of each row 1.
        labels: (N,) class indices.

    Returns:
        The threshold; 0.5 where a class has fewer than 10 images, None for more than two classes.

    Raises:
        UserError: shapes or values out of range.
    """
    probabilities, labels = check_probabilities(probabilities, labels)
    if probabilities.shape[1] != 2:
        return None
    if np.bincount(labels, minlength=2).min() < FEWEST_FOR_THRESHOLD:
        return THRESHOLD
    scores = probabilities[:, 1]
    values, where = np.unique(scores, return_inverse=True)
    # share of each class at or below each score: all but the last, above which there is nothing
    ones, zeros = (np.cumsum(np.bincount(where, labels == k, len(values))) / (labels == k).sum() for k in (1, 0))
    gain = (zeros - ones)[:-1]
    between = (values[:-1] + values[1:]) / 2
    if not len(gain) or gain.max() <= 0:
        return THRESHOLD
    best = between[gain >= gain.max() - 1e-12]
    return float(best[np.abs(best - THRESHOLD).argmin()])


def calibration_slope(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float] | None:
    """Slope and intercept of the logistic regression of the outcome on the logit of p1 (Cox 1958).

    1 and 0 are perfect; a slope below 1 means probabilities that are too extreme (Van Calster et al. 2019).

    Args:
        scores: (N,) p1.
        labels: (N,) 0 or 1.

    Returns:
        Slope and intercept; None where p1 separates the classes or is the same for all, so that there are none.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    ends = [(scores[labels == k].min(), scores[labels == k].max()) for k in (0, 1)]
    if ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]:
        return None
    from sklearn.linear_model import LogisticRegression

    clipped = np.clip(scores, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    logits = np.log(clipped / (1 - clipped))[:, None]
    found = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(logits, labels)
    return float(found.coef_[0, 0]), float(found.intercept_[0])


def confidence_and_outcome(
    probabilities: NDArray[np.float64], labels: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What calibration compares: a probability and whether it came true.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices.

    Returns:
        (N,) p1 and (N,) the label with two classes; with more the largest probability and whether its class is true.
    """
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], labels.astype(np.float64)
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(np.float64)


def equal_bins(confidence: NDArray[np.float64]) -> NDArray[np.intp]:
    """(N,) bin of each image by its confidence, about equally many in each and equal values together.

    There are 15, or fewer where that would leave fewer than 10 images to a bin.

    Args:
        confidence: (N,) in [0, 1].
    """
    count = max(1, min(ECE_BINS, len(confidence) // FEWEST_PER_BIN))
    edges = np.quantile(confidence, np.arange(1, count) / count)
    return np.unique(np.searchsorted(edges, confidence, side="right"), return_inverse=True)[1].reshape(-1)


def check_probabilities(probabilities: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Arrays of probabilities and labels that belong together.

    Args:
        probabilities: (N, K), K at least 2.
        labels: (N,) class indices below K.

    Raises:
        UserError: what is wrong with them.
    """
    probabilities, given = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or not len(probabilities):
        raise UserError(
            f"probabilities must be (images, classes) with at least one image and two classes, got shape "
            f"{probabilities.shape}; give the softmax of the logits"
        )
    wrong = ~np.isfinite(probabilities) | (probabilities < 0) | (probabilities > 1)
    if wrong.any():
        raise UserError(f"probabilities must lie between 0 and 1, got {probabilities[wrong][0]:g}; give the softmax")
    off = np.abs(probabilities.sum(axis=1) - 1)
    if off.max() > 1e-3:
        raise UserError(
            f"probabilities of an image must have the sum 1, got {probabilities[off.argmax()].sum():g} in row "
            f"{int(off.argmax())}; give the softmax of the logits"
        )
    if given.shape != probabilities.shape[:1] or not np.isin(given, np.arange(probabilities.shape[1])).all():
        raise UserError(
            f"labels must be one class index from 0 to {probabilities.shape[1] - 1} for each of the "
            f"{len(probabilities)} images, got {given.shape} from {given.min()} to {given.max()}"
            if given.size
            else f"labels must be one class index for each of the {len(probabilities)} images, got none"
        )
    return probabilities, given.astype(np.intp)


def _checked_threshold(threshold: float | None) -> float:
    if threshold is None:
        return THRESHOLD
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must lie between 0 and 1, got {threshold}; take 0.5, or that of the validation")
    return float(threshold)
