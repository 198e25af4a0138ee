"""The files of a report: the page, JSON and tables."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medgen import __version__
from medgen.metrics.protocols import PROTOCOLS
from medgen.output import atomic_write_text, git_revision, plain_json, prepare_output_dir
from medgen.report.measure import measure
from medgen.report.measurements import Measurements
from medgen.report.page import features_file, render

__all__ = ["make_report"]

FORMAT = "medgen report 1"
LIBRARIES = ("torch", "monai", "numpy", "scipy", "SimpleITK", "PyWavelets", "piq")


def make_report(
    samples: str | os.PathLike,
    reference: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    title: str | None = None,
    command: str = "",
    **options: Any,
) -> tuple[list[Path], Measurements]:
    """Measure, and write ``report.html``, ``report.json``, ``metrics.json``, ``rejected.csv`` and the tables.

    What an earlier report wrote into the folder is removed first; other files stay.

    Args:
        samples: as in :func:`medgen.report.measure.measure`.
        reference: likewise.
        output_dir: folder for the files.
        title: heading of the page.
        command: the command line that asked for it, printed on the page.
        **options: of :func:`medgen.report.measure.measure`.

    Returns:
        The files, the page first, and what was measured.

    Raises:
        UserError: as there; or the folder cannot be written to.
    """
    folder, command = prepare_output_dir(output_dir), _without_secret(command)
    found = measure(samples, reference, **options)
    heading = title or f"{Path(samples).name} against {Path(reference).name}"
    versions = {"medgen": __version__, **{name: version(name) for name in LIBRARIES}}
    created = datetime.now().astimezone().isoformat(timespec="minutes")
    texts = {
        "report.html": render(found, heading, created, versions, command),
        "metrics.json": json.dumps(found.figures(), indent=4, allow_nan=False) + "\n",
        **_tables(found),
    }
    details = {
        "format": FORMAT,
        "title": heading,
        "created": created,
        "versions": versions,
        "command": command,
        **_details(found),
    }
    details["files"] = [*texts, "report.json"]
    texts["report.json"] = json.dumps(plain_json(details), indent=2, allow_nan=False) + "\n"
    _remove_earlier(folder)
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return [folder / name for name in texts], found


def _remove_earlier(folder: Path) -> None:
    """What an earlier report left: a table of other samples beside a new page would be taken for its own."""
    try:
        earlier = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        written = set(earlier["files"]) if earlier["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or none of ours
    own = {"paired.csv", "copies.csv", *(features_file(protocol) for protocol in PROTOCOLS)}
    for name in own & written:
        with suppress(OSError):
            (folder / name).unlink()


def _without_secret(command: str) -> str:
    """The command line without the password that a tracking address may hold: the page is there to be passed on."""
    return re.sub(r"//[^/@\s]+@", "//***@", command)


def _details(found: Measurements) -> dict[str, Any]:
    sets = {
        role: {
            "name": images.name,
            "n": len(images),
            "patients": None if images.patients is None else len(set(images.patients)),
            "shape": images.summary.shapes[0],
            "mean": images.summary.mean,
            "constant": images.summary.constant,
            "rejected": images.rejected,
        }
        for role, images in found.image_sets().items()
    }
    distances = [{**asdict(distance), "differences": len(distance.differences)} for distance in found.distances]
    return {
        "seed": found.seed,
        "git": git_revision(),
        "sets": sets,
        "feature_files": found.feature_files,
        "unmeasured": found.unmeasured,
        "verdicts": found.verdicts(),
        "notes": found.notes,
        "distances": distances,
        "sliced_wasserstein": [asdict(of) for of in found.patches],
        "diversity": {role: asdict(similarity) for role, similarity in found.diversity.items()},
        "paired": None if found.paired is None else {k: asdict(v) for k, v in found.paired.summary.items()},
        "memorisation": None if found.memorisation is None else found.memorisation.to_dict(),
    }


def _tables(found: Measurements) -> dict[str, str]:
    tables = {"rejected.csv": _csv(("set", "file", "reason"), found.left_out())}
    for distance in found.distances:
        if distance.differences:
            rows = [asdict(row) for row in distance.differences]
            tables[features_file(distance.protocol)] = _csv(tuple(rows[0]), [tuple(row.values()) for row in rows])
    if found.paired is not None:
        names = tuple(found.paired.values)
        rows = zip(found.paired.references, found.paired.files, *found.paired.values.values(), strict=True)
        tables["paired.csv"] = _csv(("reference", "sample", *names), list(rows))
    if found.memorisation is not None:
        rows = []
        for match in found.memorisation.matches:
            row = asdict(match)
            row["sample"] = found.samples.files[match.sample]
            row["training"] = "" if match.training is None else found.training.files[match.training]
            row["shift"] = "{} {}".format(*match.shift)
            rows.append(row)
        tables["copies.csv"] = _csv(tuple(rows[0]), [tuple(row.values()) for row in rows])
    return tables


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return table.getvalue()
