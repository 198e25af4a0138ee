"""Many runs of a bundle's configs in one process, which are skipped when they are done: what a study consists of."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.data.image_set import file_sha256
from medgen.data.shard import parse_shard, shard_of, warn_of_missing
from medgen.errors import UserError, find_user_error
from medgen.output import atomic_write_text, plain_json

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["FAILED", "Run", "Step", "check_steps", "end_study", "run_all", "run_config"]

logger = logging.getLogger(__name__)

FAILED = 3  # exit code: done, but some runs have failed and are told; as of the preprocessing commands
# settings that change where a run computes and where its files lie, and not what comes out
OF_THE_MACHINE = frozenset(
    {"bundle_root", "cache_rate", "dataset_dir", "device", "model_path", "num_workers", "output_dir", "resume"}
    | {"tracking_uri"}
)


@dataclass(frozen=True)
class Step:
    """A config of a bundle with settings, as ``monai.bundle run`` takes them.

    Args:
        config_file: name of a file in the bundle's ``configs``, or a list of it and overlays, which may also be paths.
        overrides: id -> value.
    """

    config_file: str | Sequence[str]
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Steps that belong together, such as a training and its evaluation.

    A run that was interrupted begins again with its first step: give trainings ``"resume": True``, with which they go
    on from their checkpoint, or begin where there is none.

    Args:
        name: for messages.
        steps: in their order.
        done: file that the last step writes; the run is skipped where it is. The settings that it was made with are
            kept beside it, in ``<its stem>.run.json``.
    """

    name: str
    steps: Sequence[Step]
    done: Path

    @property
    def record(self) -> Path:
        """File of the settings."""
        return self.done.with_name(f"{self.done.stem}.run.json")

    def settings(self, bundle_root: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """What decides the results, of each step, for the record.

        The content of the config files, what is laid over them, and the settings at their head as they come out: those
        that a preset or another setting gives count by their values. JSON files that are named count by what they hold.

        Raises:
            UserError: no such config.
        """
        return [_settings(step, Path(bundle_root).resolve()) for step in self.steps]


def _settings(step: Step, root: Path) -> dict[str, Any]:
    from monai.bundle import ConfigParser

    files = _config_files(step.config_file, root)
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update(pairs={"bundle_root": str(root), **step.overrides})
    record = {"config_file": [f"{Path(file).name} {file_sha256(file)[:16]}" for file in files]}
    record |= {name: _plain(value) for name, value in step.overrides.items() if name not in OF_THE_MACHINE}
    plain: dict[str, bool] = {}
    for name in parser.get():
        if _is_plain(parser, name, plain):
            try:
                value = parser.get_parsed_content(name)
            except Exception:  # a setting that cannot be: its run tells, and the others go on
                continue
            if _holds(value):
                record[name] = _plain(value)
    return record


def _is_plain(parser: ConfigParser, name: str, known: dict[str, bool]) -> bool:
    """Whether a setting is a plain value, or computed of nothing but such ones: to find out, no code is run.

    Args:
        known: earlier answers, which this one joins.
    """
    from monai.bundle import ConfigExpression, ReferenceResolver

    if name not in known:
        raw = parser.get(name)
        known[name] = name not in OF_THE_MACHINE and _holds(raw)
        if isinstance(raw, list):
            known[name] &= not any(isinstance(entry, str) and entry.startswith(("$", "@")) for entry in raw)
        elif isinstance(raw, str) and known[name]:
            used = ReferenceResolver.match_refs_pattern(raw)
            # code that takes no setting stands in the file, or is about the machine, or a name by the clock
            known[name] = bool(used) or not ConfigExpression.is_expression(raw)
            known[name] &= all(_is_plain(parser, other, known) for other in used)
    return known[name]


def _holds(value: Any) -> bool:
    """Whether a value is a number, text, a switch, nothing, or a list of these."""
    entries = value if isinstance(value, list | tuple) else [value]
    return all(entry is None or isinstance(entry, bool | int | float | str) for entry in entries)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | os.PathLike):
        is_file = str(value).endswith(".json") and Path(value).is_file()
        return f"sha256 {file_sha256(value)}" if is_file else str(value)
    return plain_json(value)


def _config_files(config_file: str | Sequence[str], root: Path) -> list[str]:
    """Paths of a config and its overlays, each below the bundle's ``configs`` or else by itself."""
    names = [config_file] if isinstance(config_file, str) else list(config_file)
    own = [root / "configs" / name for name in names]
    files = [str(path if path.is_file() else Path(name).resolve()) for path, name in zip(own, names, strict=True)]
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"no config {Path(path).name} in {root / 'configs'}, nor a file {path}; name one")
    return files


def check_steps(steps: Iterable[Step], bundle_root: str | os.PathLike[str]) -> None:
    """See that configs are there and have the settings that are laid over them.

    Args:
        steps: of a study.
        bundle_root: folder of the bundle.

    Raises:
        UserError: no such config, or a setting that it does not have.
    """
    from medgen.settings import check_names

    for step in steps:
        files = _config_files(step.config_file, Path(bundle_root).resolve())
        check_names(["--config_file", json.dumps(files), *(f"--{name}=" for name in step.overrides)])


