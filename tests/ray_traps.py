"""Faults for the Ray workers of tests/test_scoring_ray.py, in a module of their own because workers import it."""

import errno
import os
import signal
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem


class TrappedFiles(LocalFileSystem):
    """Local files, some of which kill or fail the workers that open them, but never the driver.

    Args:
        traps: folder with a trap per file, of the same name, which contains one of

            * ``kill``: every worker that reads the file dies by SIGKILL;
            * ``kill once``, ``leave once``: the first worker that reads it dies by SIGKILL, or exits with code 0;
            * ``full``: writing the file fails for lack of space.
        driver: process id of the driver.
    """

    protocol = "trapped"
    cachable = False

    def __init__(self, traps, driver, **options):
        super().__init__(**options)
        self.traps, self.driver = traps, driver

    def _open(self, path, mode="rb", **options):
        if os.getpid() != self.driver:
            for trap in Path(self.traps).iterdir():
                if trap.name in Path(path).name:
                    self._spring(trap, mode)
        return super()._open(path, mode, **options)

    def _spring(self, trap, mode):
        kind = trap.read_text()
        if "w" in mode:
            if kind == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            return
        if kind.endswith("once"):
            trap.unlink()
        if kind.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind.startswith("leave"):
            os._exit(0)


def slow_first(task):
    """Return twice the task's number. Task 0 takes longest, and the first worker that runs task 3 is killed."""
    import time

    number, mark = task
    if number == 3 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0 if number == 0 else 0.0)
    return 2 * number


def held_while_others_begin(task):
    """Return, for task 0, the number of tasks started a second after eight have been; None for the others."""
    import time

    number, folder = task
    Path(folder, str(number)).touch()
    if number:
        return None
    start = time.monotonic()
    while len(list(Path(folder).iterdir())) < 8 and time.monotonic() - start < 100.0:
        time.sleep(0.02)
    time.sleep(1.0)
    return len(list(Path(folder).iterdir()))


def is_in_the_main_thread(_task):
    import threading

    return threading.current_thread() is threading.main_thread()
