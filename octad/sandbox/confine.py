"""The far side of the sandbox: gives away everything that a program must not have, then runs it. See sandbox.py.

    python -s -S -P -B confine.py FD        # the job as JSON on standard input, the outcome as JSON on the descriptor FD

This file is run by its path in a process of its own, never imported by octad: standard library only. What it gives away,
in order: standard input and output, the network and the view of the machine's mounts (a user, network, IPC and mount
namespace; the scratch directory becomes a small tmpfs), time, memory and file sizes (rlimits), all files but Python's own
and the scratch directory (Landlock), capabilities, and every system call that is not in CALLS below (seccomp): sockets,
processes, signals to others, whatever Landlock does not watch, whatever a newer kernel will offer. The kernel kills the
program when octad dies. Where the kernel has no Landlock or seccomp an audit hook refuses the usual ways: that stops
accidents, not intent, and only runs when the job says `weak`.

The program shares this process, so one that searches it could find the token that marks a pass; one that merely leaves
early, prints something or raises does not.
"""

import ctypes
import errno
import json
import os
import platform
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
CLONE_THREAD = 0x00010000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
# Access rights of linux/landlock.h: what a file may be asked for, what a directory besides.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

# The system calls that a program may make: name, number on x86-64, number on arm64 ("-": has none), from the kernel's
# tables. All others fail with EPERM, those among them that this list's author never heard of.
CALLS = """
read 0 63 write 1 64 readv 19 65 writev 20 66 pread64 17 67 pwrite64 18 68 preadv 295 69 pwritev 296 70 lseek 8 62
open 2 - openat 257 56 creat 85 - close 3 57 close_range 436 436 dup 32 23 dup2 33 - dup3 292 24 pipe 22 - pipe2 293 59
stat 4 - fstat 5 80 lstat 6 - newfstatat 262 79 statx 332 291 access 21 - faccessat 269 48 faccessat2 439 439
getdents 78 - getdents64 217 61 readlink 89 - readlinkat 267 78 rename 82 - renameat 264 38 renameat2 316 276
mkdir 83 - mkdirat 258 34 rmdir 84 - unlink 87 - unlinkat 263 35 link 86 - linkat 265 37 symlink 88 - symlinkat 266 36
truncate 76 45 ftruncate 77 46 fallocate 285 47 fadvise64 221 223 fsync 74 82 fdatasync 75 83 sendfile 40 71
copy_file_range 326 285 getcwd 79 17 chdir 80 49 fchdir 81 50 umask 95 166 statfs 137 43 fstatfs 138 44
poll 7 - ppoll 271 73 select 23 - pselect6 270 72 epoll_create 213 - epoll_create1 291 20 epoll_ctl 233 21
epoll_wait 232 - epoll_pwait 281 22 eventfd2 290 19
mmap 9 222 munmap 11 215 mprotect 10 226 mremap 25 216 madvise 28 233 brk 12 214 msync 26 227 mincore 27 232
futex 202 98 set_tid_address 218 96 set_robust_list 273 99 get_robust_list 274 100 rseq 334 293 membarrier 324 283
sched_yield 24 124 sched_getaffinity 204 123 getcpu 309 168 exit 60 93 exit_group 231 94 wait4 61 260 waitid 247 95
rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 rt_sigpending 127 136 rt_sigsuspend 130 133
rt_sigtimedwait 128 137 sigaltstack 131 132 restart_syscall 219 128 pause 34 - alarm 37 - getitimer 36 102
setitimer 38 103 clock_gettime 228 113 clock_getres 229 114 clock_nanosleep 230 115 nanosleep 35 101
gettimeofday 96 169 time 201 - times 100 153 getrusage 98 165 getrlimit 97 163 getrandom 318 278 uname 63 160
sysinfo 99 179 getpid 39 172 gettid 186 178 getppid 110 173 getpgid 121 155 getpgrp 111 - getsid 124 156
getuid 102 174 geteuid 107 175 getgid 104 176 getegid 108 177 getresuid 118 148 getresgid 120 150 getgroups 115 158
"""
# Calls of which some forms alone are allowed: which argument says the form, and which forms.
FORMS = """
ioctl 16 29 fcntl 72 25 prctl 157 167
"""
ALLOWED_FORMS = {
    "ioctl": (
        1,
        (0x5401, 0x5413, 0x541B, 0x5450, 0x5451),
    ),  # isatty, window size, bytes to read, close on exec or not
    "fcntl": (
        1,
        (*range(8), 1030),
    ),  # copies, flags and locks; not owners of signals, not watches of directories
    "prctl": (0, (15, 16)),  # the thread's name
}
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, AUDIT_ARCH, clone
CLONE3 = 435
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # the classic BPF that is needed
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Events of Python's audit hook that the weaker wall refuses; those of WRITING only outside the scratch directory.
FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.kill", "signal.pthread_kill", "pty.spawn"),
)
WRITING = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink"),
    *("os.truncate", "os.utime", "os.setxattr", "os.removexattr"),
)


