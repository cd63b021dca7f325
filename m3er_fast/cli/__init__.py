"""The command line: runs a command of :mod:`m3er_fast.cli.commands` and turns what goes wrong into a line and a number.

Exit codes: 0 complete; 1 internal; 2 usage or configuration; 3 finished, with something quarantined; 4 what is being
resumed was made by something else; 5 disk full; 130 interrupted. Errors are one line on stderr; ``--debug``, anywhere,
adds the traceback.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

COMPLETE, INTERNAL, USAGE, QUARANTINED, MISMATCH, DISK_FULL, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; None takes the arguments of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        _say("error: the command line needs typer and rich: pip install 'm3er-fast[score]'")
        return USAGE
    from m3er_fast.cli.commands import app

    command = typer.main.get_command(app)
    with _warnings_in_one_line(), _terminated_as_interrupted():
        try:
            # Not typer's own main: it would print errors over many lines, and exit with codes of its own.
            with command.make_context("m3er-fast", [word for word in words if word != "--debug"]) as context:
                command.invoke(context)
        except typer.Exit as leaving:
            return int(leaving.exit_code)
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in words:
                traceback.print_exception(error)
            _say(f"error: {_message(error)}")
            return _exit_code(error)
    return COMPLETE


def _exit_code(error: BaseException) -> int:
    from m3er_fast.functional import BackendUnavailableError
    from m3er_fast.scoring import OutputMismatchError
    from m3er_fast.training import ResumeMismatchError, TrainingError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if _is_disk_full(error):
        return DISK_FULL
    if isinstance(error, OutputMismatchError | ResumeMismatchError):
        return MISMATCH
    if _is_usage_error(error) or isinstance(error, ValueError | ImportError | BackendUnavailableError | TrainingError):
        return USAGE
    # Arrow's filesystems give errors of an object store no number: no such bucket, no permission, no connection.
    if isinstance(error, OSError) and (error.errno is None or error.errno in _UNUSABLE):
        return USAGE
    return INTERNAL


def _message(error: BaseException) -> str:
    """What to say of an error, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    message = str(error)
    if _is_usage_error(error):
        message = error.format_message()  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        message = f"{message.rstrip('.')} (see {context.command_path if context else 'm3er-fast'} --help)"
    elif _is_disk_full(error):
        message = f"disk full: {message}"
    elif _exit_code(error) == INTERNAL:
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    return " ".join(message.split())


def _is_usage_error(error: BaseException) -> bool:
    """Whether it comes from the parser of arguments: click's ClickException, which some typer releases bring along."""
    return hasattr(error, "format_message")


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        # safetensors reports the same without an errno.
        if (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(line: str) -> None:
    print(f"m3er-fast: {line}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
        _say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM stops a command as Ctrl-C does: what is being written is dropped, what is finished stays."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
