"""What the registry tells of versions, and which of them may be promoted."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracking import MlflowClient
from torch import nn
from typer.testing import CliRunner
from vector_bundles import file_digest, make_vector_bundle

from medgen import cli
from medgen.errors import UserError
from medgen.registry import compare, direction_of, list_models, promote, register_bundle, show

FIGURES = (
    {"auroc": 0.82, "frd": 5.0, "l1": 0.02, "n": 100, "split": "test", "git": "abc", "fid": math.nan},
    {"auroc": 0.71, "frd": 4.0, "n": 100, "split": "test"},
    None,
)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, empty_database) -> dict:
    """Three versions with weights of their own, the first with a training; an encoder that was made from the first."""
    folder = tmp_path_factory.mktemp("versions")
    uri = f"sqlite:///{shutil.copy(empty_database, folder)}"
    client = MlflowClient(uri)
    training = client.create_run(client.create_experiment("trainings"), run_name="vectors-7")
    client.log_param(training.info.run_id, "batch_size", 8)
    client.set_terminated(training.info.run_id)
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text(json.dumps({"run_name": "vectors-7"}))
    bundle = make_vector_bundle(folder / "vectors")
    for number, figures in enumerate(FIGURES, start=1):
        metrics = folder / f"{number}.json"
        metrics.write_text(json.dumps(figures or {}))
        weights = folder / f"{number}.pt"
        torch.save(nn.Linear(4, 2).state_dict(), weights)
        training_dir = folder / "out" if number == 1 else None
        assert register_bundle(bundle, "vectors", uri, None, metrics, (), weights, training_dir) == number
    client.log_metric(client.get_model_version("vectors", "2").run_id, "dice", math.nan)
    record = {"generator_sha256": file_digest(folder / "1.pt"), "space": "z"}
    (bundle / "models" / "trained_as.json").write_text(json.dumps(record))
    register_bundle(bundle, "encoder", uri, "champion")
    return {"uri": uri, "client": client, "folder": folder, "training": training.info.run_id}


def invoke(*arguments: str) -> str:
    return CliRunner().invoke(cli.app, ["registry", *arguments]).output


# ---- list


def test_list_gives_versions_aliases_bundle_and_metrics_in_file_order(vectors):
    encoder, first, second, third = list_models(vectors["uri"])

    assert (encoder.name, encoder.version, encoder.aliases) == ("encoder", 1, ("champion",))
    assert first.bundle == "vectors 0.2.0"
    assert list(first.metrics) == ["auroc", "frd", "l1", "n"]
    assert (second.version, third.version, dict(third.metrics)) == (2, 3, {})
    assert first.created <= second.created


def test_list_command_prints_an_aligned_table(vectors):
    header, encoder, first, *_, third = invoke("list", "--tracking_uri", vectors["uri"]).splitlines()

    for column, cell in (("VERSION", "1"), ("BUNDLE", "vectors 0.2.0"), ("METRICS", "auroc 0.82  frd 5")):
        assert first[header.index(column) :].startswith(cell)
    assert encoder[header.index("ALIASES") :].startswith("champion")
    assert third[header.index("METRICS") :] == "-"


def test_command_that_fails_says_why_in_one_line(tmp_path):
    result = CliRunner().invoke(cli.app, ["registry", "list", "--tracking_uri", f"sqlite:///{tmp_path / 'typo.db'}"])

    assert result.exit_code == 1
    assert result.output.startswith("error: no registry at ")
    assert result.output.endswith("typo.db; register a bundle first, or correct --tracking_uri\n")


# ---- show


def test_show_tells_figures_training_weights_and_requirements(vectors):
    found = show("vectors", 1, vectors["uri"])

    assert dict(found.metrics) == {"auroc": 0.82, "frd": 5.0, "l1": 0.02, "n": 100.0}
    assert dict(found.notes) == {"split": "test", "git": "abc", "fid": "NaN"}
    assert found.model_sha256 == file_digest(vectors["folder"] / "1.pt")
    assert (found.training.run_id, found.training.name) == (vectors["training"], "vectors-7")
    assert (found.training.experiment, found.training.status) == ("trainings", "FINISHED")
    assert dict(found.training.params) == {"batch_size": "8"}
    assert "torch==2.15.0" in found.requirements
    assert "(-1, 4)" in found.inputs
    assert "(-1, 2)" in found.outputs
    assert found.model_id.startswith("m-")


def test_checksum_of_the_lineage_is_recognised_as_a_registered_model(vectors):
    found = show("models:/encoder@champion", tracking_uri=vectors["uri"])

    assert dict(found.lineage) == {"generator_sha256": file_digest(vectors["folder"] / "1.pt")}
    assert dict(found.origins) == {"generator_sha256": ("models:/vectors/1",)}


def test_show_takes_the_newest_version_of_a_name(vectors):
    assert show("vectors", tracking_uri=vectors["uri"]).version == 3


def test_training_whose_run_was_deleted_is_shown_without_its_name(vectors):
    client = vectors["client"]
    before = client.get_model_version("vectors", "3").tags
    client.set_model_version_tag("vectors", "3", "training_run_id", "0" * 32)
    try:
        assert show("vectors", 3, vectors["uri"]).training.status == ""
        assert f"deleted: run {'0' * 32}" in invoke("show", "vectors", "3", "--tracking_uri", vectors["uri"])
    finally:
        client.delete_model_version_tag("vectors", "3", "training_run_id")
    assert client.get_model_version("vectors", "3").tags == before


def test_version_whose_run_is_gone_is_shown_and_compared_all_the_same(vectors, monkeypatch):
    gone, ask = vectors["client"].get_model_version("vectors", "1").run_id, MlflowClient.get_run

    def get_run(client, run_id):
        if run_id == gone:  # as after `mlflow gc`
            raise MlflowException("not found", RESOURCE_DOES_NOT_EXIST)
        return ask(client, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run)
    found = show("vectors", 1, vectors["uri"])

    assert (dict(found.notes), dict(found.metrics)) == ({}, {})
    assert found.training.name == "vectors-7"
    assert [version.version for version in compare("vectors", [1, 2], vectors["uri"]).versions] == [1, 2]


def test_show_command_prints_lines_for_a_person_or_json(vectors):
    text = invoke("show", "models:/encoder@champion", "--tracking_uri", vectors["uri"])
    found = json.loads(invoke("show", "models:/encoder/1", "--json", "--tracking_uri", vectors["uri"]))

    lines = text.splitlines()
    assert lines[0].split() == ["version", "models:/encoder/1"]
    assert "made with     generator models:/vectors/1" in lines
    assert found["origins"] == {"generator_sha256": ["models:/vectors/1"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models:/vectors/1", 2), "names a version already, got version 2 as well"),
        (("vectors", 9), "version=9"),
        (("nothing",), "has no model nothing; see"),
        (("it's",), "quotation mark"),
        (("models:/vectors",), "is named models:/NAME@ALIAS"),
    ],
)
def test_version_that_is_not_there_is_one_line(vectors, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        show(*arguments, tracking_uri=vectors["uri"])

    assert "\n" not in str(caught.value)


# ---- promote


def test_promotion_moves_the_alias_and_records_its_gate(vectors):
    first = promote("vectors", 1, "best", ["auroc>=0.8", "l1 < 0.03"], tracking_uri=vectors["uri"])
    second = promote("vectors", 2, "best", tracking_uri=vectors["uri"])

    client = vectors["client"]
    assert (first.previous, first.gate) == (None, ("auroc>=0.8 (0.82)", "l1<0.03 (0.02)"))
    assert (second.previous, second.gate) == (1, ())
    assert int(client.get_model_version_by_alias("vectors", "best").version) == 2
    tags = client.get_model_version("vectors", "1").tags
    assert tags["gate_best"] == "auroc>=0.8 (0.82); l1<0.03 (0.02)"
    assert tags["promoted_best"].endswith(" UTC")
    assert show("vectors", 1, vectors["uri"]).gates["best"].endswith("UTC: auroc>=0.8 (0.82); l1<0.03 (0.02)")
    assert client.get_model_version("vectors", "2").tags["gate_best"] == "none"


@pytest.mark.parametrize(
    ("version", "require", "message"),
    [
        (
            2,
            ["auroc>=0.8"],
            r"^models:/vectors/2 was not promoted to gated: auroc is 0.71, 0.09 off the required auroc>=0.8$",
        ),
        (2, ["frd<=5", "auroc>0.71"], r"auroc is 0.71, 0 off the required auroc>0.71$"),
        (
            2,
            ["frd<3", "auroc==0.7"],
            r"frd is 4, 1 off the required frd<3; auroc is 0.71, 0.01 off the required auroc==0.7$",
        ),
        (3, ["auroc>=0.8"], r"auroc>=0.8 is required, and the version has no figure auroc \(it has none\)$"),
        (1, ["fid<=10"], r"no figure fid \(it has auroc, frd, l1, n\)$"),  # NaN in the metrics file
        (2, ["dice<=1"], r"dice<=1 is required, and dice is nan$"),
    ],
)
def test_gate_says_which_figure_fell_short_and_moves_nothing(vectors, version, require, message):
    with pytest.raises(UserError, match=message):
        promote("vectors", version, "gated", require, tracking_uri=vectors["uri"])

    assert "gated" not in vectors["client"].get_registered_model("vectors").aliases
    assert "gate_gated" not in vectors["client"].get_model_version("vectors", str(version)).tags


def test_version_must_not_be_worse_than_the_one_that_has_the_alias(vectors):
    uri = vectors["uri"]
    promote("vectors", 1, "rival", tracking_uri=uri)

    with pytest.raises(UserError, match=r": auroc is 0.71, 0.11 off the required auroc>=0.82 of version 1$"):
        promote("vectors", 2, "rival", not_worse=["frd", "auroc"], tracking_uri=uri)
    with pytest.raises(UserError, match="no figure dice to compare with"):
        promote("vectors", 2, "rival", not_worse=["dice:higher"], tracking_uri=uri)
    assert promote("vectors", 1, "rival", not_worse=["auroc"], tracking_uri=uri).previous == 1

    assert promote("vectors", 2, "rival", not_worse=["frd"], tracking_uri=uri).gate == ("frd<=5 of version 1 (4)",)


def test_comparison_with_nobody_needs_the_figure_and_is_told(vectors):
    arguments = ("--alias", "first", "--not_worse", "auroc", "--tracking_uri", vectors["uri"])
    for version, metric, message in (
        (3, "auroc", r"not promoted to first: auroc is required, and the version has no figure auroc \(it has none\)$"),
        (2, "dice:higher", r"not promoted to first: dice is required, and dice is nan$"),
    ):
        with pytest.raises(UserError, match=message):
            promote("vectors", version, "first", not_worse=[metric], tracking_uri=vectors["uri"])
    assert "first" not in vectors["client"].get_registered_model("vectors").aliases

    text = invoke("promote", "vectors", "2", "--require", "frd<=5", *arguments)

    assert text == (
        "models:/vectors@first is version 2, which no version had; passed frd<=5 (4); auroc: no version to compare "
        "with\n"
    )
    gate = vectors["client"].get_model_version("vectors", "2").tags["gate_first"]
    assert gate == "frd<=5 (4); auroc: no version to compare with (0.71)"
    again = promote("vectors", 2, "first", not_worse=["frd"], tracking_uri=vectors["uri"])
    assert (again.previous, again.gate, again.uncompared) == (2, (), ("frd",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"require": ["auroc"]}, "a requirement is METRIC>=NUMBER"),
        ({"require": ["auroc>=high"]}, "a requirement is METRIC>=NUMBER"),
        ({"require": ["auroc>=nan"]}, "a requirement is METRIC>=NUMBER"),
        ({"require": ["auroc=>0.8"]}, "a requirement is METRIC>=NUMBER"),
        ({"not_worse": ["sharpness"]}, "METRIC:higher or METRIC:lower"),
        ({"not_worse": ["auroc:up"]}, "METRIC:higher or METRIC:lower"),
        ({"alias": "v7"}, "keeps the aliases"),
        ({"alias": "a b"}, "alias must be"),
        ({"version": 99}, "version=99"),
    ],
)
def test_promotion_that_cannot_be_read_is_one_line(vectors, change, message):
    with pytest.raises(UserError, match=message) as caught:
        promote(**({"name": "vectors", "version": 1, "alias": "x", "tracking_uri": vectors["uri"]} | change))

    assert "\n" not in str(caught.value)


def test_promote_command_says_who_had_the_alias(vectors):
    arguments = ("--alias", "told", "--tracking_uri", vectors["uri"])

    first = invoke("promote", "vectors", "1", *arguments)
    refused = CliRunner().invoke(
        cli.app, ["registry", "promote", "vectors", "2", "--require", "auroc>=0.8", *arguments]
    )
    second = invoke("promote", "vectors", "2", "--require", "frd<=4.5", *arguments)

    assert first == "models:/vectors@told is version 1, which no version had; nothing was required\n"
    assert refused.exit_code == 1
    assert refused.output.count("\n") == 1
    assert second == "models:/vectors@told is version 2, which version 1 had; passed frd<=4.5 (4)\n"


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("auroc_mse_full", "higher"),
        ("val_frd", "lower"),
        ("dice", "higher"),
        ("ms_ssim_reconstruction", "higher"),
        ("sensitivity_at_90_mse_full", "higher"),
        ("kid_frd", "lower"),
        ("ms_ssim_samples", None),  # diversity: as the reference has it
        ("frd_real", None),
        ("ms_ssim_kernel", None),
        ("auroc_mse_minus_wd_full", None),
        ("sensitivity_at_90_mse_full_threshold", None),
        ("auroc_low", None),
        ("diced", None),
        ("n", None),
    ],
)
def test_direction_is_told_only_where_it_is_known(metric, direction):
    assert direction_of(metric) == direction
