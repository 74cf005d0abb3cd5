"""The program of a sandboxed process: confines itself, then runs what it was sent. nanochat/inference/sandbox.py starts it.

It uses the standard library only, and knows two roles: "answer" runs generated code and answers calls of one of its functions;
"check" runs tests, whose calls of that function go to the other process. Calls and results travel between them as JSON lines,
so that generated code sees neither the tests nor their verdict.
"""

import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
import types

FILE_BYTES = 16 * 2**20  # of everything that a program may store

# --- isolation by the kernel: namespaces, a read-only view of the interpreter, seccomp ---

NEW_USER, NEW_PID, NEW_NET, NEW_MOUNT, NEW_IPC, NEW_UTS = (
    0x10000000,
    0x20000000,
    0x40000000,
    0x20000,
    0x8000000,
    0x4000000,
)
READ_ONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel's filters name them
# Numbers of system calls on these (−1: has none). They start a process, reach another one, or keep
# memory that the limit of the address space does not count,
# or change what the process sees.
REFUSED = {
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "prctl": (157, 167),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
}
CLONE = (56, 220)  # refused without the flag CLONE_THREAD
NEWER_CALLS = 424  # from here on, on both: pidfds, io_uring, clone3, new ways to mount, and what later kernels add


def architecture() -> int:
    """The number of this machine's architecture among those above."""
    system = os.uname()
    if system.sysname != "Linux" or system.machine not in ARCHITECTURES:
        wanted = " or ".join(ARCHITECTURES)
        raise OSError(f"isolation needs Linux on {wanted}, found {system.sysname} on {system.machine}")
    return list(ARCHITECTURES).index(system.machine)


