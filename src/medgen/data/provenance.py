"""Whose images a model was trained on: recorded beside its weights, carried with what it generates, and checked."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen import lineage
from medgen.data.datalist import Item, datalist_hash, validate_datalist
from medgen.errors import UserError

__all__ = ["TRAINED_ON", "check_synthetic", "check_unseen", "patient_digest", "read_trained_on", "trained_on"]

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on.json"  # beside the weights
PARTS = ("training", "validation")
_DIGEST = re.compile(r"[0-9a-f]{16}")


def patient_digest(patient: str | int) -> str:
    """16 hexadecimal digits that stand for a patient: the beginning of the SHA-256 of the id.

    They are a pseudonym and no more. Whoever can guess the ids, which of a public data set are known and of a hospital
    often plain numbers, finds out which of them are meant: treat the digests like the datalist that they come from.
    """
    return hashlib.sha256(str(patient).encode()).hexdigest()[:16]


def trained_on(
    datalist: str | os.PathLike[str],
    training: Iterable[Item],
    validation: Iterable[Item],
    began_with: Sequence[str | os.PathLike[str] | None] = (),
    generated: Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Any]:
    """What a training leaves beside its weights, so that no test is on patients whom they saw.

    Args:
        datalist: JSON file of the items.
        training: the items that the training shows the model, real ones.
        validation: the items that choose the model: it has seen those as well.
        began_with: other weights that the model is made of or begins with, such as an autoencoder; None is none. Their
            patients are added.
        generated: datalists of synthetic images that it is trained on, too; their generators' patients are added.

    Returns:
        ``datalist_sha256``, ``dataset`` (the name in the datalist), ``images`` (numbers of this training) and
        ``patients``: sorted digests (:func:`patient_digest`) of those of ``training`` and, apart from them, those of
        ``validation`` alone. ``unknown`` are the files of ``began_with`` and ``generated`` of which nothing is
        recorded; it is missing where there are none.

    Raises:
        UserError: a datalist, or what is recorded of ``began_with``, is missing or broken.
    """
    items = {"training": list(training), "validation": list(validation)}
    patients = {name: {patient_digest(item["patient"]) for item in items[name]} for name in PARTS}
    unknown: set[str] = set()

    def add(before: Mapping[str, Any] | None, name: str) -> None:
        for part in PARTS:
            patients[part].update(before["patients"][part] if before else ())
        unknown.update(before.get("unknown", ()) if before else [name])

    for path in began_with:
        if path is None:
            continue
        before = read_trained_on(path)
        if before is None:
            logger.warning(f"no {TRAINED_ON} of {path}: whose images those weights were trained on is not known")
        add(before, Path(path).name)
    for path in generated:
        add(_record_in(path), "/".join(Path(path).parts[-2:]))
    return {
        "datalist_sha256": datalist_hash(datalist),
        "dataset": str(validate_datalist(datalist).get("name", "")),
        "images": {name: len(items[name]) for name in PARTS},
        **({"unknown": sorted(unknown)} if unknown else {}),
        "patients": {
            "training": sorted(patients["training"]),
            "validation": sorted(patients["validation"] - patients["training"]),
        },
    }


def read_trained_on(weights: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the training of weights recorded.

    Args:
        weights: file of the weights; the record lies beside it, and says by ``weights_sha256``, a list, whose it is.

    Returns:
        As :func:`trained_on`; None where there is no record, or that of other weights, whatever their name.

    Raises:
        UserError: it is no such record.
    """
    path = Path(weights).with_name(TRAINED_ON)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} must be the JSON of a training, got a broken file ({reason}); restore it") from error
    _check(record, str(path))
    vouched = record.pop("weights_sha256", None)
    if not isinstance(vouched, list) or not Path(weights).is_file() or lineage.weights_digest(weights) not in vouched:
        logger.warning(f"{path} is the record of other weights than {weights}, and says nothing of these")
        return None
    return record


def check_unseen(
    weights: str | os.PathLike[str],
    datalist: str | os.PathLike[str],
    splits: Sequence[str] = ("test",),
    allow_unknown: bool = False,
) -> None:
    """See that a model saw no patient on whom it, or one that begins with its weights, is tested.

    Of the split validation only those are refused that the model was trained on: that it was chosen by the others does
    no harm to another choice.

    Args:
        weights: of the model; a file that is not there is told by whoever reads it.
        datalist: of the images that it is tested on.
        splits: of these images.
        allow_unknown: go on, with a warning, where nothing or not all is known of whom it saw.

    Raises:
        UserError: it saw a patient of those splits, or was trained on one of the validation, or it is not known whom it
            saw, or the datalist is broken.
    """
    if not Path(weights).is_file():
        return
    content = validate_datalist(datalist)
    record = read_trained_on(weights)
    missing = f"whose images {weights} was trained on is not known"
    _check_known(record, missing, "train it with this collection", allow_unknown)
    if record is not None:
        _check_apart(record, str(weights), "use weights that were trained without them", content, datalist, splits)


