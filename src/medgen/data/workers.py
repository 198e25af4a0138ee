"""Work on many images in processes: results in order, bounded memory, and a crash costs one task."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from medgen.errors import UserError

__all__ = ["CRASHED", "default_workers", "map_each", "ordered_map"]

CRASHED = "the process that worked on it crashed or was killed (damaged file, or too little memory)"

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_environment_lock = threading.Lock()
_in_worker: dict[str, Any] = {}  # what a worker process was started with


def default_workers() -> int:
    """One per core that this process may use, at most 8: beyond, the disk is the limit."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def map_each(
    function: Callable[[Shared, Task], Result],
    shared: Shared,
    items: Sequence[Task],
    num_workers: int,
    crashed: Result,
    per_task: int = 8,
) -> Iterator[Result]:
    """:func:`ordered_map` over items that take milliseconds each: a few go to a process at a time.

    Args:
        function: called as ``function(shared, item)``; importable by name.
        shared: sent to each process once.
        items: what to work on.
        num_workers: processes; 0 works in this one.
        crashed: result in the place of that of an item that ended its process.
        per_task: items that travel together.

    Yields:
        One result per item.

    Raises:
        UserError: no process can be started.
    """
    if num_workers <= 0:
        yield from ordered_map(function, shared, items)
        return
    tasks = [items[start : start + per_task] for start in range(0, len(items), per_task)]
    results = ordered_map(_each, (function, shared), tasks, num_workers, _nothing)
    for task, found in zip(tasks, results, strict=True):
        # nothing: a process ended on one of these; alone, only that one is lost
        yield from found or ordered_map(function, shared, task, 1, lambda _: crashed)


def _each(shared: tuple[Callable[[Shared, Task], Result], Shared], items: Sequence[Task]) -> list[Result]:
    function, inner = shared
    return [function(inner, item) for item in items]


def _nothing(_: object) -> list[Any]:
    return []


def ordered_map(
    function: Callable[[Shared, Task], Result],
    shared: Shared,
    tasks: Iterable[Task],
    num_workers: int = 0,
    on_crash: Callable[[Task], Result] | None = None,
) -> Iterator[Result]:
    """Apply a function to tasks and yield the results in the tasks' order.

    At most four tasks per process are under way or wait to be taken, so memory does not grow with their number.

    Args:
        function: called as ``function(shared, task)``; importable by name.
        shared: sent to each process once, for what is too large to go with each task.
        tasks: what to work on; sent to the processes.
        num_workers: processes; 0 works in this one.
        on_crash: result in the place of that of a task that ended its process; None lets ``BrokenProcessPool`` rise.

    Yields:
        One result per task.

    Raises:
        UserError: no process can be started.
    """
    if num_workers <= 0:
        for task in tasks:
            yield function(shared, task)
        return
    todo = iter(tasks)
    pool = _new_pool(num_workers, shared)
    running: deque[tuple[Task, Future[Result]]] = deque()
    try:
        while True:
            try:
                for task in islice(todo, 4 * num_workers - len(running)):
                    running.append((task, _submit(pool, function, task)))
                if not running:
                    return
                result = running[0][1].result()
            except BrokenProcessPool:
                if on_crash is None:
                    raise
                suspects = [task for task, _ in running]
                pool.shutdown(cancel_futures=True)
                running.clear()
                yield from _one_by_one(function, shared, suspects, on_crash)
                pool = _new_pool(num_workers, shared)
                continue
            running.popleft()
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Any, Task], Result], task: Task) -> Future[Result]:
    try:
        return pool.submit(_run, function, task)
    except BrokenProcessPool as error:  # the task just taken from the iterator must be among those tried again
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed


def _one_by_one(
    function: Callable[[Shared, Task], Result],
    shared: Shared,
    suspects: Iterable[Task],
    on_crash: Callable[[Task], Result],
) -> Iterator[Result]:
    """Find the task that ended a process: each is tried alone."""
    pool = _new_pool(1, shared)
    try:
        _check_starts(pool)
        for task in suspects:
            try:
                yield pool.submit(_run, function, task).result()
            except BrokenProcessPool:
                yield on_crash(task)
                pool.shutdown()
                pool = _new_pool(1, shared)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_starts(pool: ProcessPoolExecutor) -> None:
    """See that it is not every task that ends its process, but the tasks."""
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise UserError(
            "processes end as soon as they start: a script must do its work below `if __name__ == '__main__':`, since "
            "each process imports it; or set num_workers to 0"
        ) from None


class _OneThreadProcess(SpawnProcess):
    """A process whose linear algebra keeps to one core: the others have processes of their own.

    The libraries read these variables when they are loaded, and a pool starts processes whenever it needs one.
    """

    def start(self) -> None:
        with _environment_lock, _environment(dict.fromkeys(THREAD_VARIABLES, "1")):
            super().start()


class _Context(SpawnContext):
    # spawn: the parent may have threads (torch, a notebook), which a fork would leave behind locked
    Process = _OneThreadProcess


def _new_pool(workers: int, shared: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, _Context(), _start_worker, (shared,))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker(shared: Any) -> None:
    # Ctrl-C reaches every process of the terminal; only the first one may act on it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # decoders' remarks would tear the progress bar
    # a killed parent cannot end its workers, and they would wait for the next task for ever
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _in_worker["shared"] = shared


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_in_worker["shared"], task)
