"""The exit codes of the command line, and the code of each error."""

from __future__ import annotations

import errno

COMPLETE = 0
INTERNAL = 1
USAGE = 2  # usage or configuration
QUARANTINED = 3  # finished, with something quarantined
MISMATCH = 4  # the run to resume was made by something else
DISK_FULL = 5
INTERRUPTED = 130
OUTPUT_CLOSED = 141  # as a shell reports a program that a closed pipe has ended

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends with ``error``."""
    from m3er_fast.functional import BackendUnavailableError
    from m3er_fast.scoring import OutputMismatchError
    from m3er_fast.training import ResumeMismatchError, TrainingError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_disk_full(error):
        return DISK_FULL
    if isinstance(error, OutputMismatchError | ResumeMismatchError):
        return MISMATCH
    if is_usage_error(error) or isinstance(error, ValueError | ImportError | BackendUnavailableError | TrainingError):
        return USAGE
    # Arrow's filesystems leave errno empty for an object store: no such bucket, no permission, no connection.
    if isinstance(error, OSError) and (error.errno is None or error.errno in _UNUSABLE):
        return USAGE
    return INTERNAL


def is_usage_error(error: BaseException) -> bool:
    """Return whether the argument parser raised ``error``: a ClickException of click, or of typer's own copy of it."""
    return hasattr(error, "format_message")


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether ``error``, or an error that led to it, reports a full disk."""
    while error is not None:
        # safetensors reports a full disk without an errno.
        if (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
