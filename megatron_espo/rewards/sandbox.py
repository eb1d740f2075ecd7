"""Limits and isolation of a process that runs untrusted code. Linux and the standard library only.

As a script, it runs the Python code on standard input in a sandbox: see :func:`main`.

The kernel limits each process. Where it also grants namespaces, ``isolate`` gives the process its
own user, mount, network, process and IPC namespaces: no network, a read-only file system except one
folder, and no process that outlives it. The process can still read what its user may read, and
connect to Unix sockets in the file system.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress

# What Python and its libraries need. The trainer's other variables (keys, tokens) stay hidden.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_CAPABILITY_VERSION_3 = 0x20080522


def passed_environment(names: Iterable[str], home: str | None = None) -> dict[str, str]:
    """Return the environment variables of a child: ``ENVIRONMENT`` and ``names``.

    Args:
        home: its home and temporary folder, and one thread for its libraries; ``None``: not set.
    """
    names = (*ENVIRONMENT, *names)
    passed = {name: os.environ[name] for name in names if name in os.environ}
    return passed | ({"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1"} if home else {})


def limits(memory_gib: float, file_bytes: int, isolate: bool) -> tuple[str, ...]:
    """Return the arguments of :func:`confine` for a child, as text for its command line."""
    values = (int(memory_gib * 2**30), file_bytes, int(isolate), os.getpid())
    return tuple(map(str, values))


def confine(memory_bytes: int, file_bytes: int, is_isolated: int, owner_pid: int) -> str | None:
    """Limit this process for the rest of its life, and forbid core dumps.

    Args:
        memory_bytes: most private writable memory.
        file_bytes: longest file that it may write.
        is_isolated: 1 for :func:`isolate`, with the home folder as the writable one.
        owner_pid: the process ends with this parent.

    Returns:
        ``None``, or what the kernel refused of the isolation.
    """
    die_with_parent(owner_pid)
    # RLIMIT_DATA, not RLIMIT_AS: libraries reserve far more address space than they use.
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_DATA: memory_bytes,
    }
    for what, limit in limits.items():
        _, hard = resource.getrlimit(what)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # out of memory: the kernel kills this process before the trainer
    return isolate(os.environ["HOME"], file_bytes) if is_isolated else None


def die_with_parent(owner_pid: int | None = None) -> None:
    """Make the kernel kill this process when the thread that started it ends.

    Args:
        owner_pid: expected parent; this process exits if the parent has already ended.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if owner_pid is not None and os.getppid() != owner_pid:
        sys.exit(1)


def isolate(folder: str, shared_memory_bytes: int) -> str | None:
    """Enter new namespaces, where only ``folder`` and a private ``/dev/shm`` are writable.

    Must be called before any thread starts. Returns in a grandchild. The calling process waits
    outside and then ends with the grandchild's status (128 + n for signal n).

    Returns:
        ``None``, or what the kernel refused. The process is then not isolated, or isolated in part.
    """
    uid, gid = os.getuid(), os.getgid()
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    spaces = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC
    try:
        _call("unshare", spaces)
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        return f"user namespaces: {error.strerror}"
    die_with_parent()  # the change of user resets it
    _continue_in_child()  # process 1 of its namespace: when it ends, the kernel kills the others
    refused = None
    try:
        _make_read_only_except(folder, shared_memory_bytes)
    except OSError as error:
        refused = f"read-only file system: {error.strerror}"
    _continue_in_child()  # signals such as SIGXCPU do not reach process 1
    # With capabilities in its own namespace, the process could undo the mounts.
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3), (ctypes.c_uint32 * 6)())
    return refused


def _make_read_only_except(folder: str, shared_memory_bytes: int) -> None:
    path = os.fsencode(folder)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", path, path, None, _MS_BIND, None)
    _set_read_only(b"/", True, _AT_RECURSIVE)
    _set_read_only(path, False, 0)
    os.chdir(folder)  # into the writable mount
    if os.path.isdir("/dev/shm"):
        _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={shared_memory_bytes}".encode())


def _set_read_only(path: bytes, value: bool, flags: int) -> None:
    set_and_clear = _MOUNT_ATTR_RDONLY * value, _MOUNT_ATTR_RDONLY * (not value)
    attributes = (ctypes.c_uint64 * 4)(*set_and_clear)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, size)


def _continue_in_child() -> None:
    """Return in a child. This process waits for the child and ends with its status."""
    child = os.fork()
    if child == 0:
        die_with_parent()
        return
    pid, status = os.wait()
    while pid != child:  # an adopted orphan
        pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(*arguments: int) -> None:
    """Run the code on standard input, with the ``arguments`` of :func:`confine`.

    The Python tool starts this file: a package imports slower.
    """
    del sys.path[0]  # the code must not find the modules of this folder
    code = sys.stdin.read()
    confine(*arguments)
    exec(compile(code, "<tool>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
