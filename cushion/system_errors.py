"""What the system refuses a command: no room, a place that cannot be read or written, no locks. Told in one line."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

from safetensors import SafetensorError

from cushion.errors import CushionError

MENDABLE = (CushionError, OSError, SafetensorError)
"""What may end a command by something that its user can mend: what `end` is given."""

_NO_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""What the system says where a folder or file cannot be made or looked at."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""What it says where there are no locks: network file systems without a lock service, mostly."""


def told(error: BaseException, elsewhere: str) -> str | None:
    """An error of the system that a user can mend, and the way out; None for any other error.

    Args:
        elsewhere: what a user does to have the command read and write at another place.

    """
    if is_full_disk(error):
        advice = "make room, and give the same command again: it goes on from here"
        return f"{' '.join(str(error).split())}: {advice}"
    if isinstance(error, OSError) and error.filename is not None and error.errno in _NO_PLACE:
        return f"{error.filename}: {error.strerror}: {elsewhere}, or mend it"
    if isinstance(error, OSError) and error.errno in _NO_LOCKS:
        return f"files cannot be locked ({error.strerror}): {elsewhere}, on another file system"
    return None


def end(command: str, error: Exception, elsewhere: str) -> NoReturn:
    """End a command by an error: one line and exit status 1 where a user can mend it; a bug goes on its way.

    Args:
        command: its name.
        error: what ends it.
        elsewhere: as for `told`.

    """
    line = str(error) if isinstance(error, CushionError) else told(error, elsewhere)
    if line is None:
        raise error
    print(f"{command}: error: {line}", file=sys.stderr)
    sys.exit(1)


def is_full_disk(error: BaseException) -> bool:
    """Whether something could not be written for want of room (safetensors has an error of its own for it)."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)
