"""Parameters of requests: bounds, types, defaults."""

from __future__ import annotations

import math

import pytest

from medgen.errors import UserError
from medgen.serving.parameters import Parameter, check_parameters, param_schema

SEED = Parameter("seed", "integer", 0, 0, 10)
PSI = Parameter("truncation_psi", "number", 1.0, 0, 2)
PROMPT = Parameter("prompt", "text", "", high=5)
TASK = Parameter("task", "text", "score", choices=("score", "sample"))
LATENT = Parameter("latent", "switch", False)
CLASS = Parameter("class_index", "integer", None, 0, 1)


def test_defaults_fill_what_a_request_leaves_out():
    assert check_parameters([SEED, CLASS, PROMPT], {"seed": 3}) == {"seed": 3, "class_index": None, "prompt": ""}
    assert check_parameters([SEED], None) == {"seed": 0}


@pytest.mark.parametrize(
    ("parameter", "value"), [(SEED, 10), (PSI, 1), (PSI, 0.5), (PROMPT, "heart"), (TASK, "sample"), (LATENT, True)]
)
def test_what_fits_comes_back_as_it_is(parameter, value):
    assert parameter.check(value) is value


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        (SEED, -1, "seed must be a whole number from 0 to 10, got -1; change params.seed"),
        (SEED, 11, "from 0 to 10, got 11"),
        (SEED, 10**400, "from 0 to 10, got 1000"),
        (PSI, 10**400, "from 0 to 2, got 1000"),
        (SEED, 1.0, "whole number .* got 1.0"),
        (SEED, True, "got True"),
        (SEED, "3", "got a text of 1 characters"),
        (SEED, [3], "got a list"),
        (PSI, math.nan, "a finite number from 0 to 2, got nan"),
        (PSI, math.inf, "got inf"),
        (PROMPT, "hearts", "a text of at most 5 characters, got a text of 6 characters"),
        (PROMPT, 3, "a text .* got 3"),
        (TASK, "scores", "one of score, sample, got 'scores'"),
        (LATENT, 1, "true or false, got 1"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(parameter, value, message):
    with pytest.raises(UserError, match=message) as caught:
        parameter.check(value)
    assert "\n" not in str(caught.value)


def test_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="among seed, prompt, got 'sed'"):
        check_parameters([SEED, PROMPT], {"sed": 1})
    with pytest.raises(UserError, match="JSON object of names and values, got a list"):
        check_parameters([SEED], [1])


def test_text_of_a_request_is_not_repeated():
    with pytest.raises(UserError) as caught:
        PROMPT.check("John Doe, born 1950")
    assert "Doe" not in str(caught.value)


def test_schema_has_each_with_type_and_default():
    schema = param_schema([SEED, PSI, PROMPT, LATENT, CLASS])

    assert {spec.name: (spec.dtype.name, spec.default) for spec in schema.params} == {
        "seed": ("long", 0),
        "truncation_psi": ("double", 1.0),
        "prompt": ("string", ""),
        "latent": ("boolean", False),
        "class_index": ("long", None),
    }
