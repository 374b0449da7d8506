"""Processes that work through a list, and survive the death of any of them.

A worker that dies (killed, out of memory) takes down nothing but the task it had, which
another one does again; a task that has killed several workers is given up and named.
"""

from __future__ import annotations

import collections
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from sams_ebpf import program
from sams_ebpf.errors import SamsError

log = logging.getLogger(__name__)

MAX_DEATHS: Final = 3

T = TypeVar("T")
R = TypeVar("R")


class WorkerError(SamsError):
    """A task that failed in its worker, or killed it again and again."""


class Done(NamedTuple, Generic[T, R]):
    """A task and what came of it: one of `result` and `error`."""

    task: T
    result: R | None
    error: str | None


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def run(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[Done[T, R]]:
    """Do all tasks, in any order; with one worker in this process.

    `function` and tasks have to be importable and picklable. A SamsError or OSError is
    the task's own error; anything else that a task raises comes with its type.
    """
    waiting = collections.deque(tasks)
    if workers <= 1 or len(waiting) <= 1:
        while waiting:
            yield _try(function, waiting.popleft())
        return
    with _Supervisor(function, waiting, min(workers, len(waiting))) as supervisor:
        yield from supervisor.results()


def _try(function: Callable[[T], R], task: T) -> Done[T, R]:
    try:
        return Done(task, function(task), None)
    except (SamsError, OSError) as error:
        return Done(task, None, str(error))


class _Supervisor(Generic[T, R]):
    def __init__(
        self, function: Callable[[T], R], waiting: collections.deque[T], workers: int
    ) -> None:
        # A fork would copy locks that threads of DuckDB or gRPC hold at this moment.
        self._context = multiprocessing.get_context("spawn")
        self._function = function
        self._waiting = waiting
        self._deaths: dict[int, int] = {}
        self._workers: dict[Connection, _Worker] = {}
        self._busy: dict[Connection, T] = {}
        self._wanted = workers

    def __enter__(self) -> _Supervisor[T, R]:
        for _ in range(self._wanted):
            self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers.values():
            if worker.pipe in self._busy:
                worker.process.terminate()
            worker.pipe.close()
        for worker in self._workers.values():
            worker.process.join()

    def results(self) -> Iterator[Done[T, R]]:
        while self._busy or self._waiting:
            for pipe in list(self._workers):
                if pipe not in self._busy:
                    self._give(pipe)
            if not self._busy:
                continue
            for ready in multiprocessing.connection.wait(list(self._busy)):
                pipe = cast("Connection", ready)
                task = self._busy.pop(pipe)
                try:
                    result, error = pipe.recv()
                except (EOFError, OSError):
                    given_up = self._died(pipe, task)
                    if given_up is not None:
                        yield given_up
                else:
                    yield Done(task, result, error)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._function, theirs), daemon=True, name="sams-worker"
        )
        process.start()
        theirs.close()
        self._workers[ours] = _Worker(process, ours)

    def _give(self, pipe: Connection) -> None:
        if not self._waiting:
            return
        task = self._waiting.popleft()
        try:
            pipe.send(task)
        except OSError:  # It died while it had nothing to do.
            self._waiting.appendleft(task)
            self._replace(pipe)
        else:
            self._busy[pipe] = task

    def _died(self, pipe: Connection, task: T) -> Done[T, R] | None:
        status = self._replace(pipe)
        deaths = self._deaths[id(task)] = self._deaths.get(id(task), 0) + 1
        if deaths >= MAX_DEATHS:
            return Done(task, None, f"its worker died {deaths} times, last with status {status}")
        log.warning("a worker died (status %s); its task is done again", status)
        self._waiting.append(task)
        return None

    def _replace(self, pipe: Connection) -> int | None:
        worker = self._workers.pop(pipe)
        worker.process.join()
        pipe.close()
        self._start()
        return worker.process.exitcode


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    program.start_log("sams-aggregator")
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            done = _try(function, task)
            answer: tuple[Any, str | None] = (done.result, done.error)
        except KeyboardInterrupt:
            return
        except Exception as error:  # noqa: BLE001 - it is told to the parent, with its type
            answer = (None, f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except OSError:
            return
