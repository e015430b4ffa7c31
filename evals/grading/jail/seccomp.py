"""System-call filters that a process puts on itself for good (Linux, x86-64 and arm64).

Two profiles. 'program': no processes (threads are allowed), no sockets but socketpair, no memory outside the address
space that RLIMIT_AS counts (memfd, System V), nothing that changes namespaces, mounts, keys or the kernel. 'parser':
besides, nothing that writes, renames or deletes a file, starts a program, or signals another process. Memory and CPU
are rlimits' work.
"""

import ctypes
import errno
import os
import struct

# Numbers from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
_X86_64 = {
    "fork": 57, "vfork": 58, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165,
    "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "keyctl": 250, "add_key": 248,
    "request_key": 249, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "kexec_load": 246,
    "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176, "reboot": 169,
    "swapon": 167, "swapoff": 168, "open_by_handle_at": 304, "name_to_handle_at": 303, "memfd_create": 319,
    "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "acct": 163, "syslog": 103, "quotactl": 179,
    "personality": 135, "clock_settime": 227, "settimeofday": 164, "iopl": 172, "ioperm": 173, "uselib": 134,
    "modify_ldt": 154, "vmsplice": 278, "socket": 41,
    # for 'parser' besides
    "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297, "creat": 85, "unlink": 87, "unlinkat": 263, "rename": 82, "renameat": 264,
    "renameat2": 316, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "link": 86, "linkat": 265, "symlink": 88,
    "symlinkat": 266, "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94,
    "fchownat": 260, "truncate": 76, "ftruncate": 77, "mknod": 133, "mknodat": 259, "utime": 132, "utimes": 235,
    "utimensat": 280, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "socketpair": 53, "connect": 42, "bind": 49,
}  # fmt: skip
_ARM64 = {
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40, "umount2": 39, "pivot_root": 41,
    "chroot": 51, "unshare": 97, "setns": 268, "keyctl": 219, "add_key": 217, "request_key": 218, "bpf": 280,
    "perf_event_open": 241, "userfaultfd": 282, "kexec_load": 104, "kexec_file_load": 294, "init_module": 105,
    "finit_module": 273, "delete_module": 106, "reboot": 142, "swapon": 224, "swapoff": 225, "open_by_handle_at": 265,
    "name_to_handle_at": 264, "memfd_create": 279, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
    "acct": 89, "syslog": 116, "quotactl": 60, "personality": 92, "clock_settime": 112, "settimeofday": 170,
    "socket": 198, "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
    "rt_tgsigqueueinfo": 240, "unlinkat": 35, "renameat": 38, "renameat2": 276, "mkdirat": 34, "linkat": 37,
    "symlinkat": 36, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "truncate": 45, "ftruncate": 46,
    "mknodat": 33, "utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "socketpair": 199, "connect": 203,
    "bind": 200,
}  # fmt: skip
# The same number everywhere: newer calls.
_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "pidfd_getfd": 438,
    "pidfd_send_signal": 424, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_PARSER_ONLY = {
    "execve", "execveat", "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "creat", "unlink",
    "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "link", "linkat", "symlink",
    "symlinkat", "chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "truncate", "ftruncate",
    "mknod", "mknodat", "utime", "utimes", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "socketpair", "connect",
    "bind",
}  # fmt: skip
_SIGNALS = frozenset({"kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"})
_ARCHITECTURES = {  # AUDIT_ARCH, table, clone, openat, open (-1: there is none), prctl
    "x86_64": (0xC000003E, _X86_64, 56, 257, 2, 157),
    "aarch64": (0xC00000B7, _ARM64, 220, 56, -1, 167),
}
_CLONE3, _OPENAT2 = 435, 437
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARG0 = 0, 4, 16
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 1, 38, 22, 2


def supported() -> bool:
    """Whether there is a filter for this machine."""
    return hasattr(os, "uname") and os.uname().sysname == "Linux" and os.uname().machine in _ARCHITECTURES


def _filter(profile: str, signals: bool) -> bytes:
    """The BPF program: refused calls fail with EPERM, so that a Python program gets an exception it understands."""
    arch, table, clone, openat, plain_open, prctl = _ARCHITECTURES[os.uname().machine]
    denied = {n for name, n in table.items() if profile == "parser" or name not in _PARSER_ONLY}
    denied |= set(_COMMON.values())
    if not signals:
        denied |= {table[name] for name in _SIGNALS}
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code = [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if arch == 0xC000003E:
        code += [(_JGE, 0, 1, 0x40000000), refuse]  # the x32 calls are the same calls under other numbers
    for number in sorted(denied):
        code += [(_JEQ, 0, 1, number), refuse]
    # glibc falls back to clone, whose flags a filter can read.
    code += [(_JEQ, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += [(_JEQ, 0, 4, clone), (_LOAD, 0, 0, _ARG0), (_JSET, 1, 0, _CLONE_THREAD), refuse, (_RETURN, 0, 0, _ALLOW)]
    code += [(_JEQ, 0, 4, prctl), (_LOAD, 0, 0, _ARG0), (_JEQ, 0, 1, _PR_SET_PDEATHSIG), refuse]
    code += [(_RETURN, 0, 0, _ALLOW)]
    if profile == "parser":
        code += [(_JEQ, 0, 1, _OPENAT2), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
        for call, argument in ((openat, 2), (plain_open, 1)):
            if call >= 0:
                flags = (_LOAD, 0, 0, _ARG0 + 8 * argument)
                code += [(_JEQ, 0, 4, call), flags, (_JSET, 0, 1, _WRITING), refuse, (_RETURN, 0, 0, _ALLOW)]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def lock(profile: str, signals: bool = True) -> None:
    """Put this process and its future threads under a profile. signals=False: it cannot even signal itself.

    To be called while the process has one thread. Raises OSError if the kernel has no filters.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(profile, signals)
    program = _Program(len(code) // 8, code)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