def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends. The filter of system calls refuses to change that."""
    architecture()  # so that there is prctl
    checked(c_library().prctl(1, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def isolate(home: str, readable: list[str], inherited: set[int]) -> None:
    """Go on as the only process of new namespaces: without network, with the interpreter's files and an empty /tmp.

    Returns in a child; the parent waits for it and never returns. home: an empty folder, to mount on. readable: the folders
    to see. inherited: the descriptors of pipes. Raises OSError when the kernel does not allow it.
    """
    machine, libc = architecture(), c_library()
    uid, gid = os.getuid(), os.getgid()
    checked(libc.unshare(NEW_USER | NEW_MOUNT | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    child = os.fork()
    if child:
        for descriptor in inherited:
            os.close(descriptor)  # so that a pipe ends when the child does
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    end_with_parent()
    enter_view(libc, home, readable, machine)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    checked(libc.capset(header, none), "capset")


def enter_view(libc: ctypes.CDLL, root: str, readable: list[str], machine: int) -> None:
    """Make the readable folders and an empty /tmp all there is. There is no /proc."""

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
        checked(libc.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3]), f"mount {target}")

    root = os.path.realpath(root)
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    view: list[str] = []
    for folder in sorted({*map(os.path.abspath, readable)}):
        if folder != "/" and os.path.isdir(folder) and not folder.startswith(tuple(f"{outer}/" for outer in view)):
            view.append(folder)
            os.makedirs(root + folder)
            mount(folder, root + folder, None, BIND | RECURSIVE)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        points = [line.split()[4] for line in file]
    for point in points:
        point = re.sub(r"\\(\d{3})", lambda blank: chr(int(blank[1], 8)), point)
        if f"{point}/".startswith(f"{root}/"):
            kept = os.statvfs(point).f_flag & (NOSUID | NODEV | NOEXEC)  # the kernel does not let us take these away
            mount("none", point, None, BIND | REMOUNT | READ_ONLY | NOSUID | NODEV | kept)
    mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"size={FILE_BYTES},nr_inodes=1000,mode=700")
    os.chdir(root)
    checked(libc.syscall(REFUSED["pivot_root"][machine], b".", b"."), "pivot_root")
    checked(libc.umount2(b".", 2), "umount2")
    os.chdir("/tmp")
    os.environ["HOME"] = "/tmp"


def filter_calls() -> None:
    """Let the kernel refuse the system calls above, and every way to start a process; threads are allowed.

    Raises OSError when it does not do that.
    """
    machine, libc = architecture(), c_library()
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, missing, kill = 0x7FFF0000, 0x50000 | 1, 0x50000 | 38, 0x80000000  # errors EPERM and ENOSYS
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, list(ARCHITECTURES.values())[machine]),
        (result, 0, 0, kill),
        (load, 0, 0, 0),
    ]
    code += [(at_least, 0, 1, NEWER_CALLS), (result, 0, 0, missing)]
    for numbers in REFUSED.values():
        if numbers[machine] >= 0:
            code += [(equal, 0, 1, numbers[machine]), (result, 0, 0, refuse)]
    code += [(equal, 1, 0, CLONE[machine]), (result, 0, 0, allow)]
    code += [(load, 0, 0, 16), (any_bit, 1, 0, 0x10000), (result, 0, 0, refuse), (result, 0, 0, allow)]  # CLONE_THREAD
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    described = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    checked(libc.prctl(38, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    checked(libc.prctl(22, 2, described, 0, 0), "prctl(PR_SET_SECCOMP)")


# --- the fallback: an audit hook, which holds against accidents only ---

FORBIDDEN = tuple(
    "socket. subprocess. os.fork os.exec os.spawn os.posix_spawn os.system os.kill os.putenv os.chdir os.setxattr os.removexattr "
    "pty. ctypes. signal. sqlite3. syslog. resource.".split()
)
CHANGING = tuple(
    "os.remove os.rmdir os.rename os.truncate os.chmod os.chown os.link os.symlink os.mkdir os.utime".split()
)
FORBIDDEN_MODULES = "ctypes _ctypes _dbm _gdbm _posixshmem _posixsubprocess _socket mmap".split()
WITHOUT_EVENTS = "mkfifo mknod pidfd_open pidfd_send_signal memfd_create setsid setpgid".split()
MOST_FILES, FILE_SIZE = 16, 2**20


def add_audit_hook(home: str, readable: list[str]) -> None:
    """Refuse what Python reports and what reaches outside of the process or of `home`. It cannot be removed again."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    home = os.path.realpath(home)
    inside = (f"{home}/",)
    seen = (*inside, *(f"{os.path.realpath(folder)}/" for folder in readable))
    made = []
    for name in WITHOUT_EVENTS:
        for module in ("os", "posix", "signal", "_signal"):
            vars(sys.modules[module]).pop(name, None)
    for module in FORBIDDEN_MODULES:
        sys.modules.pop(module, None)

    def check(path, allowed, join=os.path.join, real=os.path.realpath):
        if isinstance(path, (str, bytes)) and not f"{real(join(home, os.fsdecode(path)))}/".startswith(allowed):
            raise PermissionError(f"reaching {path} is not allowed here")

    def count_file(new):
        made.extend([0] if new else [])
        if len(made) > MOST_FILES:
            raise PermissionError(f"making more than {MOST_FILES} files is not allowed here")

    def guard(event, args, is_folder=os.path.isdir):
        if event.startswith(FORBIDDEN) or (event == "import" and args[0] in FORBIDDEN_MODULES):
            raise PermissionError(f"{event} {args[0] if event == 'import' else ''} is not allowed here")
        if event == "open":
            writes = (args[2] or 0) & writing
            check(args[0], inside if writes else seen)
            if is_folder(args[0]):
                raise PermissionError("opening a folder, to reach files from it, is not allowed here")
            count_file(writes)
        elif event in ("os.listdir", "os.scandir"):
            check(args[0], seen)
        elif event.startswith(CHANGING):
            relative = () if event == "os.truncate" else args[-2:] if event in ("os.rename", "os.link") else args[-1:]
            if any(descriptor != -1 for descriptor in relative):
                raise PermissionError(f"{event} relative to a folder is not allowed here")
            for path in args:
                check(path, inside)
            count_file(event == "os.mkdir")

    sys.addaudithook(guard)


