"""A user's mistake ends in one line: what file, what was found, what to do."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave (file, option, checkpoint) cannot be used; the message says it all."""

    def __str__(self) -> str:
        # A DataLoader worker's error arrives as the text of its traceback: keep the message.
        return super().__str__().rpartition("InputError: ")[2].strip()


def one_line(main: Callable[..., None]) -> Callable[..., None]:
    """Run a command line so that user errors and I/O errors print one line and exit with 2.

    Bugs still raise with their traceback; Ctrl-C exits with 130.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except (InputError, OSError) as error:
            sys.exit(_complain(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def _complain(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2
