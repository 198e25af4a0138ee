"""Parameters of a request: their types, bounds and defaults, for the signature and for the check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medgen.errors import UserError

if TYPE_CHECKING:
    from mlflow.types import ParamSchema

__all__ = ["LARGEST_SEED", "Parameter", "check_parameters", "param_schema"]

LARGEST_SEED = 2**32 - 1  # of NumPy's Mersenne Twister
SHOWN = 40  # characters of a wrong value

# kind -> MLflow's type, Python's types, and what to call it; a switch is no number, although Python has it so
_KINDS: dict[str, tuple[str, tuple[type, ...], str]] = {
    "integer": ("long",    (int,),       "a whole number"),
    "number":  ("double",  (int, float), "a finite number"),
    "text":    ("string",  (str,),       "a text"),
    "switch":  ("boolean", (bool,),      "true or false"),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter of a request.

    Args:
        name: its key under ``params``.
        kind: ``integer``, ``number``, ``text`` or ``switch``.
        default: what a request without it gets; None stands for "not given" and is then allowed.
        low: smallest number; None for none.
        high: largest number, or most characters of a text; None for none.
        choices: texts allowed; none for all.
    """

    name: str
    kind: str
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:
        """What it must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = _KINDS[self.kind][2]
        if self.kind == "text":
            return words if self.high is None else f"{words} of at most {self.high:g} characters"
        if self.low is not None and self.high is not None:
            return f"{words} from {self.low:.12g} to {self.high:.12g}"
        return words

    def check(self, value: Any) -> Any:
        """The value as the service takes it.

        Raises:
            UserError: of another type, or out of range.
        """
        if value is None:
            return self.default
        types = _KINDS[self.kind][1]
        fits = isinstance(value, types) and (isinstance(value, bool) == (self.kind == "switch"))
        if fits and self.kind in ("integer", "number"):
            fits = isinstance(value, int) or math.isfinite(value)  # of a larger int than any float it would raise
            fits = fits and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        if fits and self.kind == "text":
            fits = value in self.choices if self.choices else self.high is None or len(value) <= self.high
        if fits:
            return value
        # what a text says is its writer's business, and may be about a patient: a short look at a choice will do
        got = (
            f"{value!r:.{SHOWN}}"
            if isinstance(value, int | float) or (self.choices and isinstance(value, str))
            else (f"a text of {len(value)} characters" if isinstance(value, str) else f"a {type(value).__name__}")
        )
        raise UserError(f"{self.name} must be {self.wanted}, got {got}; change params.{self.name}")


def check_parameters(parameters: Iterable[Parameter], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All parameters of a request, with the defaults of those that it lacks.

    Args:
        parameters: that there are.
        given: name -> value; None for none.

    Raises:
        UserError: names the first that there is not, or that is not as it must be.
    """
    table = {parameter.name: parameter for parameter in parameters}
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"params must be a JSON object of names and values, got a {type(given).__name__}; write {{}}")
    unknown = [name for name in given or {} if name not in table]
    if unknown:
        raise UserError(
            f"params must be among {', '.join(table) or 'none'}, got {str(unknown[0])!r:.{SHOWN}}; correct it or leave "
            "it out"
        )
    return {name: parameter.check((given or {}).get(name)) for name, parameter in table.items()}


def param_schema(parameters: Iterable[Parameter]) -> ParamSchema:
    """MLflow's description of the parameters, for the signature of a model."""
    from mlflow.types import ParamSchema, ParamSpec

    return ParamSchema([ParamSpec(each.name, _KINDS[each.kind][0], each.default) for each in parameters])
