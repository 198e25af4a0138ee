"""One line for a person, whatever a framework wrapped around it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from medgen.errors import UserError, find_user_error, one_line_errors


def fail_as_monai_does():
    try:
        raise UserError("size must be 64, got 63")
    except UserError as error:
        raise RuntimeError("Failed to instantiate component") from error


def test_finds_the_message_below_what_the_framework_raised():
    with pytest.raises(RuntimeError) as caught:
        fail_as_monai_does()
    assert find_user_error(caught.value) == "size must be 64, got 63"


def test_finds_the_message_in_the_text_that_a_worker_process_sends():
    text = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "medgen.errors.UserError: a.png is 3 pixels wide\n\nThe above exception was the direct cause of\n"
        "RuntimeError: applying transform"
    )
    assert find_user_error(RuntimeError(text)) == "a.png is 3 pixels wide"


def test_a_subclass_is_found_in_a_workers_text_as_well():
    text = "Original Traceback:\nmedgen.data.reader.UnreadableImageError: a.dcm is cut short\n"
    assert find_user_error(RuntimeError(text)) == "a.dcm is cut short"


def test_other_errors_are_not_taken_for_the_users():
    assert find_user_error(KeyError("image")) is None


SCRIPT = """
from medgen.errors import *
one_line_errors()
try:
    {raised}
except Exception as error:
    raise RuntimeError("outer") from error
"""


def run(raised: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(raised=raised)], capture_output=True, text=True, env=env or None
    )


def test_a_users_mistake_is_printed_as_one_line_with_status_1():
    done = run("raise UserError('size must be 64')")
    assert (done.returncode, done.stderr) == (1, "error: size must be 64\n")


def test_an_interrupt_is_one_line_that_says_how_to_go_on():
    done = run("raise KeyboardInterrupt")
    assert done.stderr == "interrupted; a training goes on from its last checkpoint with --resume true\n"


TOLD = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"


def test_sigterm_ends_with_the_code_for_again_and_one_line():
    done = run(f"import os, signal, time; {TOLD}")
    assert (done.returncode, done.stderr) == (75, "ended by SIGTERM; the same command does what is left\n")


FORK = """
import os, signal, sys, time
from medgen.errors import one_line_errors
one_line_errors()
reader, writer = os.pipe()
process = os.fork()
if process == 0:
    os.write(writer, b"ready")  # Python forgets a signal that comes before
    time.sleep(60)
    os._exit(1)
os.read(reader, 5)
os.kill(process, signal.SIGTERM)
sys.exit(os.WTERMSIG(os.waitpid(process, 0)[1]) != signal.SIGTERM)
"""


def test_sigterm_ends_a_forked_process_and_one_of_torchrun_by_its_default():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False).returncode == 0
    done = run(f"import os, signal, time; {TOLD}", TORCHELASTIC_RUN_ID="none")
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_what_acts_on_sigterm_already_stays(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.signal(signal.SIGTERM, mine := lambda *_: None)
    try:
        one_line_errors()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_errors_keep_their_traceback():
    done = run("1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_the_environment_brings_the_traceback_back():
    assert "Traceback" in run("raise UserError('x')", MEDGEN_TRACEBACK="1").stderr
