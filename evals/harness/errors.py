"""What a user of the command line typed wrong, or a file that is not there: one line, no traceback."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Its text is printed as it is, and the exit status is 2."""


class RunError(Exception):
    """What stopped a run midway, a full disk or a number that is none: one line too, and the exit status is 1."""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """`unknown task 'niha': did you mean 'niah'?`, or all names where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return UsageError(f"unknown {what} {name!r}: {hint}")
