"""Starts bundles as their users do: as processes, which can be killed."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import monai.bundle
import numpy as np
import pydicom
import pytest
import torch
from monai.transforms import Randomizable

from medgen.errors import find_user_error
from medgen.networks import LatentGenerator
from medgen.preemption import AGAIN

ARGUMENTS = Path(__file__).parents[2] / "cluster" / "args"

# imported once for all programs: what any of them imports, and no more than that
PRELOADED = [
    "monai.bundle",
    "ignite.handlers",
    "mlflow",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchvision",
    "medgen.engines",
    "medgen.handlers",
    "medgen.inferers",
    "medgen.losses",
    "medgen.metrics",
    "medgen.networks",
    "medgen.sources",
    "medgen.transforms",
]


def command(config_file: list[str], output_dir: Path, **overrides: object) -> list[str]:
    """Arguments of Python for ``monai.bundle run``."""
    settings = {"output_dir": output_dir, "model_path": output_dir / "model.pt", "num_workers": 0, **overrides}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["-m", "monai.bundle", "run", "--config_file", str(config_file), *options]


class Forked:
    """A program of Python that begins in a fork of a process which has imported the slow libraries already.

    It is killed, waited for and read like a :class:`subprocess.Popen`; importing MONAI takes ten seconds, and the tests
    start some eighty programs that do. What a fork cannot have of its own is the seed of Python's hashes: see
    :func:`start_afresh`.
    """

    _context: multiprocessing.context.BaseContext | None = None
    _running: ClassVar[set[Forked]] = set()

    def __init__(self, arguments: list[str], cwd: Path) -> None:
        descriptor, name = tempfile.mkstemp(prefix="output-")
        os.close(descriptor)
        self._output = Path(name)
        target = (arguments, str(cwd), name, _environment())
        self._process = self._forkserver().Process(target=_run_module, args=target, daemon=False)
        self._process.start()
        self.pid = self._process.pid
        self._running.add(self)

    @classmethod
    def kill_all(cls) -> None:
        """End what a failed test has left: multiprocessing would wait for it at the end."""
        for process in list(cls._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process._end()

    def _end(self) -> None:
        self._process.join()
        self._running.discard(self)
        self._output.unlink(missing_ok=True)

    @classmethod
    def _forkserver(cls) -> multiprocessing.context.BaseContext:
        if cls._context is None:
            cls._context = multiprocessing.get_context("forkserver")
            cls._context.set_forkserver_preload(PRELOADED)
            atexit.register(cls.kill_all)  # before multiprocessing's own
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")  # read when torch is imported; and threads do not survive a fork
                patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
                patch.delenv("MLFLOW_TRACKING_URI", raising=False)
                multiprocessing.forkserver.ensure_running()
        return cls._context

    @property
    def returncode(self) -> int | None:
        """As of Popen: None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it printed on both streams, once it has ended."""
        self._process.join(timeout)
        late = self.returncode is None
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        output = self._output.read_text(errors="replace")
        self._end()
        if late:
            raise subprocess.TimeoutExpired("a forked program", timeout, output)
        return output, None


def _environment() -> dict[str, str]:
    """This process's, but for what would be shared with others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return environment


def _reseed() -> None:
    """Give a fork random numbers of its own: what forgets to seed must not look as if it had."""
    np.random.seed()
    torch.seed()
    Randomizable.R = np.random.RandomState()  # of MONAI's transforms that nobody has seeded


def _run_module(arguments: list[str], cwd: str, output: str, environment: dict[str, str]) -> None:
    """``python -m MODULE ...`` in a fork, in a session of its own, so that it is killed with its workers."""
    os.setsid()
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _reseed()
    if arguments[1] == "torch.distributed.run":
        os.register_at_fork(after_in_child=_reseed)
    sys.path.insert(0, "")  # as the interpreter does for -m
    logging.root.handlers.clear()
    multiprocessing.set_start_method("fork", force=True)  # the default on Linux; here it would be the forkserver
    sys.argv = ["", *arguments[2:]]
    code = 0
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)


