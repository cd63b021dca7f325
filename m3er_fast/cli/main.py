"""The entry point: it runs a command, and turns an error into one line on stderr and an exit code.

``--debug``, anywhere on the line, adds the traceback.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from m3er_fast.cli.exit_codes import COMPLETE, INTERNAL, USAGE, exit_code, is_disk_full, is_usage_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: the words after the program's name; None means those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        _print_line("error: the command line needs typer and rich: pip install 'm3er-fast[score]'")
        return USAGE
    from m3er_fast.cli.commands import app

    command = typer.main.get_command(app)
    with _one_line_warnings(), _sigterm_as_interrupt():
        try:
            # typer's own main would print errors over many lines and exit with its own codes.
            with command.make_context("m3er-fast", [word for word in words if word != "--debug"]) as context:
                command.invoke(context)
        except typer.Exit as leaving:
            return int(leaving.exit_code)
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in words:
                traceback.print_exception(error)
            _print_line(f"error: {_message(error)}")
            return exit_code(error)
    return COMPLETE


def _message(error: BaseException) -> str:
    """Return the description of an error, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    message = str(error)
    if is_usage_error(error):
        message = error.format_message()  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        message = f"{message.rstrip('.')} (see {context.command_path if context else 'm3er-fast'} --help)"
    elif is_disk_full(error):
        message = f"disk full: {message}"
    elif exit_code(error) == INTERNAL:
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    return " ".join(message.split())


def _print_line(line: str) -> None:
    print(f"m3er-fast: {line}", file=sys.stderr)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show each warning as one line on stderr."""

    def show(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
        _print_line(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM stop a command as Ctrl-C does: a file half written is dropped, finished results stay."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
