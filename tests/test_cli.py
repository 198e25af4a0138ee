"""The ``medgen`` command line."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

from medgen import __version__, cli
from medgen.errors import UserError

runner = CliRunner()


def test_version_is_the_packages():
    result = runner.invoke(cli.app, ["--version"])

    assert result.exit_code == 0
    assert result.stdout == f"medgen {__version__}\n"


def test_help_lists_the_subcommands_that_exist():
    result = runner.invoke(cli.app, ["--help"])

    assert result.exit_code == 0
    listed = {line.split()[0] for line in result.stdout.split("Commands:\n")[1].splitlines() if line.strip()}
    assert listed == set(cli.COMMANDS)


def test_phantom_help_lists_the_layouts_and_no_other():
    result = runner.invoke(cli.app, ["phantom", "--help"])

    assert result.exit_code == 0
    assert "chest:" in result.stdout
    assert "chestxray14:" in result.stdout
    assert "mimic-cxr:" in "".join(result.stdout.split())  # lines break at the hyphen
    assert "rsna:" in result.stdout
    assert "isic:" in result.stdout


def test_help_of_phantom_imports_no_framework():
    code = (
        "import sys; from medgen.cli import app\n"
        "try: app(['phantom', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'monai', 'mlflow', 'ignite', 'pydicom'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert result.returncode == 0, result.stderr
    assert "--anomaly-fraction" in result.stdout


@pytest.mark.parametrize(
    ("layout", "next_command"),
    [
        ("chest", "python -m preprocessing.images --source {out}/images --labels {out}/truth.csv"),
        ("chestxray14", "python -m preprocessing.chestxray14 --source {out}"),
        ("mimic-cxr", "python -m preprocessing.mimic_cxr organise --source {out}"),
        ("mimic_cxr", "python -m preprocessing.mimic_cxr organise --source {out}"),
        ("rsna", "python -m preprocessing.rsna organise --source {out}"),
    ],
)
def test_phantom_says_what_it_made_and_what_to_type_next(layout, next_command, tmp_path):
    out = tmp_path / "p"

    result = runner.invoke(
        cli.app,
        f"phantom {layout} {out} --patients 2 --images-per-patient 2 --size 32 --seed 3 --anomaly-fraction 0.5",
    )

    assert result.exit_code == 0, result.stderr
    noun = "studies" if "mimic" in layout else "radiographs"
    assert f"wrote 4 synthetic {noun} of 2 patients, 2 with findings: {out}" in result.stdout
    assert next_command.format(out=out) + f" --target {out}-prepared --size 32" in result.stdout
    assert (out / "truth.csv").is_file()


def test_path_with_a_space_is_quoted_in_the_next_command(tmp_path):
    result = runner.invoke(cli.app, ["phantom", "chest", str(tmp_path / "a b"), "--patients", "1", "--size", "32"])

    assert f"--source '{tmp_path / 'a b' / 'images'}'" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["phantom", "nope", "OUT"], "error: layout must be one of chest, chestxray14, isic, liver_ct, mimic-cxr, "),
        (["phantom", "chest", "OUT", "--size", "7"], "error: size must be from 32 to 2048, got 7; change --size"),
        (["phantom", "chest", "FULL"], "error: OUT must be new or empty, got FULL"),
    ],
)
def test_mistake_is_one_line_on_stderr_and_exit_status_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.doc").write_text("x")

    result = runner.invoke(cli.app, arguments)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


def test_force_replaces_phantoms_made_otherwise(tmp_path):
    command = ["phantom", "chest", str(tmp_path / "p"), "--patients", "1", "--size", "32", "--seed"]
    runner.invoke(cli.app, [*command, "1"])

    refused = runner.invoke(cli.app, [*command, "2"])
    forced = runner.invoke(cli.app, [*command, "2", "--force"])

    assert refused.exit_code == 1
    assert "made with other values of seed" in refused.stderr
    assert forced.exit_code == 0
    assert len(list((tmp_path / "p" / "images").rglob("*.dcm"))) == 1


def test_unknown_subcommand_is_a_usage_error():
    result = runner.invoke(cli.app, ["fantom"])

    assert result.exit_code == 2
    assert "fantom" in result.stderr


@pytest.fixture
def failing(monkeypatch):
    """A subcommand ``fail`` whose one argument says how."""
    module = types.ModuleType("failing_command")
    module.app = typer.Typer()

    @module.app.command()
    def fail(how: str) -> None:
        if how == "bug":
            raise ZeroDivisionError
        try:
            raise UserError("expected a, got b; do c")
        except UserError as error:
            if how == "plain":
                raise
            raise RuntimeError("what a framework makes of it") from error

    monkeypatch.setitem(sys.modules, "failing_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fail", "failing_command")


@pytest.mark.parametrize("how", ["plain", "wrapped"])
def test_mistake_is_one_line_also_when_a_framework_has_wrapped_it(failing, how):
    result = runner.invoke(cli.app, ["fail", how])

    assert (result.exit_code, result.stderr) == (1, "error: expected a, got b; do c\n")


def test_bug_keeps_its_traceback(failing):
    result = runner.invoke(cli.app, ["fail", "bug"])

    assert isinstance(result.exception, ZeroDivisionError)


def test_traceback_of_a_mistake_can_be_asked_for(failing, monkeypatch):
    monkeypatch.setenv("MEDGEN_TRACEBACK", "1")

    result = runner.invoke(cli.app, ["fail", "plain"])

    assert isinstance(result.exception, UserError)
