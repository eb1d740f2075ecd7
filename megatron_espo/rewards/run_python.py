"""Runs Python code that a model wrote, under the limits of ``sandbox``.

The Python tool starts this file as a script. It imports only the standard library.

Arguments: bytes of memory, bytes of a file, 1 to isolate, owner's pid.
The code comes on standard input.
"""

import os
import sys


def main(memory_bytes: int, file_bytes: int, isolate: int, owner_pid: int) -> None:
    """Read the code, enter the sandbox, run the code."""
    import sandbox  # from the folder of this script: the package takes longer to import

    del sys.path[0], sys.modules["sandbox"]
    sandbox.die_with_parent(owner_pid)
    code = sys.stdin.read()
    sandbox.limit_resources(memory_bytes=memory_bytes, file_bytes=file_bytes)
    if isolate:
        sandbox.isolate(os.environ["HOME"], file_bytes)
    exec(compile(code, "<tool>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