def check_synthetic(
    synthetic_datalists: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    real_datalist: str | os.PathLike[str],
    splits: Sequence[str] = ("test",),
    allow_unknown: bool = False,
) -> int:
    """See that no generator of synthetic images saw a patient on whom a model that learns from them is tested.

    Nor may it have been trained on patients of the validation, who choose the model. Patients are compared by their
    ids, whatever data set these are of: ids of two data sets that are the same by chance are refused too.

    Args:
        synthetic_datalists: of the synthetic images; of which ``trained_on`` says whom the generator saw. None of them
            leaves the check that the real images are real.
        real_datalist: of the real images.
        splits: of the real images, those that the model is tested on.
        allow_unknown: go on, with a warning, where nothing or not all is known of whom a generator saw.

    Returns:
        How many patients the generators saw that are in no training or validation split of the real images: a
        comparison with real images alone is then one with fewer patients.

    Raises:
        UserError: a generator saw a patient of those splits, or was trained on one of the validation, or it is not
            known whom it saw, or a datalist is broken, or a synthetic image stands in a split of the real images.
    """
    if isinstance(synthetic_datalists, str | os.PathLike):
        synthetic_datalists = [synthetic_datalists]
    real = validate_datalist(real_datalist)
    _check_real(real, real_datalist, splits if synthetic_datalists else ())
    learned = {patient_digest(item["patient"]) for split in PARTS for item in real.get(split, ())}
    others: set[str] = set()
    for path in synthetic_datalists:
        record = _record_in(path)
        missing = f"{path} does not say whose images its generator saw"
        _check_known(record, missing, "train it with this collection and generate anew", allow_unknown)
        if record is None:
            continue
        remedy = "train a generator without them"
        _check_apart(record, f"the generator of {path}", remedy, real, real_datalist, splits)
        seen = {digest for part in PARTS for digest in record["patients"][part]}
        if new := seen - learned:
            logger.warning(
                f"the generator of {path} saw {len(new)} patients, of {len(seen)}, that are in no training or "
                f"validation split of {real_datalist}: against real images alone it has the advantage of theirs"
            )
            others |= new
    return len(others)


def _check_real(real: Mapping[str, Any], path: str | os.PathLike[str], splits: Sequence[str]) -> None:
    for split in splits:
        if not isinstance(real.get(split), list) or not real[split]:
            raise UserError(f"datalist {path}: split {split} must hold items to test on, got none; split it anew")
    for split, items in real.items():
        if not isinstance(items, list):
            continue
        made = [item["image"] for item in items if isinstance(item, Mapping) and item.get("synthetic")]
        if made:
            raise UserError(
                f"datalist {path}: {len(made)} items of split {split} are synthetic, such as {made[0]}; take them out: "
                "those to train on have a datalist of their own, named by --synthetic, and validation and test are real"
            )


def _check_apart(
    record: Mapping[str, Any],
    who: str,
    remedy: str,
    real: Mapping[str, Any],
    path: str | os.PathLike[str],
    splits: Sequence[str],
) -> None:
    """See that a model saw nobody of the splits, and was trained on nobody of the validation."""
    trained = set(record["patients"]["training"])
    for split in dict.fromkeys((*splits, "validation")):
        there = {patient_digest(item["patient"]): item["patient"] for item in real.get(split, ())}
        seen = trained if split == "validation" else trained.union(record["patients"]["validation"])
        if shared := [there[digest] for digest in sorted(seen & there.keys())]:
            saw = "was trained on" if trained >= seen & there.keys() else "was trained on, or chosen by,"
            raise UserError(
                f"{who} {saw} {len(shared)} of the {len(there)} patients of split {split} of {path}, such as "
                f"{shared[0]}; {remedy} (ids that are the same in two data sets by chance need a prefix in one of them)"
            )


def _record_in(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Whom the generator of a synthetic datalist saw; None where it does not say."""
    record = validate_datalist(path).get("trained_on")
    if record is not None:
        _check(record, f"trained_on in {path}")
    return record


def _check_known(record: Mapping[str, Any] | None, missing: str, remedy: str, allow_unknown: bool) -> None:
    """See that a record is there and leaves nobody out."""
    unknown = [] if record is None else record.get("unknown", [])
    if record is not None and not unknown:
        return
    why = f"{', '.join(unknown)}, which it began with or learnt from, has" if unknown else "it has"
    missing = f"{missing}: {why} no {TRAINED_ON}"
    if not allow_unknown:
        raise UserError(f"{missing}; {remedy}, or set --allow_unknown true if it saw no patient of the test")
    logger.warning(f"{missing}; that it saw no patient of the test is taken for granted")


def _check(record: Any, where: str) -> None:
    """See that a record is one of :func:`trained_on`, as far as anything relies on it."""
    patients = record.get("patients") if isinstance(record, Mapping) else None
    if isinstance(patients, list):
        raise UserError(
            f"{where} must tell the patients of training from those of validation, got one list of all, as an earlier "
            "version wrote it; train, or generate, anew"
        )
    lists = [patients.get(name) for name in PARTS] if isinstance(patients, Mapping) else [None]
    if not all(isinstance(of, list) and all(isinstance(p, str) and _DIGEST.fullmatch(p) for p in of) for of in lists):
        raise UserError(
            f"{where} must hold lists of patients, training and validation, each of 16 hexadecimal digits, got "
            f"{str(record)!r:.80}; restore it"
        )
    unknown = record.get("unknown", [])
    if not isinstance(unknown, list) or not all(isinstance(name, str) for name in unknown):
        raise UserError(f"{where} must hold a list of names as unknown, got {unknown!r:.80}; restore it")
