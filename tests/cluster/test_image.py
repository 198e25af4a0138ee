"""The image, which cannot be built here: what goes into it, what it sets, and what it installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster import image

ROOT = image.ROOT
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
LOCK = ROOT / "cluster" / "requirements.lock"
INSTALL = ROOT / "cluster" / "install.sh"
SCRIPTS = [INSTALL, ROOT / "cluster" / "try_without_engine.sh"]


def find_tool(name: str) -> str:
    """A program of the environment or the system, or a skipped test."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed (requirements.txt has it for Linux)")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what the builder receives


def make_tree(root: Path, *files: str, rules: str | None = None) -> set[str]:
    """Files that .dockerignore lets through of a tree of empty ones."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / ".dockerignore").write_text(rules or (ROOT / ".dockerignore").read_text(encoding="utf-8"))
    return set(image.context_files(root))


@pytest.mark.parametrize(
    ("rules", "passed"),
    [
        ("", {"a", "b/c", "b/d/e.py", ".dockerignore"}),
        ("*", set()),
        ("b", {"a", ".dockerignore"}),
        ("*\n!b/d", {"b/d/e.py"}),
        ("*\n!b\nb/d", {"b/c"}),
        ("*\n!**/*.py", {"b/d/e.py"}),
        ("*\n!*/c", {"b/c"}),
        ("# a\n*/*\n", {"a", ".dockerignore"}),
        ("**/e.py\n.dockerignore", {"a", "b/c"}),
        ("*\n!?", {"a", "b/c", "b/d/e.py"}),
    ],
)
def test_patterns_mean_what_docker_says(tmp_path, rules, passed):
    assert make_tree(tmp_path, "a", "b/c", "b/d/e.py", rules=rules or "# none") == passed


def test_nothing_private_reaches_the_builder(tmp_path):
    private = [
        ".git/config", ".venv/bin/python", ".env", "mlruns/0/meta.yaml", "mlflow.db", "demo_output/model.pt",
        "data/a.png", "bundles/cxr_pggan/models/model.pt", "bundles/cxr_pggan/output/checkpoints/last.pt",
        "bundles/cxr_pggan/notes.txt", "bundles/cxr_pggan/datalist.json", "bundles/cxr_pggan/docs/model.pt",
        "bundles/cxr_pggan/docs/.secret", "bundles/cxr_pggan/configs/.env", "bundles/cxr_pggan/eval/metrics.json",
        "bundles/cxr_pggan/mlruns/0/x.json",
        "cluster/kubernetes/overlays/secret.yaml", "cluster/slurm/settings.env", "cluster/runai/settings.env",
        "src/medgen/__pycache__/cli.cpython-311.pyc", "src/medgen/data/.ipynb_checkpoints/a.py", "src/other/a.py",
        "preprocessing/patients.csv", "preprocessing/__pycache__/images.cpython-311.pyc", "tests/test_cli.py", "id_rsa",
    ]  # fmt: skip
    assert make_tree(tmp_path, *private) == set()


def test_all_that_runs_reaches_the_builder():
    passed = set(image.context_files())
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs git and a checkout")
    patterns = [r"src/medgen/.+", r"preprocessing/.+\.py", r"bundles/\w+/(configs|docs)/.+", r"bundles/\w+/LICENSE"]
    patterns += [
        r"cluster/args/.+\.json",
        r"cluster/(requirements\.lock|install\.sh|accept_rejected\.sh|check_then\.sh)",
    ]
    wanted = {name for name in tracked.stdout.split("\n") if any(re.fullmatch(p, name) for p in patterns)}
    assert wanted
    assert wanted <= passed


def test_the_builder_receives_megabytes():
    assert sum((ROOT / name).stat().st_size for name in image.context_files()) < 50e6


# ---------------------------------------------------------------------------------------------------------------------
# the Dockerfile


def instructions() -> list[list[tuple[str, str]]]:
    """(instruction, rest) of each stage, the lines before the first FROM as a stage of their own."""
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"))
    stages: list[list[tuple[str, str]]] = [[]]
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append((name, rest))
    return stages


def test_hadolint_has_nothing_to_say():
    done = subprocess.run([find_tool("hadolint"), "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([find_tool("shellcheck"), script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("made_by_it", [False, True], ids=["foreign", "own"])
def test_the_trial_deletes_nothing_that_it_has_not_made(tmp_path, made_by_it):
    # past the new mount namespace, up to the first use of Python
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho /nonexistent/python\n")
    stub.chmod(0o755)
    command = [ROOT / "cluster" / "try_without_engine.sh", tmp_path]
    environment = {**os.environ, "PYTHON": str(stub), "INSIDE": "1"}
    for name in ("data", "medgen_image/data") if not made_by_it else ("data",):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "scan.png").touch()
    if made_by_it:
        subprocess.run(command, env=environment, capture_output=True, timeout=60)
        (tmp_path / "medgen_image" / "data" / "of_last_time").touch()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "data" / "scan.png").exists()
    if made_by_it:
        assert "/nonexistent/python" in done.stderr
        assert not (tmp_path / "medgen_image" / "data" / "of_last_time").exists()
    else:
        assert done.returncode == 2
        assert re.fullmatch(r"expected no \S+/medgen_image, or one that this script made.*\n", done.stderr)
        assert (tmp_path / "medgen_image" / "data" / "scan.png").exists()


@pytest.mark.parametrize("uid", ["0", "root", "1.5"])
def test_the_trial_refuses_a_user_before_it_makes_anything(tmp_path, uid):
    command = [ROOT / "cluster" / "try_without_engine.sh", tmp_path / "new", uid]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert re.fullmatch(f"expected a number above 0 as UID, got '{uid}'; .*\n", done.stderr)


def test_base_is_named_by_digest_and_can_be_another():
    (head, *stages) = instructions()
    assert re.fullmatch(r"BASE_IMAGE=\S+@sha256:[0-9a-f]{64}", dict(head)["ARG"])
    assert all(dict(stage)["FROM"].split()[0] == "${BASE_IMAGE}" for stage in stages)


def test_runs_as_nobody_in_particular_and_asks_for_nothing():
    last = instructions()[-1]
    names = [name for name, _ in last]
    assert [rest for name, rest in last if name == "USER"] == ["10001"]
    assert not {"HEALTHCHECK", "ADD", "ENTRYPOINT", "VOLUME", "EXPOSE"} & set(names)
    # of the builder only the environment and the source; source after environment, so that it changes alone
    copies = [rest.split()[-1] for name, rest in last if name == "COPY"]
    assert copies == ["/opt/venv", "/opt/medgen"]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN")


def test_caches_lie_where_a_read_only_root_can_be_written():
    variables = image.environment()
    for name in ("HOME", "MPLCONFIGDIR", "TORCH_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        assert Path(variables[name]).is_relative_to("/tmp"), name
    assert variables["USER"]  # MONAI asks getpass for it, and a UID without passwd entry has no other
    assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert not [name for name in variables if re.search("PASSWORD|TOKEN|SECRET|KEY", name)]


def test_kubernetes_sets_what_the_image_sets():
    manifest = ROOT / "cluster" / "kubernetes" / "base" / "task" / "job.yaml"
    if not manifest.is_file():
        pytest.skip("no Kubernetes base")
    pod = yaml.safe_load(manifest.read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    variables = image.environment()
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        given = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        assert {"DATA_DIR", "OUTPUT_DIR", "HOME", "USER"} <= set(given)
        assert {name: value for name, value in given.items() if name in variables} == {
            name: variables[name] for name in given if name in variables
        }
    assert pod["securityContext"]["runAsNonRoot"]  # which holds for the image's own user, a number
    assert str(pod["securityContext"].get("runAsUser", "10001")) == dict(instructions()[-1])["USER"]


# ---------------------------------------------------------------------------------------------------------------------
# the lock file


def locked() -> dict[str, tuple[str, list[str]]]:
    """Package -> version and hashes."""
    text = re.sub(r"(?m)^\s*#.*\n", "", LOCK.read_text(encoding="utf-8"))
    found = {}
    for entry in re.sub(r"\\\n\s*", "", text).splitlines():
        pin, *hashes = entry.split("--hash=")
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", pin.strip()).groups()
        found[canonicalize_name(name)] = (version, [value.strip() for value in hashes])
    return found


def test_every_package_is_pinned_by_hash():
    packages = locked()
    assert len(packages) > 100
    for name, (_, hashes) in packages.items():
        assert hashes, name
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), name


def test_lock_file_names_no_index():
    text = LOCK.read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index-url|--find-links|^-", text, re.M)
    assert "uv pip compile" in text.splitlines()[1]  # how it was made


def test_lock_file_has_the_pins_of_requirements():
    runtime = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n# development", 1)[0]
    lines = [line.split("#")[0].strip() for line in runtime.splitlines()]
    pins = [Requirement(line) for line in lines if line]
    packages = locked()
    wrong = [
        str(pin) for pin in pins if not pin.specifier.contains(packages.get(canonicalize_name(pin.name), ("0",))[0])
    ]
    assert not wrong, "make the lock file anew: its head says how"


def test_lock_file_is_complete():
    # what each package asks for, as far as it is installed here in the same version; markers are this platform's
    from importlib.metadata import PackageNotFoundError, distribution

    if sys.platform != "linux" or sys.version_info[:2] != (3, 11):
        pytest.skip("the lock file is for Linux and Python 3.11")
    packages = locked()
    missing = set()
    for name, (version, _) in packages.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        needs = [Requirement(text) for text in installed.requires or []] if installed.version == version else []
        missing |= {
            f"{name} needs {need}"
            for need in needs
            if (need.marker is None or need.marker.evaluate({"extra": ""}))
            and canonicalize_name(need.name) not in packages
        }
    assert not missing


def run_install(tmp_path: Path, with_torch: bool) -> tuple[list[str], str]:
    """install.sh with an interpreter that only notes what it is asked: its calls, and the lock file it was given."""
    (tmp_path / "python").write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" >>{tmp_path}/calls\n'
        'case "$*" in\n'
        f"*find_spec*) exit {0 if with_torch else 1} ;;\n"
        f"*venv*/new) mkdir -p {tmp_path}/new/bin {tmp_path}/site\n"
        f"  cp {tmp_path}/site_packages {tmp_path}/new/bin/python ;;\n"
        f'*--requirement*) cp "${{@: -1}}" {tmp_path}/wanted ;;\n'
        "esac\n"
    )
    (tmp_path / "site_packages").write_text(f"#!/usr/bin/env bash\necho {tmp_path}/site\n")
    for name in ("python", "site_packages"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
    subprocess.run([INSTALL, LOCK, tmp_path / "new", "/opt/medgen"], env=environment, check=True, timeout=60)
    return (tmp_path / "calls").read_text().splitlines(), (tmp_path / "wanted").read_text()


def test_an_own_interpreter_gets_the_whole_lock_file(tmp_path):
    calls, wanted = run_install(tmp_path, with_torch=False)
    assert wanted == LOCK.read_text()
    assert not any("--system-site-packages" in call for call in calls)
    assert any({"--require-hashes", "--no-deps"} <= set(call.split()) for call in calls)


def test_a_base_with_torch_keeps_its_own(tmp_path):
    calls, wanted = run_install(tmp_path, with_torch=True)
    assert any("--system-site-packages" in call for call in calls)
    names = set(re.findall(r"(?m)^([A-Za-z0-9._-]+)==", wanted))
    dropped = set(locked()) - {canonicalize_name(name) for name in names}
    assert {"torch", "torchvision", "triton"} <= dropped
    assert all(re.match("nvidia-|cuda-|(torch|torchvision|triton)$", name) for name in dropped)
    # each package that is left still has its hashes, and those of none that was dropped
    assert wanted.count("--hash=") == sum(len(hashes) for name, (_, hashes) in locked().items() if name not in dropped)


def test_commands_run_by_the_new_interpreter_on_the_source_tree(tmp_path):
    run_install(tmp_path, with_torch=True)
    assert (tmp_path / "site" / "medgen.pth").read_text().split() == ["/opt/medgen/src", "/opt/medgen"]
    for name, module in (("medgen", "medgen.cli"), ("torchrun", "torch.distributed.run")):
        command = tmp_path / "new" / "bin" / name
        assert command.read_text().startswith(f"#!{tmp_path}/new/bin/python\nimport sys\nfrom {module} import ")
        assert os.access(command, os.X_OK)


def test_image_py_prints_the_environment_and_refuses_the_rest():
    done = subprocess.run(
        [sys.executable, ROOT / "cluster" / "image.py", "env"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert {"HOME=/tmp", "PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin", "MEDGEN_REVISION="} <= set(lines)
    wrong = subprocess.run([sys.executable, ROOT / "cluster" / "image.py", "all"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "expected files or env" in wrong.stderr
