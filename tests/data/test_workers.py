"""Work in processes: order, bounded memory, crashes that cost one task, and an end with the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from medgen.data.workers import map_each, ordered_map


def square_or_die(offset: int, number: int) -> int:
    if number in (5, 6):
        os._exit(1)  # as a decoder that reads a null pointer
    return number * number + offset


def divide(dividend: int, divisor: int) -> float:
    return dividend / divisor


def result(number: int) -> int:
    return -1 if number in (5, 6) else number * number + 100


@pytest.mark.parametrize("per_task", [1, 4])
def test_results_come_in_order_and_a_crash_costs_one_item(per_task: int) -> None:
    results = list(map_each(square_or_die, 100, range(12), num_workers=2, crashed=-1, per_task=per_task))

    assert results == [result(number) for number in range(12)]


def test_task_that_crashes_is_named_to_its_caller() -> None:
    results = list(ordered_map(square_or_die, 100, range(8), num_workers=2, on_crash=lambda task: f"lost {task}"))

    assert results == [100, 101, 104, 109, 116, "lost 5", "lost 6", 149]


def test_crash_is_an_error_where_nothing_was_said_of_it() -> None:
    with pytest.raises(BrokenProcessPool):
        list(ordered_map(square_or_die, 0, [5], num_workers=1))


def test_work_in_processes_equals_work_in_this_one() -> None:
    tasks = [n for n in range(9) if n not in (5, 6)]

    assert list(ordered_map(square_or_die, 1, tasks, 2)) == list(ordered_map(square_or_die, 1, tasks, 0))


def own_threads(variable: str, _: int) -> str | None:
    return os.environ.get(variable)


def test_a_process_keeps_to_one_core_and_its_parent_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)

    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
        assert set(ordered_map(own_threads, variable, range(8), num_workers=2)) == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_the_function_rises_where_the_result_is_taken(num_workers: int) -> None:
    results = ordered_map(divide, 6, [3, 0, 2], num_workers)

    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_tasks_are_taken_a_few_at_a_time_and_the_processes_end_with_the_loop() -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(10_000, 20_000):
            taken.append(number)
            yield number

    results = ordered_map(square_or_die, 0, tasks(), num_workers=2)
    next(results)
    while_running = len(taken)
    results.close()

    assert while_running <= 8
    assert not multiprocessing.active_children()


def test_no_items_start_no_process() -> None:
    assert list(map_each(square_or_die, 0, [], num_workers=2, crashed=-1)) == []
    assert not multiprocessing.active_children()


def test_script_without_a_main_guard_is_told_so_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from medgen.data.workers import map_each\n"
        "from medgen.errors import UserError\n"
        "try:\n"
        "    print(list(map_each(divmod, 7, [1, 2], num_workers=2, crashed=None)))\n"
        "except UserError as error:\n"
        "    print(f'told: {error}')\n"
    )

    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)

    (told,) = [line for line in done.stdout.splitlines() if line.startswith("told")]
    assert "if __name__ == '__main__'" in told


def runs(process: Path) -> bool:
    """Whether a process of /proc is there and no zombie that nobody has asked after."""
    try:
        return "(zombie)" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not Path("/proc").is_dir(), reason="looks at /proc")
def test_processes_of_a_killed_parent_end(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from medgen.data.workers import ordered_map\n"
        "def wait(_, task):\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    results = ordered_map(wait, None, range(1000), num_workers=1)\n"
        "    print(next(results), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = Path("/proc") / parent.stdout.readline().strip()
        alive = runs(worker)
        parent.kill()

    deadline = time.monotonic() + 60
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive
    assert not runs(worker)
