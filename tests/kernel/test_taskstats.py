"""Exit records of this kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sams_ebpf import taskstats
from sams_ebpf.errors import NotPossibleError
from sams_ebpf.taskstats import Exit, Listener

pytestmark = pytest.mark.kernel


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()


def of(exits: list[Exit], parent: int, pid: int) -> Exit:
    (found,) = [one for one in exits if (one.parent, one.pid) == (parent, pid)]
    return found


def test_one_record_per_process(listener: Listener) -> None:
    program = (
        "import threading, time\n"
        "def work():\n"
        "    end = time.thread_time() + .05\n"
        "    while time.thread_time() < end: pass\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    python = os.path.realpath(sys.executable)
    before = time.time()
    many = subprocess.Popen([python, "-c", program])
    many.wait()
    one = subprocess.Popen(["/bin/true"])
    one.wait()
    exits, lost = listener.drain()
    assert lost == 0
    status = Path(python).stat()
    threaded = of(exits, os.getpid(), many.pid)
    assert threaded.file == (status.st_dev, status.st_ino)
    assert threaded.cpu_ns >= 160_000_000
    assert threaded.peak_bytes > 4 << 20
    single = of(exits, os.getpid(), one.pid)
    assert single.comm == b"true"
    status = Path("/bin/true").stat()
    assert single.file == (status.st_dev, status.st_ino)
    assert single.cpu_ns < 160_000_000
    for found in (threaded, single):
        assert before - 2 <= found.begin_s <= time.time() + 1
    assert listener.drain()[1] == 0


def test_what_the_buffer_cannot_hold_is_counted() -> None:
    listener = Listener(buffer_bytes=16384)
    pids = [subprocess.Popen(["true"]) for _ in range(100)]
    for process in pids:
        process.wait()
    exits, lost = listener.drain()
    listener.close()
    mine = [one for one in exits if one.parent == os.getpid()]
    assert 0 < len(mine) < 100
    assert lost >= 100 - len(mine)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (["setpriv", "--bounding-set", "-net_admin"], "taskstats: Operation not permitted"),
        (["unshare", "--net"], "taskstats: exits are not told here"),
        (["unshare", "--pid", "--fork"], "taskstats: "),
    ],
)
def test_where_it_is_not_to_be_had(prefix: list[str], words: str) -> None:
    program = (
        "from sams_ebpf import errors, taskstats\n"
        "try: taskstats.Listener()\n"
        "except errors.NotPossibleError as error: print(error)\n"
    )
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(words)
    assert done.stdout.count("\n") == 1


def test_a_kernel_that_names_no_executables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskstats, "LEAST_VERSION", 10_000)
    with pytest.raises(NotPossibleError, match="name no executables"):
        Listener()


@pytest.mark.parametrize("data", [b"", b"\0" * 20, b"\xff" * 700, b"\4\0\4\0" * 200])
def test_anything_else_is_nobodys_death(data: bytes) -> None:
    assert taskstats.parse(data) is None
