"""Namespaces by hand, for machines without bubblewrap: own mounts, processes, network, IPC and host name.

As root, or anybody where the kernel lets users make user namespaces. The new root is a small read-only tmpfs with the
given paths bound read-only and /scratch; the old root is gone when the program starts.
"""

import ctypes
import os
import select
import signal
import struct
import sys

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_SETATTR, _PIVOT_ROOT = 2, -100, 0x8000, 442, {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, doing: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{doing}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(_libc.mount(*arguments), f"mount {target}")


def _read_only(path: str, devices: bool) -> None:
    attributes = struct.pack("=QQQQ", _RDONLY | _NOSUID | (0 if devices else _NODEV), 0, 0, 0)
    result = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, attributes, len(attributes))
    _check(result, f"make {path} read-only")


def enter(binds: list[list[str]], links: list[list[str]], scratch_bytes: int) -> None:
    """Move this process into new namespaces; its next child is process 1 there. OSError if that is not allowed.

    binds: [source, path inside]; links: [target, path inside], the symbolic links of the old root.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if uid == 0:
        _check(_libc.unshare(flags), "unshare")
    else:
        _check(_libc.unshare(flags | _NEWUSER), "unshare with a user namespace")
        for file, line in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
            with open(f"/proc/self/{file}", "w") as handle:
                handle.write(line)
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID, "size=1m,mode=755")
    os.mkdir("/tmp/.old")
    pivot = _PIVOT_ROOT[os.uname().machine]
    _check(_libc.syscall(pivot, b"/tmp", b"/tmp/.old"), "pivot_root")
    os.chdir("/")
    for source, inside in binds:
        old = "/.old" + source
        if os.path.isdir(old):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            open(inside, "w").close()
        _mount(old, inside, "", _BIND | _REC)
        _read_only(inside, devices=inside.startswith("/dev/"))
    for target, inside in links:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        os.symlink(target, inside)
    os.makedirs("/scratch", exist_ok=True)
    _mount("tmpfs", "/scratch", "tmpfs", _NOSUID | _NODEV, f"size={scratch_bytes},nr_inodes=4096,mode=777")
    _check(_libc.umount2(b"/.old", _DETACH), "umount")
    os.rmdir("/.old")
    _mount("none", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    host = b"sandbox"
    _check(_libc.sethostname(host, len(host)), "sethostname")


def supervise(lifeline: int) -> None:
    """Fork: the child returns (as process 1); the parent waits, kills it when `lifeline` closes, and never returns."""
    child = os.fork()
    if not child:
        return
    ended, ending = os.pipe()
    os.closerange(0, 3)  # the program's streams end when the program does
    os.set_blocking(ending, False)
    signal.set_wakeup_fd(ending, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status = 0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        readable, _, _ = select.select([lifeline, ended], [], [])
        if lifeline in readable:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        os.read(ended, 64)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def drop_capabilities() -> None:
    """What root, or the maker of a user namespace, may do more than others."""
    header, nothing = struct.pack("=II", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_CAPSET[os.uname().machine], header, nothing), "capset")


def die_with_parent() -> None:
    """Ask for SIGKILL when the parent ends; to be called after the last change of user, which resets it."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


if __name__ == "__main__":
    sys.exit("this file is part of the sandbox; see evals.grading.sandbox")
