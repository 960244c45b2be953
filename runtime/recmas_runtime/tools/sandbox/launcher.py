"""The first program inside a sandbox: binds its limits to itself, then becomes the given program.

It is passed as text (`python -c`), so it imports the standard library only. Its arguments are
a JSON object of settings; the program's code comes first on standard input, what is left there is
the program's own input.
"""

import json
import os
import resource
import sys


def launch(code_bytes: int, user: int, limits: dict[str, int]) -> None:
    """Bind the limits, drop what is left of root, and run the code in this process's place."""
    for name, value in limits.items():
        limit = getattr(resource, name)
        _, hard = resource.getrlimit(limit)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Both the soft and the hard one, which nothing without privileges can raise again.
        resource.setrlimit(limit, (bound, bound))
    if os.getuid() == 0:
        become(user)
    path = "/tmp/main.py"  # noqa: S108 - the sandbox's own, private and empty
    with open(path, "wb") as file:  # noqa: PTH123 - pathlib would double the start-up time
        left = code_bytes
        # os.read, because a buffered reader would swallow the program's input.
        while left and (piece := os.read(0, left)):
            file.write(piece)
            left -= len(piece)
    os.execv(sys.executable, [sys.executable, "-I", "-B", "-X", "utf8", path])  # noqa: S606


def become(user: int) -> None:
    """Go on as a user that is not root: only such a one is held to the limit on processes."""
    import ctypes

    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # What was permitted went with root; this takes what was inheritable.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise PermissionError("capabilities cannot be given up")


launch(**json.loads(sys.argv[1]))
