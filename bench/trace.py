"""What torch.profiler's trace says about a step: each kernel with its operation and phase, idle gaps, memory over time.

A trace is the JSON that export_chrome_trace writes, in µs. A kernel belongs to the range of the host (nanochat_kernels.ranges) that
launched it. In backward it belongs to the operation whose forward made the node of autograd, which has the same sequence number.
Kernels of a replayed graph have no launches of their own, and take their operations from a launched step, by their order. On a CPU
an operator of torch takes the place of a kernel, with the time that no other operator within it takes.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
EVALUATED = "autograd::engine::evaluate_function: "
MICRO_STEP, SYNCHRONIZE, UPDATE = "micro-step", "synchronize gradients", "update weights"  # ranges of training
FORWARD, BACKWARD, OPTIMIZER, OTHER = "forward", "backward", "optimizer", "other"
PHASES = (FORWARD, BACKWARD, OPTIMIZER, OTHER)
STEP = "profiled step"


@dataclass(frozen=True)
class Work:
    """A kernel, or on a CPU an operator of torch. Times in µs."""

    name: str
    start: float
    end: float
    busy: float  # time of its own; less than end − start for an operator that calls others
    operation: str  # "" where it is not known, in a replayed graph
    phase: str
    step: int  # number of the profiled step, −1 outside


@dataclass(eq=False)
class HostEvent:
    """A range, an operator or a launch on the host, inside of its parent."""

    name: str
    kind: str
    start: float
    end: float
    arguments: dict
    parent: "HostEvent | None" = None
    children: float = 0.0  # time of the operators directly inside

    def ancestors(self) -> Iterator["HostEvent"]:
        event: HostEvent | None = self
        while event is not None:
            yield event
            event = event.parent


@dataclass
class Trace:
    """What was read from a trace."""

    work: list[Work]
    memory: list[tuple[float, float]]  # (µs, bytes that are allocated)
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # (phase, start, end) on the host
    on_gpu: bool = False

    @property
    def steps(self) -> int:
        return 1 + max((work.step for work in self.work), default=-1)

    def of_step(self, step: int) -> list[Work]:
        return sorted((work for work in self.work if work.step == step), key=lambda work: work.start)


def read_trace(content: dict, operations: set[str]) -> Trace:
    """Read a trace; operations: the names of ranges that are operations."""
    events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
    host = nested(events)
    reader = Reader(host, operations)
    kernels = [event for event in events if event.get("cat") in KERNELS]
    if kernels:
        launches = {event.arguments.get("correlation"): event for event in host if event.kind in LAUNCHES}
        work = [reader.kernel(kernel, launches.get(kernel.get("args", {}).get("correlation"))) for kernel in kernels]
    else:
        busy = [event for event in host if event.kind == "cpu_op" and event.end - event.start > event.children]
        work = [reader.operator(event) for event in busy]
    work.sort(key=lambda one: one.start)
    return Trace(work, memory_of(content, bool(kernels)), phases_of(host), bool(kernels))


def nested(events: list[dict]) -> list[HostEvent]:
    """The events of the host, each with its parent, which is the innermost one on its thread that contains it."""
    by_thread = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", *LAUNCHES):
            start = float(event["ts"])
            end = start + float(event["dur"])
            made = HostEvent(event["name"], event["cat"], start, end, event.get("args", {}))
            by_thread[event["tid"]].append(made)
    for thread_events in by_thread.values():
        thread_events.sort(key=lambda event: (event.start, -event.end))
        enclosing: list[HostEvent] = []
        for event in thread_events:
            while enclosing and enclosing[-1].end <= event.start:
                enclosing.pop()
            event.parent = enclosing[-1] if enclosing else None
            if event.kind == "cpu_op":
                outer = next((one for one in reversed(enclosing) if one.kind == "cpu_op"), None)
                if outer:
                    outer.children += event.end - event.start
            enclosing.append(event)
    return sorted((event for found in by_thread.values() for event in found), key=lambda event: event.start)


def backward_node(event: HostEvent) -> HostEvent | None:
    """The evaluation of a node of autograd around an event, if there is one."""
    return next((outer for outer in event.ancestors() if outer.name.startswith(EVALUATED)), None)


class Reader:
    """Tells where work belongs, from the events of the host that launched it."""

    def __init__(self, host: list[HostEvent], operations: set[str]):
        self.operations = operations
        self.steps = [
            (event.start, event.end, int(event.name.removeprefix(STEP)))
            for event in host
            if event.kind == "user_annotation" and event.name.startswith(STEP)
        ]
        # An event shows the number that the next node of autograd will get: the last event with a number made the node.
        self.forward: dict[int, str] = {}
        for event in host:
            number = event.arguments.get("Sequence number")
            if event.kind == "cpu_op" and number is not None and not backward_node(event):
                self.forward[number] = self.operation_around(event)

    def kernel(self, kernel: dict, launch: HostEvent | None) -> Work:
        start, duration = float(kernel["ts"]), float(kernel["dur"])
        where = ("", OTHER, -1) if launch is None else self.place(launch)
        return Work(kernel["name"], start, start + duration, duration, *where)

    def operator(self, event: HostEvent) -> Work:
        busy = event.end - event.start - event.children
        return Work(event.name, event.start, event.end, busy, *self.place(event))

    def place(self, event: HostEvent) -> tuple[str, str, int]:
        """(operation, phase, step) of the work that an event of the host launched. The step is found by time, because on a GPU
        autograd launches from a thread of its own, while the thread with the ranges waits."""
        step = next((number for start, end, number in self.steps if start <= event.start < end), -1)
        node = backward_node(event)
        if node:
            made_by = self.forward.get(node.arguments.get("Sequence number"))
            return made_by or node.name.removeprefix(EVALUATED), BACKWARD, step
        ranges = {outer.name for outer in event.ancestors() if outer.kind == "user_annotation"}
        phase = OPTIMIZER if ranges & {UPDATE, SYNCHRONIZE} else FORWARD if MICRO_STEP in ranges else OTHER
        return "" if "GraphLaunch" in event.name else self.operation_around(event), phase, step

    def operation_around(self, event: HostEvent) -> str:
        """The innermost operation around an event, or else the outermost operator of torch."""
        outermost = ""
        for outer in event.ancestors():
            if outer.kind == "user_annotation" and outer.name in self.operations:
                return outer.name
            if outer.kind == "cpu_op":
                outermost = outer.name
        return outermost.removeprefix("aten::") or event.name


def memory_of(content: dict, on_gpu: bool) -> list[tuple[float, float]]:
    device = 1 if on_gpu else 0  # as torch numbers kinds of devices
    return sorted(
        (float(event["ts"]), float(event["args"]["Total Allocated"]))
        for event in content["traceEvents"]
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == device
    )


def phases_of(host: list[HostEvent]) -> list[tuple[str, float, float]]:
    """When the host launched forward, backward and update; backward begins with the first node of autograd in a micro-step."""
    nodes = [event for event in host if event.name.startswith(EVALUATED)]
    found = []
    for event in host:
        if event.kind != "user_annotation":
            continue
        if event.name == MICRO_STEP:
            begin = min((n.start for n in nodes if event.start <= n.start <= event.end), default=event.end)
            found += [(FORWARD, event.start, begin), (BACKWARD, begin, event.end)]
        elif event.name in (SYNCHRONIZE, UPDATE):
            found.append((OPTIMIZER, event.start, event.end))
    return [(phase, start, end) for phase, start, end in found if end > start]


def named_by_order(launched: list[Work], replayed: list[Work]) -> list[Work]:
    """The replayed work with operation and phase of the same kernels in a launched step, which come in the same order.

    A kernel that has no partner takes those of the launched kernels of its name, and is "unknown" if there are none.
    """
    partners: dict[int, Work] = {}
    names = [[work.name for work in part] for part in (launched, replayed)]
    for block in SequenceMatcher(None, *names, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            partners[block.b + i] = launched[block.a + i]
    by_name = {work.name: work for work in launched}
    found = []
    for number, work in enumerate(replayed):
        partner = partners.get(number) or by_name.get(work.name)
        if work.operation or partner is None:
            found.append(work if work.operation else replace(work, operation="unknown"))
        else:
            found.append(replace(work, operation=partner.operation, phase=partner.phase))
    return found


def gaps(work: list[Work]) -> list[tuple[float, Work, Work]]:
    """The times in which nothing ran: (µs, the work that ended last before, the work after)."""
    found, last = [], None
    for one in sorted(work, key=lambda one: one.start):
        if last is not None and one.start > last.end:
            found.append((one.start - last.end, last, one))
        if last is None or one.end > last.end:
            last = one
    return found
