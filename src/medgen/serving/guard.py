"""MLflow's scoring server, told to answer bad requests in one line that repeats nothing of the request."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from functools import wraps
from typing import Any, Protocol

from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    TEMPORARILY_UNAVAILABLE,
)
from mlflow.pyfunc import scoring_server

from medgen.errors import UserError, find_user_error
from medgen.serving.limits import LateError, UnavailableError, time_limit

__all__ = ["RequestError", "guard_scoring_server", "refused"]

LONGEST = 300  # characters of a message
TIME_SHARE = 0.95  # of the time after which MLflow answers in our place: who still waits is told what to do
# of a request, whose text may become a tree of many times its size: eight images of three channels and 11,000 rows
# have 270,000 lists, and one of 2,800 pixels has 8 million numbers
MOST_LISTS = 2**19
MOST_NUMBERS = 2**23
MOST_ENTRIES = 2**14  # of the inputs: rows of one image, or vectors of a batch


class _Checker(Protocol):
    column: str | None

    @property
    def usage(self) -> str: ...

    def check(self, params: Mapping[str, Any] | None) -> dict[str, Any]: ...


class RequestError(MlflowException, UserError):
    """An error that the scoring server answers in one line, with HTTP 400 unless the code says otherwise.

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
        codes = {UnavailableError: TEMPORARILY_UNAVAILABLE, LateError: DEADLINE_EXCEEDED}
        return RequestError(said, codes.get(type(error), INVALID_PARAMETER_VALUE))
    reason = type(error).__name__  # not its message, which may hold values of the request
    return RequestError(f"the model failed on this request ({reason}); the server's log says where", INTERNAL_ERROR)


def guard_scoring_server(service: _Checker) -> None:
    """Check requests before MLflow does, in the process of a scoring server; elsewhere change nothing.

    MLflow leaves out parameters that it does not know, and what it refuses it answers with several lines and the data.
    Nor does it end what it has told the client is late: :func:`~medgen.serving.limits.check_time` does from here on.

    Args:
        service: knows the model's parameters, and what a request looks like.
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
            with time_limit(TIME_SHARE * MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()):
                body = _body(data)
                service.check(body.get(scoring_server.SERVING_PARAMS_KEY))
                _check_inputs(body, service)
                # which takes an object for the text of one, and need not read that again
                return invocations(body, content_type, model, input_schema)
        except UserError as error:
            raise refused(error) from None
        # of MLflow's own words none: many hold the request, and more may from version to version
        except Exception as error:
            kind = "" if isinstance(error, MlflowException) else f" ({type(error).__name__})"
            raise RequestError(f"the inputs do not fit the model{kind}; send {service.usage}") from None

    scoring_server.invocations = guarded


def _body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request, with one of MLflow's forms of inputs and nothing unknown beside it."""
    # before it is read: nothing but a prompt has such signs in its texts
    for what, most, got in (
        ("lists and objects", MOST_LISTS, data.count(b"[") + data.count(b"{")),
        ("numbers", MOST_NUMBERS, data.count(b",")),
    ):
        if got > most:
            raise UserError(f"a request may have at most {most} {what}, got {got}; send images as PNG in base64")
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


def _check_inputs(body: Mapping[str, Any], service: _Checker) -> None:
    """See that nothing of the inputs would be left out, as MLflow and pandas leave out what has another name."""
    (form,) = (key for key in body if key in scoring_server.SUPPORTED_FORMATS)
    inputs = body[form]
    longest = max((len(part) for part in _parts(inputs) if isinstance(part, list)), default=0)
    if longest > MOST_ENTRIES:
        raise UserError(f"{form} may have at most {MOST_ENTRIES} entries, got {longest}; send several requests")
    if service.column is None:
        return
    if form == scoring_server.DF_SPLIT and isinstance(inputs, dict):
        found = [inputs["columns"]] if inputs.get("columns") else []
    else:
        rows = inputs if isinstance(inputs, list) else [inputs] if inputs else []
        if form != scoring_server.DF_RECORDS and not any(isinstance(row, dict) for row in rows):
            return
        found = [list(row) if isinstance(row, dict) else row for row in rows]
    for number, names in enumerate(found, 1):
        if names != [service.column]:
            # the names are not repeated: a table without a header has a patient's there
            got = f"{len(names)} names" if isinstance(names, list) else f"a {type(names).__name__}"
            raise UserError(
                f"each entry of {form} must have {service.column} and nothing else, got {got} in entry {number} of "
                f"{len(found)}; send {service.usage}"
            )


def _parts(inputs: Any) -> list[Any]:
    """Inputs, and what they hold under names."""
    return [inputs, *(inputs.values() if isinstance(inputs, dict) else ())]
