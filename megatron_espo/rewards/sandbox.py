"""What a reward worker may touch: the kernel's limits for a process, and namespaces where it grants them. Linux and the standard library only.

A process in its own user, mount, network, process and IPC namespace has no network, sees a read-only file system except one folder, and takes
everything that it started along when it ends. What it can still do: read what its user may read, connect to Unix sockets in the file system.
"""

import ctypes
import os
import resource
import signal

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_CAPABILITY_VERSION_3 = 0x20080522


def limit_resources(*, memory_bytes: int, file_bytes: int) -> None:
    """No core dumps, files no longer than ``file_bytes``, and at most ``memory_bytes`` of private writable memory.

    RLIMIT_DATA, not RLIMIT_AS: libraries reserve far more address space than they use.
    """
    for what, limit in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, file_bytes), (resource.RLIMIT_DATA, memory_bytes)):
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(what, (limit, limit))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # out of memory: the kernel takes this process, not the trainer
    except OSError:
        pass


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def isolate(folder: str, shared_memory_bytes: int) -> str | None:
    """Go into namespaces of our own, where only ``folder`` and a private ``/dev/shm`` can be written. Must be called before any thread starts.

    Returns in a grandchild: the caller itself waits outside, then ends as the grandchild did (128 + n for signal n).

    Returns:
        None, or what the kernel refused; this process is then where it was, or, if it refused half-way, isolated in part.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        return f"user namespaces: {error.strerror}"
    die_with_parent()  # the change of user has undone it
    _continue_in_child()  # the first process of its namespace: when it ends, the kernel kills the rest
    refused = None
    try:
        _make_read_only_except(folder, shared_memory_bytes)
    except OSError as error:
        refused = f"read-only file system: {error.strerror}"
    _continue_in_child()  # signals such as SIGXCPU do not reach a first process
    _drop_capabilities()
    return refused


def _make_read_only_except(folder: str, shared_memory_bytes: int) -> None:
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", os.fsencode(folder), os.fsencode(folder), None, _MS_BIND, None)
    _set_read_only(b"/", True, _AT_RECURSIVE)
    _set_read_only(os.fsencode(folder), False, 0)
    os.chdir(folder)  # into the mount that can be written
    if os.path.isdir("/dev/shm"):
        _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={shared_memory_bytes}".encode())


def _set_read_only(path: bytes, value: bool, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY * value, _MOUNT_ATTR_RDONLY * (not value))  # set, clear
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)))


def _drop_capabilities() -> None:
    """A process may do anything in a namespace that it made: undo the mounts, for one."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3), (ctypes.c_uint32 * 6)())


def _continue_in_child() -> None:
    """Return in a child; here, wait for it and end as it does."""
    child = os.fork()
    if child == 0:
        die_with_parent()
        return
    pid, status = os.wait()
    while pid != child:  # an orphan that became ours
        pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
