"""Serving a registered model over HTTP with MLflow's own scoring server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from medgen.errors import UserError

__all__ = ["serve"]


PATIENCE = 10  # seconds that a server is given to end


def serve(
    model_path: str | Path, host: str = "127.0.0.1", port: int = 5001, workers: int = 1, timeout: int = 600
) -> int:
    """Serve an MLflow model of a bundle until it is interrupted.

    As ``mlflow models serve --env-manager local`` does, with a limit of 64 MiB to what a request may weigh. Each
    worker is a process with a model of its own, and answers one request at a time.

    Args:
        model_path: folder of the model, with its ``MLmodel``.
        host: address to listen at. The server asks for no password: what is beyond this machine needs a proxy that
            does.
        port: to listen at.
        workers: processes.
        timeout: seconds of a request, its wait for those before it included; then it is answered with 504, and what
            is being computed for it ends. MLflow's own default is 60.

    Returns:
        Exit status of the server.

    Raises:
        UserError: there is no model of a bundle in the folder, or the timeout is none.
    """
    if timeout < 1:
        raise UserError(f"timeout must be at least 1 second, got {timeout}; set --timeout")
    from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
    from mlflow.pyfunc import scoring_server

    model = Path(model_path).resolve()
    sources = model / "code"
    if not (model / "MLmodel").is_file() or not (sources / "medgen" / "serving").is_dir():
        raise UserError(
            f"no model of a registered bundle in {model_path}; register one with `medgen registry register`"
        )
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(sources), "--host", host, "--port", str(port)]
    command += ["--workers", str(workers), "medgen.serving.app:app"]
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # a module that lies in the current folder is not what was verified
        scoring_server._SERVER_MODEL_PATH: model.as_uri(),
        MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name: str(timeout),
    }
    server: subprocess.Popen | None = None
    is_ended = False

    def end(*_: object) -> None:
        """Who ends this process means the server."""
        nonlocal is_ended
        is_ended = True
        if server is not None:
            server.terminate()

    # before there is a server, so that none is left behind; Python has signals in the main thread alone
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if is_main else None
    try:
        server = subprocess.Popen(command, env=environment)
        if is_ended:
            server.terminate()
        return server.wait()
    except KeyboardInterrupt:  # which the server got, too
        return 128 + signal.SIGINT if server is None else server.wait()
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
        if server is not None and server.poll() is None:
            server.terminate()  # first, so that it ends its workers
            try:
                server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                server.kill()
