"""The far side of the sandbox: gives away everything that a program must not have, then runs it. See sandbox.py.

    python -s -S -P -B confine.py FD        # the job as JSON on standard input, the outcome as JSON on the descriptor FD

This file is run by its path in a process of its own, never imported by octad: standard library only. What it gives away,
in order: standard input and output, the network and the view of the machine's mounts (a user, network, IPC and mount
namespace; the scratch directory becomes a small tmpfs), time, memory and file sizes (rlimits), all files but Python's own
and the scratch directory (Landlock), capabilities, and the system calls that open sockets, begin processes, signal others
or change what Landlock does not watch (seccomp; numbers in KERNEL below). Where the kernel has no Landlock or seccomp an
audit hook refuses the same things: that stops accidents, not intent, and only runs when the job says `weak`.

The program shares this process, so one that searches it could find the token that marks a pass; one that merely leaves
early, prints something or raises does not.
"""

import ctypes
import errno
import json
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
CLONE_THREAD = 0x00010000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
# Access rights of linux/landlock.h: what a file may be asked for, what a directory besides.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

# machine: (AUDIT_ARCH, clone, system calls that fail with EPERM), from the kernel's tables
KERNEL = {
    "x86_64": (
        0xC000003E,
        56,
        (
            *(41, 57, 58, 59, 322),  # socket, fork, vfork, execve, execveat
            *(62, 200, 234, 129, 297, 424, 434, 438),  # kill, tkill, tgkill, sigqueue, pidfd_*
            *(101, 310, 311, 302, 141, 203, 144, 314, 251),  # ptrace, process_vm_*, prlimit, priorities
            *(425, 426, 427, 319, 29, 68, 64, 240),  # io_uring, memfd_create, System V and POSIX IPC
            *(272, 308, 165, 166, 155, 161, 428, 429, 430, 442),  # unshare, setns, mounts, chroot
            *(
                321,
                298,
                323,
                250,
                248,
                249,
                175,
                313,
                176,
                246,
                304,
                303,
            ),  # bpf, perf, keys, modules, handles
            *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod, chown
            *(188, 189, 190, 197, 198, 199, 132, 235, 280, 261),  # xattr, utime
        ),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (
            *(198, 221, 281),
            *(129, 130, 131, 138, 240, 424, 434, 438),
            *(117, 270, 271, 261, 140, 122, 119, 274, 30),
            *(425, 426, 427, 279, 194, 186, 190, 180),
            *(97, 268, 40, 39, 41, 51, 428, 429, 430, 442),
            *(280, 241, 282, 219, 217, 218, 105, 273, 106, 104, 265, 264),
            *(52, 53, 452, 55, 54),
            *(5, 6, 7, 14, 15, 16, 88),
        ),
    ),
}
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
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    files = restrict_files(libc, job["scratch"])
    drop_capabilities(libc)
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


def filter_calls(libc: ctypes.CDLL) -> bool:
    """seccomp: the calls of KERNEL fail with EPERM, and a new process too (a thread may begin)."""
    if platform.machine() not in KERNEL:
        return False
    architecture, clone, denied = KERNEL[platform.machine()]
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, 0x40000000), refuse]  # x32 numbers
    for call in denied:
        code += [(EQUAL, 0, 1, call), refuse]
    code += [
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
    ]  # its flags lie in memory: libc falls back
    code += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), refuse]
    code += [(RETURN, 0, 0, ALLOW)]
    return install(libc, code)


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
