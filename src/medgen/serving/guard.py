"""MLflow's scoring server, told to answer bad requests in one line that repeats nothing of the request."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from functools import wraps
from typing import Any, Protocol

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import scoring_server

from medgen.errors import UserError, find_user_error

__all__ = ["RequestError", "guard_scoring_server", "refused"]

LONGEST = 300  # characters of a message


class _Checker(Protocol):
    def check(self, params: Mapping[str, Any] | None) -> dict[str, Any]: ...


class RequestError(MlflowException, UserError):
    """An error that the scoring server answers with HTTP 400 and one line.

    Of any other MlflowException the server makes "Failed to predict data '...'" with all that was sent, which may be
    the image of a patient, and of any other exception a stack trace.

    Args:
        message: one line.
        error_code: of MLflow; which HTTP status it has follows from it.
    """

    def __init__(self, message: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        self._message = textwrap.shorten(str(message), LONGEST, placeholder=" ...")
        super().__init__(self._message, error_code=error_code)

    @property
    def message(self) -> str:
        """The line; what the server would make of it is passed over."""
        return self._message

    @message.setter
    def message(self, value: str) -> None: ...


def refused(error: Exception) -> RequestError:
    """What is answered for an exception: the line of a UserError, or that the model failed.

    Args:
        error: that a service raised.
    """
    if isinstance(error, RequestError):
        return error
    if said := find_user_error(error):
        return RequestError(said)
    reason = type(error).__name__  # not its message, which may hold values of the request
    return RequestError(f"the model failed on this request ({reason}); the server's log says where", INTERNAL_ERROR)


def guard_scoring_server(service: _Checker) -> None:
    """Check requests before MLflow does, in the process of a scoring server; elsewhere change nothing.

    MLflow leaves out parameters that it does not know, and what it refuses it answers with several lines and the data.

    Args:
        service: knows the model's parameters.
    """
    if scoring_server._SERVER_MODEL_PATH not in os.environ or hasattr(scoring_server.invocations, "__wrapped__"):
        return
    invocations = scoring_server.invocations

    @wraps(invocations)
    def guarded(data: bytes, content_type: str | None, model: Any, input_schema: Any) -> Any:
        try:
            kind = (content_type or "none").partition(";")[0].strip()
            if kind != scoring_server.CONTENT_TYPE_JSON:
                raise UserError(f"a request must be of type application/json, got {kind:.40}; send JSON and say so")
            service.check(_body(data).get(scoring_server.SERVING_PARAMS_KEY))
            return invocations(data, content_type, model, input_schema)
        except RequestError:
            raise
        except UserError as error:
            raise RequestError(str(error)) from None
        except MlflowException as error:
            raise RequestError(_without_data(error.message)) from None
        except Exception as error:
            raise RequestError(
                f"the inputs must be a table, or a list, with images under image ({type(error).__name__}); "
                'send {"inputs": {"image": ["<base64 PNG>"]}}'
            ) from None

    scoring_server.invocations = guarded


def _body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request, with one of MLflow's forms of inputs and nothing unknown beside it."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"the request must be a JSON object, got {len(data)} bytes that are no JSON{where}; "
            'send {"inputs": ..., "params": {...}}'
        ) from None
    wanted = 'the request must be a JSON object with "inputs" (or instances, dataframe_split, dataframe_records)'
    if not isinstance(body, dict):
        raise UserError(f'{wanted}, got a {type(body).__name__}; send {{"inputs": ..., "params": {{...}}}}')
    forms = [key for key in body if key in scoring_server.SUPPORTED_FORMATS]
    others = [key for key in body if key not in (*forms, scoring_server.SERVING_PARAMS_KEY)]
    if others:
        raise UserError(f'{wanted} and "params", got {others[0]!r:.40}; parameters belong under "params"')
    if len(forms) != 1:
        raise UserError(f"{wanted}, got {' and '.join(forms) or 'none'}; send one of them, [] where there is no image")
    return body


def _without_data(message: str) -> str:
    """MLflow's own words on a request, without the request."""
    said = message.rpartition("\nError: ")[2] if "\nError: " in message else message
    for start in ("Failed to enforce schema", "Ensure that input is a valid JSON", "Failed to convert data"):
        if said.startswith(start):
            said = "the inputs do not fit the model's signature"
    return f'{said.splitlines()[0].rstrip(".")}; send {{"inputs": {{"image": ["<base64 PNG>"]}}}}'
