"""Errors that are part of the interface, and how commands report them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13
EXIT_TERMINATED = 128 + 15
_OPEN_FILES = 1 << 16
# Commands have raised the soft limit to it.
RAISE_OPEN_FILES = "have the hard limit raised (ulimit -Hn), in limits.conf or as a service's LimitNOFILE"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ADVICE = {
    errno.EMFILE: f"too many open files: {RAISE_OPEN_FILES}",
    errno.ENFILE: "too many open files on this machine",
}


class UserError(ValueError):
    """Something the user can fix. Each problem is one line: what is wrong, where, and what to do."""


class AttemptFailed(UserError):
    """An error that may not recur, such as a file system that did not answer: a launcher tries again, as after a
    crash."""


class BadTokens(UserError):
    """Ids outside the vocabulary. The rank that reads them may be the only one to know."""


# What a network or its file system answers while it is away.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ESHUTDOWN),
    errno.EBUSY,  # S3's "slow down" and "service unavailable", as s3fs says it
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN, errno.ECONNRESET),
}


def file_error(message: str, error: Exception) -> UserError:
    """Return the error with a message for the user: an `AttemptFailed` if the other side did not answer."""
    return (AttemptFailed if is_away(error) else UserError)(message)


def is_away(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is a connection's: libraries of storage have errors of their own."""
    from socket import EAI_AGAIN  # the name server did not answer

    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in {EAI_AGAIN, *_PASSING}:
            return True
        status = getattr(getattr(error, "response", None), "status_code", None)  # of an HTTP client's error
        if isinstance(status, int) and (status == 429 or status >= 500):
            return True
        error = error.__cause__ or error.__context__  # httpcore hides the system's error by `from None`
    return False


def run_command(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command's `main`; returns its exit status.

    Each line of a `UserError` becomes an `error:` line on stderr, status 2, and so does an error of the operating
    system: no space, no permission, no such folder. Ctrl-C prints the line `interrupted`, status 130. A command whose
    reader has left, as `head` does, exits as if killed by SIGPIPE.
    """
    prepare_streams()
    _allow_open_files()
    try:
        _check_current_folder()
        status = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _say(interrupted)
        return EXIT_INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _lost_its_reader(sys.stdout):
            _drop_output()
            return EXIT_BROKEN_PIPE
        if output_cannot_be_written():
            _drop_output()
            print_error(f"cannot write to the standard output: {error.strerror}")
            return EXIT_USER_ERROR
        if error.errno is None:  # not the operating system's
            raise
        print_error(describe_os_error(error))
        return EXIT_USER_ERROR
    except ImportError as error:
        if os.strerror(errno.EMFILE) not in str(error):
            raise
        print_error(_ADVICE[errno.EMFILE])
        return EXIT_USER_ERROR


def _allow_open_files() -> None:
    """Raise the limit of open files for this process and those it starts, as far as the system lets it: each source of
    a run is several mapped files, and rank 0 has two connections to every other rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than its hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its type's name if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def describe_os_error(error: OSError) -> str:
    """Format the error as one line that names the file."""
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.filename2 is not None:
        where = f"{error.filename} to {error.filename2}: "
    return where + _ADVICE.get(error.errno or 0, error.strerror or str(error))


def prepare_streams() -> None:
    """Make the standard streams accept whatever a command prints.

    One that the caller has closed becomes /dev/null; otherwise the next opened file would get its number. Characters
    that the encoding lacks are escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)  # inheritable, unlike what `open` returns
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hear_every_interrupt() -> None:
    """Raise a Ctrl-C again that comes while an object is freed, which Python would only report as ignored."""

    def hear(found: sys.UnraisableHookArgs) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(found)
            return
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    sys.unraisablehook = hear


def clean_up_when_terminated() -> None:
    """From now on, have SIGTERM end this process by an exception, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))


def quiet_streams() -> None:
    """Silence errors of streams that are garbage-collected: on a full disk torch's checkpoint writer fails, which is
    reported, and fails again when its streams are dropped."""
    report = sys.unraisablehook
    sys.unraisablehook = lambda found: None if isinstance(found.object, io.IOBase) else report(found)


def go_on_without_readers() -> None:
    """From now on, drop what the standard streams cannot take: the reader has left, or the disk is full."""
    prepare_streams()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        stream.flush()
        lossy = io.BufferedWriter(_Lossy(number, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(lossy, stream.encoding, "backslashreplace", line_buffering=True))


class _Lossy(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None means that a non-blocking pipe is full


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder no longer exists: change to another one (cd)") from None


def _lost_its_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLERR)
    return bool(poll.poll(0))


def output_cannot_be_written() -> bool:
    """Return whether stdout cannot be written. The last output is still in the buffer, so flushing it fails again.
    Without a buffer (python -u), only writing another line tells."""
    try:
        if getattr(sys.stdout, "write_through", False):
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Send stdout to /dev/null, so that the flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception | str) -> None:
    """Print the error on stderr, without a traceback."""
    for line in str(error).splitlines():
        _say(f"error: {line}")


def printable(text: str) -> str:
    """Escape characters that control a terminal; a stranger's file may have put them there."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _say(line: str) -> None:
    """Print a line on stderr, or drop it if stderr is full or has lost its reader: the exit status says it too."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
