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

from medgen.data.datalist import Item, datalist_hash, validate_datalist
from medgen.errors import UserError

__all__ = ["TRAINED_ON", "check_synthetic", "patient_digest", "read_trained_on", "trained_on"]

logger = logging.getLogger(__name__)

TRAINED_ON = "trained_on.json"  # beside the weights
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
) -> dict[str, Any]:
    """What a training leaves beside its weights, so that what they generate is not tested on the patients they saw.

    Args:
        datalist: JSON file of the items.
        training: the items that the training shows the model.
        validation: the items that choose the model: it has seen those as well.
        began_with: other weights that the model is made of or begins with, such as an autoencoder; None is none. Their
            patients are added.

    Returns:
        ``datalist_sha256``, ``dataset`` (the name in the datalist), ``images`` (numbers of this training) and
        ``patients``, sorted digests (:func:`patient_digest`). ``unknown`` are the files of ``began_with`` of which
        nothing is recorded; it is missing where there are none.

    Raises:
        UserError: the datalist, or what is recorded of ``began_with``, is missing or no JSON.
    """
    parts = {"training": list(training), "validation": list(validation)}
    patients = {patient_digest(item["patient"]) for items in parts.values() for item in items}
    unknown: set[str] = set()
    for path in began_with:
        if path is None:
            continue
        before = read_trained_on(path)
        if before is None:
            logger.warning(f"no {TRAINED_ON} beside {path}: whose images those weights were trained on is not known")
        patients.update(before["patients"] if before else ())
        unknown.update(before.get("unknown", ()) if before else [Path(path).name])
    return {
        "datalist_sha256": datalist_hash(datalist),
        "dataset": str(validate_datalist(datalist).get("name", "")),
        "images": {name: len(items) for name, items in parts.items()},
        **({"unknown": sorted(unknown)} if unknown else {}),
        "patients": sorted(patients),
    }


def read_trained_on(weights: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the training of weights recorded.

    Args:
        weights: file of the weights; the record lies beside it.

    Returns:
        As :func:`trained_on`; None where there is no record, or that of another file in the same folder.

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
    model = record.pop("weights", None)
    if isinstance(model, str) and model != Path(weights).name and path.with_name(Path(model).name).is_file():
        return None
    return record


def check_synthetic(
    synthetic_datalists: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    real_datalist: str | os.PathLike[str],
    splits: Sequence[str] = ("test",),
    allow_unknown: bool = False,
) -> int:
    """See that no generator of synthetic images saw a patient on whom a model that learns from them is tested.

    Patients are compared by their ids, whatever data set these are of: ids of two data sets that are the same by chance
    are refused too.

    Args:
        synthetic_datalists: of the synthetic images; of which ``trained_on`` says whom the generator saw.
        real_datalist: of the real images.
        splits: of the real images, those that the model is tested on.
        allow_unknown: go on, with a warning, where nothing or not all is known of whom a generator saw.

    Returns:
        How many patients the generators saw that are in no training or validation split of the real images: a
        comparison with real images alone is then one with fewer patients.

    Raises:
        UserError: a generator saw a patient of those splits, or it is not known whom it saw, or a datalist is broken,
            or a synthetic image stands in a split of the real images other than training.
    """
    real = validate_datalist(real_datalist)
    _check_real(real, real_datalist, splits)
    tested = {patient_digest(item["patient"]): item["patient"] for split in splits for item in real[split]}
    learned = {patient_digest(item["patient"]) for split in ("training", "validation") for item in real.get(split, ())}
    if isinstance(synthetic_datalists, str | os.PathLike):
        synthetic_datalists = [synthetic_datalists]
    others: set[str] = set()
    for path in synthetic_datalists:
        seen = _patients_of(path, allow_unknown)
        if shared := [tested[digest] for digest in sorted(seen & tested.keys())]:
            raise UserError(
                f"the generator of {path} was trained on {len(shared)} of the {len(tested)} patients of split "
                f"{', '.join(splits)} of {real_datalist}, such as {shared[0]}; train a generator without them (ids "
                "that are the same in two data sets by chance need a prefix in one of them)"
            )
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
    for split in dict.fromkeys(("validation", "test", *splits)):
        if synthetic := [item["image"] for item in real.get(split, ()) if item.get("synthetic")]:
            raise UserError(
                f"datalist {path}: {len(synthetic)} items of split {split} are synthetic, such as {synthetic[0]}; a "
                "model is chosen and tested on real images: take them out"
            )


def _patients_of(path: str | os.PathLike[str], allow_unknown: bool) -> set[str]:
    """Digests of the patients that the generator of a synthetic datalist saw."""
    record = validate_datalist(path).get("trained_on")
    if record is not None:
        _check(record, f"trained_on in {path}")
    unknown = [] if record is None else record.get("unknown", [])
    if record is None or unknown:
        what = f"weights that it began with ({', '.join(unknown)}) have" if unknown else "it has"
        missing = f"{path} does not say whose images its generator saw: {what} no {TRAINED_ON}"
        if not allow_unknown:
            raise UserError(
                f"{missing}; train it with this collection and generate anew, or set --allow_unknown true if it saw no "
                "patient of the test"
            )
        logger.warning(f"{missing}; that it saw no patient of the test is taken for granted")
    return set() if record is None else set(record["patients"])


def _check(record: Any, where: str) -> None:
    """See that a record is one of :func:`trained_on`, as far as anything relies on it."""
    patients = record.get("patients") if isinstance(record, Mapping) else None
    if not isinstance(patients, list) or not all(isinstance(p, str) and _DIGEST.fullmatch(p) for p in patients):
        raise UserError(
            f"{where} must hold a list of patients, each of 16 hexadecimal digits, got {str(record)!r:.80}; restore it"
        )
    unknown = record.get("unknown", [])
    if not isinstance(unknown, list) or not all(isinstance(name, str) for name in unknown):
        raise UserError(f"{where} must hold a list of names as unknown, got {unknown!r:.80}; restore it")
