"""Serving a registered model over HTTP with MLflow's own scoring server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from medgen.errors import UserError

__all__ = ["serve"]


def serve(model_path: str | Path, host: str = "127.0.0.1", port: int = 5001, workers: int = 1) -> int:
    """Serve an MLflow model of a bundle until it is interrupted.

    As ``mlflow models serve --env-manager local`` does, with a limit of 64 MiB to what a request may weigh. Each
    worker is a process with a model of its own, and answers one request at a time.

    Args:
        model_path: folder of the model, with its ``MLmodel``.
        host: address to listen at. The server asks for no password: what is beyond this machine needs a proxy that
            does.
        port: to listen at.
        workers: processes.

    Returns:
        Exit status of the server.

    Raises:
        UserError: there is no model of a bundle in the folder.
    """
    from mlflow.pyfunc import scoring_server

    model = Path(model_path).resolve()
    sources = model / "code"
    if not (model / "MLmodel").is_file() or not (sources / "medgen" / "serving").is_dir():
        raise UserError(
            f"no model of a registered bundle in {model_path}; register one with `medgen registry register`"
        )
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(sources), "--host", host, "--port", str(port)]
    command += ["--workers", str(workers), "medgen.serving.app:app"]
    server = subprocess.Popen(command, env={**os.environ, scoring_server._SERVER_MODEL_PATH: model.as_uri()})
    # who ends this process means the server
    before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        return server.wait()
    except KeyboardInterrupt:  # which the server got, too
        return server.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if server.poll() is None:
            server.kill()
