"""A registered bundle behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path

from medgen.registry.bundles import fetch_model

__all__ = ["serve"]


def serve(
    uri: str,
    host: str = "127.0.0.1",
    port: int = 5001,
    workers: int = 1,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
    timeout: int = 600,
) -> int:
    """Answer requests with a registered bundle until the process is interrupted.

    Its files are those that were registered, code included: they are fetched and verified first. Plain ``mlflow models
    serve -m models:/NAME@ALIAS`` serves the same model, without that.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        host: address to listen at; the default is reached from this machine alone.
        port: to listen at.
        workers: processes, each with a model of its own.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.
        cache_dir: where models are kept once they are fetched; default: ``medgen/models`` in the user's cache.
        timeout: seconds of a request, its wait included; then it gets status 504.

    Returns:
        Exit status of the server.

    Raises:
        UserError: no such model, or the files are not those that were registered.
    """
    from medgen import serving, sources  # PyTorch and MLflow's server, which none of the other commands needs

    # compiled files beside the sources would be files that were not registered
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    model = fetch_model(uri, cache_dir or sources.user_cache(), tracking_uri)
    return serving.serve(model, host, port, workers, timeout)
