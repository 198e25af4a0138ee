"""MLflow's servers on loopback, for tests and benchmarks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

__all__ = ["Server", "mlflow_server"]

SECONDS = 240  # to answer, on a machine with other things to do


class Server:
    """A server that is started at a free port, and killed.

    Args:
        arguments: of Python, after ``-m``; ``{port}`` in them is replaced.
        folder: that it runs in; its output goes to ``server.log`` there.
        environment: further variables.
    """

    def __init__(self, arguments: list[str], folder: Path, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder, self.log = folder, folder / "server.log"
        self._command = [sys.executable, "-m", *(word.format(port=self.port) for word in arguments)]
        self._environment = {
            **os.environ,
            # MLflow calls uvicorn by its name
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # five processes that judge language models
            **environment,
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, env=self._environment, cwd=self.folder
            )
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    self.process = None
                    raise AssertionError(self.log.read_text()[-4000:]) from None
                time.sleep(0.1)
        self.kill()
        raise AssertionError(f"no answer within {SECONDS} seconds: {self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL, to its workers too."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def mlflow_server(folder: Path, database: Path | None = None) -> Server:
    """``mlflow server`` with a SQLite file and artifacts in a folder; a database is copied there before it starts."""
    if database is not None:
        shutil.copyfile(database, folder / "server.db")
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    return Server([*command, "--artifacts-destination", f"{folder}/artifacts"], folder)
