"""One reward worker: reads a request, judges it, writes a line, until its owner closes the pipe or dies.

Run as a script by ``pool``. Only the standard library is imported before the owner's ``sys.path`` has arrived, and before the worker is isolated.

Requests: 8 bytes of length, then a pickle; first the set-up, then ``(number, prompt, response)``.
Replies: one JSON object a line: ``{"ready"}`` (null, or what of the isolation the kernel refused), ``{"refused"}``, or
``{"item", "score"}`` / ``{"item", "failure"}``. They are JSON because the owner must not unpickle what a process that ran a
model's output has written.
"""

import json
import math
import numbers
import os
import pickle
import sys
import traceback


def main(request_fd: int, reply_fd: int, owner_pid: int) -> None:
    """Serve requests until end of file."""
    requests, replies = os.fdopen(request_fd, "rb"), os.fdopen(reply_fd, "w", encoding="ascii")
    setup = _receive(requests)
    sys.path[:] = setup["sys_path"]
    from megatron_espo.rewards import sandbox

    sandbox.die_with_parent()  # end of file is not enough: a worker stuck in a long computation never reads it
    if os.getppid() != owner_pid:  # the owner died before the line above
        sys.exit(1)
    sandbox.limit_resources(memory_bytes=setup["memory_bytes"], file_bytes=setup["file_bytes"])
    missing = sandbox.isolate(os.environ["HOME"], setup["file_bytes"]) if setup["isolate"] else None

    def reply(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        from megatron_espo.rewards.functions import load_reward_function

        function = load_reward_function(setup["function"])
    except BaseException as error:
        told = type(error).__name__ == "InputError"
        reply(refused=str(error) if told else f"reward.function: {setup['function']} cannot be loaded: {_describe(error)}")
        return
    reply(ready=missing)

    while (request := _receive(requests)) is not None:
        item, prompt, response = request
        try:
            score = function(prompt, response)
        except BaseException as error:  # a verifier that calls sys.exit has not judged the response either
            reply(item=item, failure=_describe(error))
            continue
        if isinstance(score, numbers.Real) and math.isfinite(score):
            reply(item=item, score=float(score))
        else:
            reply(item=item, failure=f"expected a finite number, got {type(score).__name__} {score!r:.60}")


def _receive(requests) -> object | None:
    header = requests.read(8)
    if len(header) < 8:
        return None
    return pickle.loads(requests.read(int.from_bytes(header, "little")))


def _describe(error: BaseException) -> str:
    """Type, message, and the innermost place, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    # A syntax error tells its own place; the innermost frame is the one that imported it.
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}: {str(error)[:500]}{place}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
