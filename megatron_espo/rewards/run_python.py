"""Runs Python code that a model wrote, under the limits of ``sandbox``.

The Python tool starts this file as a script.

Arguments: bytes of memory, bytes of a file, 1 to isolate, owner's pid.
The code comes on standard input. Only the standard library is imported.
"""

import os
import sys


def main(memory_bytes: int, file_bytes: int, isolate: bool, owner: int) -> None:
    """Read the code, enter the sandbox, run the code."""
    import sandbox  # from the folder of this script; the package itself takes longer to import

    del sys.path[0]
    sandbox.die_with_parent()
    if os.getppid() != owner:  # the owner died before the line above
        sys.exit(1)
    code = sys.stdin.read()
    sandbox.limit_resources(memory_bytes=memory_bytes, file_bytes=file_bytes)
    if isolate:
        sandbox.isolate(os.environ["HOME"], file_bytes)
    exec(compile(code, "<tool>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
