"""Runs one program, as a process of its own that has given up everything that it does not need.

:mod:`btlm.evaluate.sandbox` starts it in new namespaces of users, mounts, processes and networks, in which it is root.
It makes all files read-only, puts an empty folder of memory over the temporary one, limits itself, and drops its
capabilities, so that nothing of this can be undone. Standard input is a JSON object with the program, the limits and a
word, which it prints if the program runs to its end. It imports nothing of this project.
"""

import ctypes
import json
import os
import resource
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
# linux/mount.h, linux/fcntl.h, linux/prctl.h, linux/capability.h; the number is the same on all machines
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _RDONLY, _PRIVATE = 442, -100, 0x8000, 1, 1 << 18
_NOSUID, _NODEV, _NO_NEW_PRIVS, _CAPABILITIES = 2, 4, 38, 0x20080522


def main() -> None:
    """Run what standard input holds."""
    task = json.load(sys.stdin)
    folder = task["folder"]
    attributes = (ctypes.c_uint64 * 4)(_RDONLY, 0, _PRIVATE, 0)
    given = ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(_LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, *given))
    options = f"size={task['disk_bytes']}".encode()
    _check(_LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(_NOSUID | _NODEV), options))
    os.chdir(folder)
    for limit, value in (
        (resource.RLIMIT_CPU, task["seconds"]),
        (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, task["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _check(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_LIBC.capset((ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()))
    out = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    exec(compile(task["program"], "program", "exec"), {"__name__": "__main__"})
    os.write(out, task["word"].encode())


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
