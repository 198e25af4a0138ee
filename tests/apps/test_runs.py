"""Runs of a study: done once, told when they fail, told apart by their settings."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from medgen.apps import Run, Step, end_study, run_all, run_config
from medgen.errors import UserError
from medgen.preemption import AGAIN, Preempted


class Failures:
    """What the next runs of the bundle do instead of writing their file: value -> error."""

    planned: ClassVar[dict[int, BaseException]] = {}
    built: ClassVar[int] = 0  # what a record of settings must not do

    @classmethod
    def meet(cls, value: int) -> None:
        """The bundle asks here before it writes."""
        if value in cls.planned:
            raise cls.planned[value]


RATES = {"slow": 0.1, "fast": 0.5}  # rows of presets


def build(*_: object) -> str:
    """What a config builds of other things than plain settings."""
    Failures.built += 1
    return "built"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that writes a value, a random number and the bundle's place into a file."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    Failures.planned, Failures.built = {}, 0
    configs = tmp_path / "bundle" / "configs"
    configs.mkdir(parents=True)
    (configs / "metadata.json").write_text("{}")
    write = {
        "imports": ["$import json", "$import torch", "$import monai", "$import medgen", "$import test_runs"],
        "bundle_root": ".",
        "output_dir": "out",
        "value": 1,
        "device": "cpu",
        "seed": 0,
        "preset": "slow",
        "rate": "$test_runs.RATES[@preset]",
        "steps": "$round(10 / @rate)",
        "clock": "$medgen.output.unique_name('x')",
        "network_def": {"_target_": "test_runs.build"},
        "network": "$test_runs.build(@network_def, @value)",
        "log": "$test_runs.build(@output_dir, @value)",
        "data": None,
        "content": "$json.dumps([@value, torch.rand(1).item(), @bundle_root])",
        "initialize": [
            "$medgen.errors.one_line_errors()",
            "$medgen.settings.check_names()",
            "$medgen.settings.check_positive(value=@value)",
            "$monai.utils.set_determinism(seed=@value)",
        ],
        "run": [
            "$test_runs.Failures.meet(@value)",
            "$medgen.output.atomic_write_text(@output_dir + '/done.json', @content)",
        ],
    }
    (configs / "write.json").write_text(json.dumps(write))
    (configs / "twice.json").write_text(json.dumps({"content": "$str(@value) + str(@value)"}))
    return tmp_path / "bundle"


@pytest.fixture
def make_runs(tmp_path: Path) -> Callable[..., list[Run]]:
    def make(*values: int, **overrides: Any) -> list[Run]:
        return [
            Run(
                f"run{value}",
                [Step("write.json", {"value": value, "output_dir": str(tmp_path / f"run{value}"), **overrides})],
                tmp_path / f"run{value}" / "done.json",
            )
            for value in values
        ]

    return make


def read(run: Run) -> Any:
    return json.loads(run.done.read_text())


def test_config_runs_as_on_the_command_line_from_any_folder(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sys.excepthook, list(sys.path)

    run_config(["write.json", "twice.json"], "bundle", value=7, output_dir=str(tmp_path / "a"))
    (tmp_path / "own.json").write_text(json.dumps({"content": "$'own' + str(@value)"}))
    run_config(["write.json", "own.json"], bundle, value=7, output_dir="b")

    assert (tmp_path / "a" / "done.json").read_text() == "77"
    assert (tmp_path / "b" / "done.json").read_text() == "own7"
    assert (sys.excepthook, sys.path) == before


def test_runs_end_as_each_would_alone_and_know_their_bundle(bundle, make_runs):
    runs = make_runs(1, 2, 3)

    assert run_all(runs, bundle) == {}

    for value, run in enumerate(runs, 1):
        expected = torch.rand(1, generator=torch.Generator().manual_seed(value)).item()
        assert read(run) == [value, expected, str(bundle)]


def test_what_is_done_is_not_done_again(bundle, make_runs):
    runs = make_runs(1, 2, 3)
    run_all(runs, bundle)
    runs[1].done.unlink()
    Failures.planned = {1: AssertionError("done before"), 3: AssertionError("done before")}

    assert run_all(runs, bundle) == {}

    assert read(runs[1])[0] == 2


def test_failed_run_is_told_and_the_others_go_on(bundle, make_runs):
    runs = make_runs(1, -2, 3)
    Failures.planned = {3: torch.OutOfMemoryError("CUDA out of memory")}

    failed = run_all(runs, bundle)

    assert list(failed) == ["run-2", "run3"]
    assert failed["run-2"] == "value must be a number above 0, got -2; set --value"
    assert failed["run3"].startswith("out of memory")
    assert read(runs[0])[0] == 1
    assert not runs[1].done.exists()
    Failures.planned = {}
    assert list(run_all(runs, bundle)) == ["run-2"]  # tried again: what failed may have been mended
    assert read(runs[2])[0] == 3


def test_mistake_of_the_program_keeps_its_traceback(bundle, make_runs):
    Failures.planned = {1: KeyError("a slip")}

    with pytest.raises(RuntimeError) as caught:
        run_all(make_runs(1, 2), bundle)

    assert isinstance(caught.value.__cause__, KeyError)


def test_told_to_end_it_ends_with_again_and_the_same_call_goes_on(bundle, make_runs):
    runs = make_runs(1, 2, 3)
    Failures.planned = {2: Preempted()}

    with pytest.raises(SystemExit) as caught:
        run_all(runs, bundle)

    assert caught.value.code == AGAIN
    assert [run.done.exists() for run in runs] == [True, False, False]
    Failures.planned = {1: AssertionError("done before")}
    assert run_all(runs, bundle) == {}
    assert [read(run)[0] for run in runs] == [1, 2, 3]


def test_shards_share_the_runs(bundle, make_runs):
    runs = make_runs(1, 2, 3, 4, 5)

    run_all(runs, bundle, "1/2")

    assert [run.done.exists() for run in runs] == [False, True, False, True, False]
    run_all(runs, bundle, "0/2")
    Failures.planned = {value: AssertionError("done before") for value in range(6)}
    assert run_all(runs, bundle) == {}


def test_results_of_other_settings_are_refused_before_anything_runs(bundle, make_runs, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[1]")
    run_all(make_runs(2, data=str(data)), bundle)

    # where it computes and where the same data lie changes nothing
    moved = tmp_path / "moved.json"
    moved.write_text("[1]")
    assert run_all(make_runs(2, data=str(moved), device="cuda"), bundle) == {}

    moved.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"run2 was made with data sha256 .*, this study has sha256 .*; choose another"):
        run_all(make_runs(1, 2, data=str(moved)), bundle)
    assert not make_runs(1)[0].done.exists()


def test_other_settings_are_told_apart(bundle, make_runs):
    run_all(make_runs(2), bundle)

    for change, message in (
        ({"seed": 1}, "run2 was made with seed 0, this study has 1; choose another --output_dir, or delete"),
        ({"preset": "fast"}, "run2 was made with preset slow, this study has fast"),
        ({"steps": "$20 * @value"}, "run2 was made with steps 100, this study has 40"),
    ):
        with pytest.raises(UserError, match=message):
            run_all(make_runs(2, **change), bundle)


def test_changed_preset_or_config_is_other_settings(bundle, make_runs, monkeypatch):
    (run,) = make_runs(2)
    run_all([run], bundle)
    (recorded,) = json.loads(run.record.read_text())
    assert (recorded["rate"], recorded["steps"], recorded["seed"]) == (0.1, 100, 0)
    # neither networks are built for it nor what takes places of this machine, and the clock is no setting
    assert Failures.built == 0
    assert (
        not {"clock", "network_def", "network", "log", "device", "output_dir", "bundle_root", "run"} & recorded.keys()
    )

    with monkeypatch.context() as patch:
        patch.setitem(RATES, "slow", 0.25)
        with pytest.raises(UserError, match=r"run2 was made with rate 0.1, this study has 0.25; choose another"):
            run_all([run], bundle)
    path = bundle / "configs" / "write.json"
    path.write_text(path.read_text().replace("torch.rand(1)", "torch.rand(2)[0]"))
    with pytest.raises(UserError, match=r"run2 was made with config_file \['write.json \w{16}'\], this study has"):
        run_all([run], bundle)


def test_unknown_setting_is_told_before_anything_runs(bundle, make_runs):
    with pytest.raises(UserError, match="no setting vaule in"):
        run_all([*make_runs(1), *make_runs(2, vaule=3)], bundle)
    assert not make_runs(1)[0].done.exists()


def test_results_without_their_settings_are_refused(bundle, make_runs):
    (run,) = make_runs(1)
    run.done.parent.mkdir()
    run.done.write_text("[]")

    with pytest.raises(UserError, match=r"done.json must be of this study, got a file without done.run.json"):
        run_all([run], bundle)
    run.record.write_text('[{"config_file": ')
    with pytest.raises(UserError, match=r"done.run.json cannot be read \(.*\); delete"):
        run_all([run], bundle)


@pytest.mark.parametrize(
    ("config_file", "overrides", "message"),
    [
        ("write.json", {"vaule": 3}, r"no setting vaule in .*write.json; did you mean --value\?"),
        ("train.json", {}, r"no config train.json in .*configs, nor a file"),
    ],
)
def test_unknown_setting_or_config_is_told(bundle, config_file, overrides, message):
    with pytest.raises(UserError, match=message):
        run_config(config_file, bundle, **overrides)


def test_exit_code_tells_whether_some_or_all_have_failed(capsys):
    end_study({}, 3)
    with pytest.raises(SystemExit) as caught:
        end_study({"a": "it diverged"}, 3)
    assert caught.value.code == 3
    assert capsys.readouterr().err == "1 of 3 runs have failed, the others are done: a: it diverged\n"
    with pytest.raises(UserError, match="all 1 runs have failed, a of them so: it diverged"):
        end_study({"a": "it diverged"}, 1)
    with pytest.raises(SystemExit):  # what became of the other shares is not known
        end_study({"a": "it diverged"}, 1, "0/2")


def test_importing_the_applications_starts_neither_torch_nor_monai():
    code = (
        "import sys; from medgen.apps import Run, GeneratorStudy; print({'torch', 'monai', 'mlflow'} & {*sys.modules})"
    )
    assert os.popen(f'{sys.executable} -c "{code}"').read().strip() == "set()"