def main() -> None:
    """Read the job, build the walls, run the program, tell the outcome."""
    job, out = json.load(sys.stdin.buffer), int(sys.argv[1])
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    os.close(quiet)
    held = build_walls(job)
    strong = all(held[wall] for wall in ("files", "network", "processes"))
    tell = teller(out, job["token"], held)
    if not strong and not job["weak"]:
        tell("refused", "")
    if not strong:
        sys.addaudithook(watch(os.path.realpath(job["scratch"])))
    try:
        exec(compile(job["program"], "program.py", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as error:
        tell("failed", describe(error))
    tell("passed", "")


def teller(out: int, token: str, held: dict[str, str]) -> Callable[[str, str], NoReturn]:
    """What writes the outcome and ends the process at once. It keeps its own references to what it needs."""
    write, leave, dumps = os.write, os._exit, json.dumps

    def tell(outcome: str, reason: str) -> NoReturn:
        write(out, dumps({"token": token, "outcome": outcome, "reason": reason, "held": held}).encode())
        leave(0)

    return tell


def describe(error: BaseException) -> str:
    """The error's kind and the beginning of its message; a broken __str__ is the program's own fault."""
    try:
        return f"{type(error).__name__}: {error}"[:200].removesuffix(": ")
    except BaseException:
        return "an error that cannot be shown"


def build_walls(job: dict[str, Any]) -> dict[str, str]:
    """Everything that this kernel offers. Says per wall what holds it, "" for nothing."""
    libc = ctypes.CDLL(None, use_errno=True) if job["kernel"] and sys.platform == "linux" else None
    spaces = libc is not None and enter_namespaces(libc, job["scratch"], job["scratch_bytes"])
    os.chdir(job["scratch"])
    set_limits(job)
    if libc is None:
        return {"files": "", "network": "", "processes": ""}
    die_with(libc, job["parent"])
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    files = restrict_files(libc, job["scratch"])
    drop_capabilities(libc)
    die_with(libc, job["parent"])  # the kernel forgets it where rights change
    filtered = filter_calls(libc)
    network = " + ".join(["namespace"] * spaces + ["seccomp"] * filtered)
    return {"files": files, "network": network, "processes": "seccomp" if filtered else ""}


def enter_namespaces(libc: ctypes.CDLL, scratch: str, size: int) -> bool:
    """A user, network, IPC and mount namespace of our own, and a small tmpfs as the scratch directory."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS):
        return False
    try:
        put("/proc/self/setgroups", "deny")
        put("/proc/self/uid_map", f"{user} {user} 1")
        put("/proc/self/gid_map", f"{group} {group} 1")
        options = f"size={size},nr_inodes=512,mode=700".encode()
        libc.mount(b"tmpfs", scratch.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    except OSError:
        pass  # the network is gone all the same; the scratch directory is then bounded by time alone
    return True


def die_with(libc: ctypes.CDLL, parent: int) -> None:
    """Have the kernel kill this process when octad dies; leave at once if it has died already."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def put(path: str, text: str) -> None:
    """Write a small file of /proc."""
    with open(path, "w") as file:
        file.write(text)


def set_limits(job: dict[str, Any]) -> None:
    """Seconds of CPU, bytes of memory and of a file, descriptors; no core files."""
    import resource

    wanted = {
        "RLIMIT_CPU": (job["cpu_seconds"], job["cpu_seconds"] + 1),
        "RLIMIT_AS": (job["memory_bytes"],) * 2,
        "RLIMIT_FSIZE": (job["file_bytes"],) * 2,
        "RLIMIT_NOFILE": (job["open_files"],) * 2,
        "RLIMIT_CORE": (0, 0),
    }
    for name, pair in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), pair)
        except (ValueError, OSError):  # macOS has no working RLIMIT_AS
            continue