def start(bundle: Path, arguments: list[str], *launcher: str) -> Forked:
    """A program in the bundle's folder; torchrun's processes are forks as well."""
    if launcher:
        assert arguments[:2] == ["-m", "monai.bundle"]
        script = str(Path(monai.bundle.__file__).with_name("__main__.py"))
        arguments = [*launcher, "--start-method=fork", "--run-path", script, *arguments[2:]]
    return Forked(arguments, bundle)


def start_afresh(bundle: Path, arguments: list[str]) -> subprocess.Popen:
    """A program as its users start it: an interpreter that imports all by itself, with another seed of its hashes.

    A training that is resumed in it ends with the bits of one in a fork only if nothing hangs on an order of sets, on
    numbers that nobody has seeded, or on what others have imported.
    """
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=bundle,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: Forked | subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def _wait_for_next_checkpoint(process: Forked, output_dir: Path, rng: random.Random) -> None:
    """Until a random moment within the 0.4 seconds after the next checkpoint was written."""
    checkpoint = output_dir / "checkpoints" / "last.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.4))
    assert process.poll() is None, "the training was over before it could be killed"


def kill_after_next_checkpoint(process: Forked, output_dir: Path, rng: random.Random) -> None:
    """SIGKILL at a random moment within the 0.4 seconds after the next checkpoint was written."""
    _wait_for_next_checkpoint(process, output_dir, rng)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def terminate_after_next_checkpoint(process: Forked, output_dir: Path, rng: random.Random, to_all: bool = True) -> None:
    """SIGTERM at such a moment, after which a training ends by itself, with a checkpoint.

    Args:
        process: the training.
        output_dir: its own.
        rng: of the moment.
        to_all: as SLURM sends it, to the data loaders' workers as well; else, as Kubernetes, to the process alone.
    """
    _wait_for_next_checkpoint(process, output_dir, rng)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == AGAIN, output
    assert len(re.findall("stopped by SIGTERM after a checkpoint at .* images; the same command", output)) == 1, output
    assert "Traceback" not in output
    assert "ERROR" not in output


def state(output_dir: Path) -> dict:
    """The newest checkpoint."""
    return torch.load(output_dir / "checkpoints" / "last.pt", weights_only=True)


def assert_same_training(a: Path, b: Path) -> None:
    """The whole state: networks, optimisers, EMA, best metric, position; and the best model."""
    first, second = state(a), state(b)
    assert first.pop("fingerprint") == second.pop("fingerprint")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    best = [torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=0)


def spoil(datalist: Path, folder: Path, change: Callable[[dict, Path], None]) -> Path:
    """A copy of the data with one mistake in it."""
    shutil.copytree(datalist.parent, folder)
    content = json.loads((folder / "datalist.json").read_text())
    change(content, folder)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"


def run(workflow: Any) -> None:
    """A workflow in this process."""
    workflow.initialize()
    workflow.run()


def assert_one_line(error: BaseException, message: str) -> None:
    """That a user is told one line, and which."""
    line = find_user_error(error)
    assert line is not None, repr(error)
    assert "\n" not in line
    assert re.search(message, line), line


def assert_same_levels(a: np.ndarray, b: np.ndarray) -> None:
    """8-bit images that are equal but for rounding: sums are rounded by the batch, and a level may tip over."""
    np.testing.assert_allclose(np.int16(a), np.int16(b), atol=1)


def assert_synthetic_dicom(items: list[dict], images: np.ndarray) -> None:
    """That DICOM files of a datalist hold these images, (N, C, H, W) in 8 bits, and say that nobody was imaged."""
    for item, image in zip(items, images, strict=True):
        picture = pydicom.dcmread(item["image"])
        assert_same_levels(picture.pixel_array, image.transpose(1, 2, 0))
        assert (picture.PatientID, picture.PatientName) == (item["patient"], "SYNTHETIC")
        assert picture.SyntheticData == "YES"
        assert item["model_sha256"] in picture.DerivationDescription