# --- the two roles ---

SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}


class Other:
    """Stands for a value that does not travel; equal to nothing."""


def packed(value):
    """A value for JSON: numbers, texts and nested collections as they are; an object of a derived class as its base class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [packed(item) for item in value]}
    if hasattr(value, "as_integer_ratio"):  # a Fraction or a Decimal
        return {"ratio": list(value.as_integer_ratio())}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"bytes": value.hex()} if isinstance(value, bytes) else {"other": ""}


def unpacked(value):
    """The value that `packed` was given. Nothing is run to make it."""
    if not isinstance(value, dict):
        return value
    [(name, content)] = value.items()
    if name == "dict":
        return {unpacked(key): unpacked(item) for key, item in content}
    if name in SEQUENCES:
        return SEQUENCES[name]([unpacked(item) for item in content])
    if name == "ratio":
        from fractions import Fraction  # seldom needed, and slow to import

        return Fraction(*content)
    if name == "complex":
        return complex(*content)
    return bytes.fromhex(content) if name == "bytes" else Other()


def run_source(source: str, module: types.ModuleType) -> None:
    exec(compile(source, f"<{module.__name__}>", "exec", dont_inherit=True), vars(module))


def answer(request: dict, module: types.ModuleType) -> None:
    """Run generated code, then answer calls of its function. Whatever it does, it only ever gives answers."""
    calls, results = os.fdopen(request["calls"]), os.fdopen(request["results"], "w")
    run_source(request["source"], module)
    function = getattr(module, request["entry_point"])
    for line in calls:
        try:
            args, kwargs = unpacked(json.loads(line))
            reply = json.dumps({"value": packed(function(*args, **kwargs))})
        except BaseException as error:
            reply = json.dumps({"error": described(error)})
        print(reply, file=results, flush=True)


def check(request: dict, module: types.ModuleType) -> None:
    """Run the tests with a function that asks the other process. Returns only if they ran to their end."""
    calls, results = os.fdopen(request["calls"], "w"), os.fdopen(request["results"])

    def candidate(*args, **kwargs):
        try:
            print(json.dumps(packed((args, kwargs))), file=calls, flush=True)
            line = results.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise EOFError("the program ended before it answered")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return unpacked(reply["value"])

    setattr(module, request["entry_point"], candidate)
    run_source(request["source"], module)
    module.check(candidate)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:1000]


def main() -> None:
    request = json.load(sys.stdin)
    status = os.fdopen(request["status"], "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # what Python's modules and their libraries are in
    readable = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib", *request["libraries"], *sys.path]
    inherited = {request[name] for name in ("calls", "results", "status")}
    try:
        end_with_parent()
        if os.getppid() != request["parent"]:
            return
        if request["isolated"]:
            isolate(request["home"], readable, inherited)
        filter_calls()
    except OSError as error:
        if request["isolated"]:
            print(json.dumps(described(error)), file=status, flush=True)
            return
    size, cpu = FILE_BYTES if request["isolated"] else FILE_SIZE, int(request["seconds"]) + 1
    limits = {"AS": request["memory"], "CPU": cpu, "FSIZE": size, "CORE": 0, "NOFILE": 64}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    getattr(sys, "set_int_max_str_digits", int)(0)  # long numbers may travel; Python 3.10 has no limit
    module = types.ModuleType("solution")  # not __main__: `if __name__ == "__main__"` is for whoever runs it by hand
    sys.modules["solution"] = module
    if not request["isolated"]:
        add_audit_hook(request["home"], readable)
    print(json.dumps(""), file=status, flush=True)
    if request["role"] == "answer":
        status.close()
        run_source(request["helpers"], module)
        return answer(request, module)
    try:
        run_source(request["helpers"], module)
        check(request, module)
        verdict = ""
    except BaseException as error:
        verdict = described(error)
    print(json.dumps(verdict), file=status, flush=True)


if __name__ == "__main__":
    main()
