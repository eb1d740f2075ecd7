"""One reward worker: reads a request, scores it, writes a line, until its owner ends.

``pool`` starts this file as a script. Before the owner's ``sys.path`` has arrived and the worker is
isolated, it imports only the standard library.

Requests: 8 bytes of length, then a pickle; first the setup, then ``(item, prompt, response)``.
Replies: one JSON object a line. ``{"ready"}`` (null, or what the kernel refused of the isolation)
or ``{"refused"}`` answers the setup; ``{"item", "score"}`` or ``{"item", "failure"}`` an item.
"""

import json
import math
import numbers
import os
import pickle
import socket
import sys
import traceback
from typing import IO, Any


def main(socket_fd: int, owner_pid: int) -> None:
    """Serve requests until end of file."""
    connection = socket.socket(fileno=socket_fd)
    requests = connection.makefile("rb")
    sys.path.insert(0, os.path.dirname(__file__))
    import sandbox  # not through the package, which imports more

    del sys.modules["sandbox"]  # a verifier may have a module of that name
    setup = _receive(requests)
    sys.path[:] = setup["sys_path"]
    sandbox.die_with_parent(owner_pid)  # a worker in a long computation never reads end of file
    sandbox.limit_resources(memory_bytes=setup["memory_bytes"], file_bytes=setup["file_bytes"])
    missing = sandbox.isolate(os.environ["HOME"], setup["file_bytes"]) if setup["isolate"] else None

    def reply(**message: object) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    name = setup["function"]
    try:
        from megatron_espo.rewards.functions import load_reward_function

        function = load_reward_function(name)
    except BaseException as error:
        known = type(error).__name__ == "InputError"
        unknown = f"reward.function: {name} cannot be loaded: {_describe(error)}"
        reply(refused=str(error) if known else unknown)
        return
    reply(ready=missing)

    while (request := _receive(requests)) is not None:
        item, prompt, response = request
        try:
            score = function(prompt, response)
            if isinstance(score, numbers.Real) and math.isfinite(score):
                result: dict[str, object] = {"score": float(score)}
            else:
                got = f"{type(score).__name__} {score!r:.60}"
                result = {"failure": f"expected a finite number, got {got}"}
        except BaseException as error:  # also SystemExit: the verifier has not scored the response
            result = {"failure": _describe(error)}
        reply(item=item, **result)


def _receive(requests: IO[bytes]) -> Any:
    header = requests.read(8)
    if len(header) < 8:
        return None
    return pickle.loads(requests.read(int.from_bytes(header, "little")))


def _describe(error: BaseException) -> str:
    """Type, message and innermost place of an exception, in one line."""
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if "importlib" not in frame.filename]
    # The message of a syntax error has its place; the innermost frame is the import.
    known = frames and not isinstance(error, SyntaxError)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if known else ""
    return f"{type(error).__name__}: {str(error)[:500]}{place}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