def assert_resumes(generate: Callable[..., Any], folder: Path) -> None:
    """That a generation which lost two of ten samples and its datalist ends with the files of an undisturbed one."""
    for name in ("whole", "killed"):
        generate(folder / name, seeds="0-9")
    for seed in (3, 8):
        (folder / "killed" / "samples" / f"seed{seed:06d}.png").unlink()
    (folder / "killed" / "datalist.json").unlink()

    generate(folder / "killed", seeds="0-9", resume="true")
    generate(folder / "killed", seeds="0-9", resume="true")  # nothing is left to do

    def content(of: Path) -> dict[str, bytes]:
        return {str(p.relative_to(of)): p.read_bytes() for p in of.rglob("*") if p.is_file()}

    assert content(folder / "killed") == content(folder / "whole")


def assert_shards_merge(run_in: Callable[..., Any], folder: Path, tables: list[str], stage: str | None = None) -> None:
    """That four shards, in any order and one of them twice, and what merges them leave the files of one process.

    Args:
        run_in: runs a config into an output folder, with settings.
        folder: for the test.
        tables: files that the merging run writes and no shard does.
        stage: of a cluster, whose args file says how shards are merged; None: by hand, with ``--resume true``.
    """
    arguments = {"resume": "true"} if stage is None else json.loads((ARGUMENTS / f"{stage}.json").read_text())
    resume = {key: value for key, value in arguments.items() if key == "resume"}
    out, whole = folder / "out", folder / "whole"
    run_in(out)
    out.rename(whole)  # datalists hold the name of the output folder
    for shard in ("2/4", "0/4", "1/4", "0/4", "3/4"):
        run_in(out, shard=shard)
        assert [table for table in [*tables, "rejected.csv"] if (out / table).exists()] == [], shard
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run_in(out, **resume)
    assert set(tables) < set(files_in(out))
    assert_same_files(out, whole)
    again = [path.name for path, time_ns in times.items() if path.stat().st_mtime_ns != time_ns]
    assert set(again) <= {"generation.json", "latents.json"}  # nothing is made twice


def assert_same_files(a: Path, b: Path) -> None:
    """That two folders hold the same files with the same bytes."""
    found, expected = files_in(a), files_in(b)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def search_killed_twice(
    bundle: Path, config: list[str], folder: Path, pictures: int, **settings: Any
) -> tuple[dict[str, bytes], dict[str, bytes], int, str]:
    """A search for latents with two SIGKILLs at random moments, beside one that was not disturbed.

    Returns:
        Files of the undisturbed run, files of the other one, records that the kills left, output of what came after.
    """
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    running = start(bundle, command(config, undisturbed, **settings, resume="true"))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    done = 0
    for _ in range(2):
        process = start(bundle, command(config, killed, **settings, resume="true"))
        while process.poll() is None and len(list(killed.glob("projections/*.npz"))) <= done:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, "the search was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = len(list(killed.glob("projections/*.npz")))
        assert done < pictures
    output = finish(start_afresh(bundle, command(config, killed, **settings, resume="true")))
    finish(running)
    return files_in(undisturbed), files_in(killed), done, output


def files_in(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by their relative names."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tiny_generator(folder: Path, space: str, family: type, arguments: dict[str, Any]) -> LatentGenerator:
    """A generator with random weights, and ``folder/SPACE.json``, an overlay of the applications that names it."""
    torch.manual_seed(0)
    network = family(**arguments)
    weights = folder / f"{space}.pt"
    torch.save(network.state_dict(), weights)
    definition = {"network_def": {"_target_": f"medgen.networks.{family.__name__}", **arguments}}
    (folder / f"{space}_generator.json").write_text(json.dumps(definition))
    overlay = {"generator_overlay": str(folder / f"{space}_generator.json"), "generator_weights": str(weights)}
    overlay |= {"space": space, "embedding": str(folder / space)}
    (folder / f"{space}.json").write_text(json.dumps(overlay))
    return LatentGenerator(network, space, hashlib.sha256(weights.read_bytes()).hexdigest())
