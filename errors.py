"""A user's mistake ends in one line: what file, what was found, what to do."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave (file, option, checkpoint) cannot be used; the message says it all."""

    def __str__(self) -> str:
        # A DataLoader worker's error arrives as the text of its traceback: keep the message.
        return super().__str__().rpartition("InputError: ")[2].strip()


def one_line(main: Callable[..., None]) -> Callable[..., None]:
    """Run a command line so that user errors and I/O errors print one line and exit with 2.

    Bugs still raise with their traceback; Ctrl-C exits with 130, a reader of our output that went
    away (`| head`) with 141: the shell's numbers for SIGINT and SIGPIPE.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
            sys.stdout.flush()  # what cannot be written is told here, not by Python's own exit
        except (InputError, OSError) as error:
            sys.exit(141 if _reader_has_gone(error) else _complain(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def _reader_has_gone(error: Exception) -> bool:
    """Whether `error` is of standard output's reader, not of a socket: one more line tells.

    What standard output does not take would fail again, with a traceback, at Python's exit.
    """
    try:
        print(end="\n" if isinstance(error, BrokenPipeError) else "", flush=True)
    except OSError as again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(again, BrokenPipeError)
    return False


def _complain(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2