def run_config(config_file: str | Sequence[str], bundle_root: str | os.PathLike[str], **overrides: Any) -> None:
    """Run a config of a bundle in this process, as ``python -m monai.bundle run`` does in one of its own.

    Args:
        config_file: name of a file in the bundle's ``configs``, or a list of it and overlays; an overlay that is not
            there is taken for a path.
        bundle_root: folder of the bundle.
        overrides: id -> value; relative paths are of the current folder.

    Raises:
        UserError: no such config, or a setting that it does not have.
    """
    from monai.bundle import ConfigWorkflow

    root = Path(bundle_root).resolve()
    check_steps([Step(config_file, overrides)], root)
    # both are changed by every run, and for good
    excepthook, path = sys.excepthook, list(sys.path)
    try:
        workflow = ConfigWorkflow(_config_files(config_file, root), bundle_root=str(root), **overrides)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    finally:
        sys.excepthook, sys.path[:] = excepthook, path


def run_all(runs: Sequence[Run], bundle_root: str | os.PathLike[str], shard: str | None = None) -> dict[str, str]:
    """Do what is left of several runs of a bundle, one after the other.

    Each gets its random numbers from its own seed and begins like the first: it ends as it would alone. A run that
    fails by a mistake that a person can mend, a diverged training or too little memory among them, is told and left;
    the next time it is tried again. SIGTERM ends all with :data:`medgen.preemption.AGAIN` once the training that is
    under way has saved its state.

    Args:
        runs: with different names and ``done`` files.
        bundle_root: folder of the bundle.
        shard: "i/n" does the i-th of n shares; None does all. See :func:`medgen.data.shard_of`.

    Returns:
        name -> why it failed, of this share's runs.

    Raises:
        UserError: no such shard, a setting that a config does not have, or results are there that were made with
            other settings.
    """
    part = shard_of(runs, shard)
    check_steps((step for run in part for step in run.steps), bundle_root)
    settings = [run.settings(bundle_root) for run in part]
    for run, now in zip(part, settings, strict=True):
        _check_same(run, now)
    missing = [run for run in part if not run.done.is_file()]
    warn_of_missing(len(missing), len(part), shard)
    failed: dict[str, str] = {}
    import monai.bundle  # noqa: F401

    gc.freeze()  # a million objects of the libraries, which the collections between runs need not go through
    try:
        for number, (run, now) in enumerate(zip(part, settings, strict=True), 1):
            head = f"[{number}/{len(part)}] {run.name}"
            if run not in missing:
                logger.info(f"{head}: done before")
                continue
            atomic_write_text(run.record, json.dumps(now, indent=4) + "\n")
            begin = time.perf_counter()
            reason = _run(run, bundle_root, head)
            if reason is None:
                logger.info(f"{head}: done in {time.perf_counter() - begin:.0f} s")
            else:
                failed[run.name] = reason
                logger.error(f"{head}: failed: {reason}")
    finally:
        gc.unfreeze()
    if shard := parse_shard(shard):
        logger.info(
            f"shard {shard[0]}/{shard[1]}: {len(part) - len(failed)} of {len(part)} runs are done; when all shards "
            "are, the same command without --shard writes the tables and pictures"
        )
    return failed


def _check_same(run: Run, settings: Sequence[Mapping[str, Any]]) -> None:
    if not run.record.is_file():
        if run.done.is_file():
            raise UserError(
                f"{run.done} must be of this study, got a file without {run.record.name} beside it; choose another "
                "--output_dir"
            )
        return
    try:
        before = json.loads(run.record.read_text(encoding="utf-8"))
        earlier = [dict(step) for step in before]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{run.record} cannot be read ({error}); delete {run.record.parent} and run it again"
        ) from error
    for step, now in zip(earlier, settings, strict=False):
        for name in sorted({*step, *now}):
            if step.get(name) != now.get(name):
                raise UserError(
                    f"{run.record.parent} was made with {name} {step.get(name)!s:.80}, this study has "
                    f"{now.get(name)!s:.80}; choose another --output_dir, or delete that folder"
                )
    if len(earlier) != len(run.steps):
        raise UserError(f"{run.record.parent} was made by {len(earlier)} steps, not {len(run.steps)}; delete it")


def _run(run: Run, bundle_root: str | os.PathLike[str], head: str) -> str | None:
    """Do a run's steps; returns why it failed, None where it did not."""
    import torch

    for step in run.steps:
        files = [step.config_file] if isinstance(step.config_file, str) else step.config_file
        logger.info(f"{head}: {' with '.join(Path(name).name for name in files)}")
        reason = None
        try:
            run_config(step.config_file, bundle_root, **step.overrides)
        except Exception as error:
            reason = find_user_error(error)
            if reason is None and not _is_among(torch.OutOfMemoryError, error):
                raise
            reason = reason or "out of memory; choose a smaller batch or image, or another --device"
        # configs and engines hold each other in circles, and with them the networks; errors hold all of them
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if reason is not None:
            return reason
    if not run.done.is_file():
        raise RuntimeError(f"{run.name} has not written {run.done}")
    return None


def _is_among(kind: type[BaseException], error: BaseException | None) -> bool:
    """Whether an error, or one behind it (MONAI wraps what a config raises), is of a kind."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def end_study(failed: Mapping[str, str], count: int, shard: str | None = None) -> None:
    """End a study some of whose runs have failed; nothing where none has.

    Args:
        failed: of :func:`run_all`.
        count: all runs.
        shard: of ``run_all``: of a share, what the others did is not known.

    Raises:
        UserError: all have failed.
        SystemExit: some have, with :data:`FAILED`.
    """
    if not failed:
        return
    name, reason = next(iter(failed.items()))
    if len(failed) == count and parse_shard(shard) is None:
        raise UserError(f"all {count} runs have failed, {name} of them so: {reason}")
    told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    print(f"{len(failed)} of {count} runs have failed, the others are done: {told}", file=sys.stderr)
    raise SystemExit(FAILED)
