"""One reward worker: reads a request, scores it, writes a line, until its owner ends.

``pool`` starts this file as a script. Before the owner's ``sys.path`` has arrived and the worker is
isolated, it imports only the standard library.

Requests: pickles; first ``(sys.path, function)``, then ``(item, prompt, response)``.
Replies: one JSON object a line. ``{"ready"}`` (null, or what the kernel refused of the isolation)
or ``{"refused"}`` answers the first; ``{"item", "score"}`` or ``{"item", "failure"}`` an item.
"""

import json
import numbers
import pickle
import socket
import sys
import traceback

import sandbox  # not through the package, which imports more

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def main(socket_fd: int, *limits: int) -> None:
    """Serve requests until end of file, with the ``limits`` of ``sandbox.confine``."""
    connection = socket.socket(fileno=socket_fd)
    requests = connection.makefile("rb")
    del sys.modules["sandbox"]  # a verifier may have a module of that name
    sys.path[:], name = pickle.load(requests)
    missing = sandbox.confine(*limits)

    def reply(**message: object) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    try:
        from megatron_espo.rewards.functions import load_reward_function

        function = load_reward_function(name)
    except BaseException as error:
        known = type(error).__name__ == "InputError"
        unknown = f"reward.function: {name} cannot be loaded: {_describe(error)}"
        reply(refused=str(error) if known else unknown)
        return
    reply(ready=missing)

    while requests.peek():
        item, prompt, response = pickle.load(requests)
        try:
            score = function(prompt, response)
            if isinstance(score, numbers.Real) and abs(float(score)) <= _FLOAT32_MAX:
                result: dict[str, object] = {"score": float(score)}
            else:
                got = f"{type(score).__name__} {score!r:.60}"
                result = {"failure": f"expected a number that is finite in float32, got {got}"}
        except BaseException as error:  # also SystemExit: the verifier has not scored the response
            result = {"failure": _describe(error)}
        reply(item=item, **result)


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