def restrict_files(libc: ctypes.CDLL, scratch: str) -> str:
    """Landlock: Python's own files and the system's libraries to read, the scratch directory to write, nothing else."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 3:  # before 3 truncating a file could not be refused
        return ""
    rights = (1 << 16) - 1 if version >= 5 else (1 << 15) - 1
    fields = [
        rights,
        3 if version >= 4 else 0,
        3 if version >= 6 else 0,
    ]  # files; TCP; signals and abstract sockets
    attributes = struct.pack("QQQ", *fields)[: 8 * (1 + (version >= 4) + (version >= 6))]
    rules = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return ""
    for path in readable_places():
        allow(libc, rules, path, (READ_FILE | READ_DIR) & rights)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        allow(libc, rules, path, (READ_FILE | WRITE_FILE) & rights)
    allow(libc, rules, scratch, rights & ~EXECUTE & ~IOCTL_DEV)
    done = libc.syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return "" if done else f"landlock {version}"


def readable_places() -> list[str]:
    """Where Python and the libraries that its modules load are."""
    paths = sysconfig.get_paths()
    libraries = [sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    found = {paths["stdlib"], paths["platstdlib"], *libraries, *system}
    return sorted(os.path.realpath(p) for p in found if p and os.path.exists(p))


def allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    """One rule; a file takes only the rights that files have."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rights = rights if os.path.isdir(path) else rights & FILE_RIGHTS
    libc.syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Keep none, of this namespace or (for root, where there is no namespace) of the machine."""
    libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))


def numbers(table: str, machine: str) -> dict[str, int]:
    """The system calls of a table by name, as this kind of machine numbers them."""
    words, column = table.split(), MACHINES[machine][0]
    rows = zip(words[::3], words[1::3], words[2::3], strict=True)
    return {name: int(places[column]) for name, *places in rows if places[column] != "-"}


def filter_calls(libc: ctypes.CDLL) -> bool:
    """seccomp: all calls fail with EPERM but those of CALLS, the allowed forms of FORMS, and the beginning of threads."""
    machine = platform.machine()
    if machine not in MACHINES:
        return False
    _, architecture, clone = MACHINES[machine]
    refuse, pass_on = (RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ALLOW)
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, 0x40000000), refuse]  # x32 numbers
    for call in numbers(CALLS, machine).values():
        code += [(EQUAL, 0, 1, call), pass_on]
    code += [
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
    ]  # its flags lie in memory: libc falls back
    code += [(EQUAL, 0, 4, clone), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_THREAD), pass_on, refuse]
    for name, call in numbers(FORMS, machine).items():
        argument, forms = ALLOWED_FORMS[name]
        code += [(EQUAL, 0, 2 * len(forms) + 2, call), (LOAD, 0, 0, 16 + 8 * argument)]
        code += [line for form in forms for line in ((EQUAL, 0, 1, form), pass_on)] + [refuse]
    return install(libc, [*code, refuse])


def install(libc: ctypes.CDLL, code: list[tuple[int, int, int, int]]) -> bool:
    """Give the kernel a filter of system calls: (instruction, jump if true, jump if false, constant)."""
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0) == 0)


def watch(scratch: str) -> Callable[[str, tuple[Any, ...]], None]:
    """The weaker wall: an audit hook that refuses what Python itself announces."""

    def inside(path: Any) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(scratch + os.sep)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        """Raises PermissionError for what is not allowed."""
        if event == "open":
            mode, flags = str(args[1] or ""), args[2] if isinstance(args[2], int) else 0
            writes = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not inside(args[0]):
                raise PermissionError(f"the sandbox refuses to write {args[0]}")
            return
        away = event.startswith(WRITING) and not all(inside(a) for a in args if isinstance(a, (str, bytes)))
        if away or event.startswith(FORBIDDEN):
            raise PermissionError(f"the sandbox refuses {event}")

    return hook


if __name__ == "__main__":
    main()
