"""The filter of system calls that a sandboxed program runs under: everything not named here fails with EPERM.

A classic BPF program for seccomp (Linux, seccomp(2), linux/filter.h). A program may compute and read files. It
may not start processes, threads or other programs, open sockets, send signals, change limits or namespaces; so there is
one process to kill, and its limits are the limits of all it does.
"""

import errno
import platform
import struct

from randopt.errors import UserError

# Audit number of the architecture, then the number of each call there (None: the call does not exist), as in
# asm/unistd_64.h of x86-64 and asm-generic/unistd.h, which the 64-bit Arm kernel follows.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COMPUTING: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "ioctl": (16, 29), "fcntl": (72, 25),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "pipe": (22, None), "pipe2": (293, 59), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "setitimer": (38, 103), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getrandom": (318, 278), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "membarrier": (324, 283), "set_tid_address": (218, 96), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
WRITING: dict[str, tuple[int, int | None]] = {
    "pwrite64": (18, 68), "ftruncate": (77, 46), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "utimensat": (280, 88), "flock": (73, 32),
}  # fmt: skip
OPEN, OPENAT = (2, None), (257, 56)

_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h: RET_ALLOW, RET_KILL_PROCESS, RET_ERRNO
_LOAD, _AND, _EQUALS, _RETURN = 0x20, 0x54, 0x15, 0x06  # linux/bpf_common.h: LD|W|ABS, ALU|AND|K, JMP|JEQ|K, RET|K
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes, low half first
_CHANGES_FILES = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_ACCMODE, O_CREAT, O_TRUNC, the bit of O_TMPFILE

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def program(writing: bool, machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one) as an array of struct sock_filter, 8 bytes each.

    writing: files may be opened for writing, made and removed. Only where every writable file is the sandbox's own.
    Raises UserError for an architecture whose numbers are not known here.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise UserError(
            f"programs of models cannot be run on this machine: its architecture is {machine}, and the filter of "
            f"system calls knows {', '.join(ARCHITECTURES)}. Score on another machine; the completions are kept."
        )
    column = list(ARCHITECTURES).index(machine)
    rules: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUALS, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls on a 64-bit kernel have other numbers
        (_LOAD, 0, 0, _NUMBER),
    ]
    for numbers in {**COMPUTING, **(WRITING if writing else {})}.values():
        if numbers[column] is not None:
            rules += [(_EQUALS, 0, 1, numbers[column]), (_RETURN, 0, 0, _ALLOW)]  # type: ignore[list-item]
    for numbers, flags in ((OPEN, 1), (OPENAT, 2)):
        if numbers[column] is not None:
            rules += [
                (_EQUALS, 0, 5, numbers[column]),  # type: ignore[list-item]
                (_LOAD, 0, 0, _ARGUMENTS + 8 * flags),
                (_AND, 0, 0, 0 if writing else _CHANGES_FILES),
                (_EQUALS, 0, 1, 0),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _FAIL | errno.EPERM),
            ]
    rules.append((_RETURN, 0, 0, _FAIL | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)
