"""The entry point: it runs a command, and turns an error into one line on stderr and an exit code.

``--debug``, anywhere on the line, adds the traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from m3er_fast._validation import near_names
from m3er_fast.cli.exit_codes import (
    COMPLETE,
    INTERNAL,
    OUTPUT_CLOSED,
    USAGE,
    exit_code,
    is_disk_full,
    is_usage_error,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: the words after the program's name; None means those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _all_characters_shown():
        try:
            code = _run(words)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as error:  # rich turns the first into the second
            if not _drop_closed_output() and not isinstance(error.__context__, BrokenPipeError):
                raise
            return OUTPUT_CLOSED
        return code


def _run(words: Sequence[str]) -> int:
    """Run a command, and return the exit code."""
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
            if isinstance(error, BrokenPipeError) and _drop_closed_output():
                return OUTPUT_CLOSED
            if "--debug" in words:
                traceback.print_exception(error)
            _print_line(f"error: {_message(error)}")
            return exit_code(error)
    return COMPLETE


def _message(error: BaseException) -> str:
    """Return the description of an error, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return ": ".join(filter(None, ["interrupted", str(error)]))  # a command that can go on says how
    message = str(error)
    if is_usage_error(error):
        message = _usage_message(error)
    elif is_disk_full(error):
        message = f"disk full: {message}"
    elif exit_code(error) == INTERNAL:
        message = f"{type(error).__name__}: {message} (--debug shows where)"
    return " ".join(message.split())


def _usage_message(error: Any) -> str:
    """Return the description of an error of the argument parser, with the page that helps."""
    context = getattr(error, "ctx", None)
    message, option = error.format_message(), getattr(error, "option_name", None)
    if context is not None and option is not None and hasattr(error, "possibilities"):  # there is no such option
        options = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        message = f"No such option: {option}{near_names(option, [name for name in options if name[:2] == '--'])}"
    return f"{message.rstrip('.')} (see {context.command_path if context else 'm3er-fast'} --help)"


def _print_line(line: str) -> None:
    print(f"m3er-fast: {line}", file=sys.stderr)


@contextlib.contextmanager
def _all_characters_shown() -> Iterator[None]:
    """Show a question mark for each character that the terminal's encoding lacks."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def _drop_closed_output() -> bool:
    """Return whether nobody reads stdout or stderr any more; what is still to be written there is then dropped."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a stream of a test or a notebook has no file
            if _is_closed_pipe(stream.fileno()):
                found = True
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    return found


def _is_closed_pipe(number: int) -> bool:
    """Return whether a file descriptor is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


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
