"""Where runs are tracked: checks of the address, and what it is by default."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_plus

from medgen.errors import UserError

__all__ = ["database_of", "default_uri", "local_uri", "resolve_uri"]

# names of values after "?" such as sslpassword and api_key, PWD of an ODBC line, and the same in a fragment
_SECRET = re.compile(r"[?&;#][^=&;]*(passw|passphrase|pwd|token|secret|key|credential)[^=&;]*=", re.IGNORECASE)


def default_uri(output_dir: str | Path) -> str:
    """``MLFLOW_TRACKING_URI``, or the SQLite file ``mlflow.db`` in the output folder where that is not set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(output_dir)


def local_uri(output_dir: str | Path) -> str:
    """The SQLite file ``mlflow.db`` in a folder."""
    return f"sqlite:///{Path(output_dir).absolute().as_posix()}/mlflow.db"


def resolve_uri(tracking_uri: str) -> str:
    """The address of a tracker, checked; that of a SQLite file made absolute.

    Args:
        tracking_uri: ``http://host:port``, ``sqlite:///path/mlflow.db`` or another database.

    Raises:
        UserError: it holds a password, or names a folder, which MLflow no longer tracks in.
    """
    scheme, slashes, rest = tracking_uri.partition("://")
    # a password may hold "/", "?" and "#" itself, and libraries differ in where it ends: no "@" at all, but in a path
    has_user = "@" in rest and not tracking_uri.startswith("sqlite:///")
    # without what may be secret
    shown = scheme + slashes + re.split("[?#;]", rest.rpartition("@")[2] if has_user else rest)[0]
    if has_user or _SECRET.search(unquote_plus(tracking_uri)):
        raise UserError(
            f"tracking_uri must hold no user and no password, got some with {shown}; take them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
        )
    if tracking_uri.startswith("file:") or ("://" not in tracking_uri and not tracking_uri.startswith("databricks")):
        folder = Path(re.sub("^file:(//)?", "", tracking_uri)).absolute()
        raise UserError(
            f"tracking_uri must be a server or a database, got {shown}; for a local one give "
            f"sqlite:///{folder.as_posix()}/mlflow.db"
        )
    database = database_of(tracking_uri)
    return f"sqlite:///{database.absolute().as_posix()}" if database else tracking_uri


def database_of(uri: str) -> Path | None:
    """File of a SQLite tracker; None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
