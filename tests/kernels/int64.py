"""Find faults in a kernel's code that running it on a CPU cannot show: `python -m tests.kernels.int64 kernel…` prints them.

These are offsets that overflow beyond 2³¹, because tensors large enough to show it take gigabytes, and minima and maxima that drop
NaN, because NumPy's do not. Each recorded launch is compiled to Triton's intermediate representation, which has explicit types.
Reported are
- a floating-point minimum or maximum that returns the other operand for NaN (minnumf, maxnumf);
- an int32 offset that depends on the number of the program or on a loop's index;
- an int32 product of two run-time numbers of which one depends on these.
In `matrix_product` and `symmetric_product` only the offsets of whole matrices and of the first row of a block count: as_rows copies
views whose rows lie so far apart that those of one block would overflow.
The kernels of products number rows in int32, so that a vector of int32 is no fault where it is not a product. Attention's maximum
drops NaN without harm.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# with the maximum of a softmax, a NaN passes through the exponentials and their sum
SUM_NAN = ("attention_forward", "attention_decode")
NUMBER_ROWS = ("product_kernel", "epilogue_kernel", "finish_kernel")


def narrow_offsets(*kernels: str) -> str:
    """Return the report for the named kernels. It runs in a process of its own, because this one may interpret kernels."""
    from tests import forked
    from tests.conftest import environment  # not for that process: on a CPU it switches to the interpreter

    done = forked.run("-m", "tests.kernels.int64", *kernels, cwd=ROOT, env=environment(None))
    return done.stdout + done.stderr[-2000:]


class Reached(Exception):
    """The compiler has come to the intermediate representation, which is the argument."""


def intermediate_representation(launch) -> str:
    """Return a recorded launch in Triton's intermediate representation for an A100, as text, without making code of it."""
    import triton

    from nanochat_kernels.inspect import specialize, target_of

    def stop_there(backend=None, stages=None, *_):
        if stages is None:
            return "intermediate representation", "alone"  # what Triton's cache knows it by
        compute = stages["ttir"]

        def stage(module, metadata):
            raise Reached(str(compute(module, metadata)))

        stages["ttir"] = stage
        return None

    source, options = specialize(launch, "sm80")
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = stop_there
        try:
            triton.compile(source, target=target_of("sm80"), options=options)
        except Reached as found:
            return found.args[0]
    raise RuntimeError("Triton compiled a kernel without its stage 'ttir'")


def faults(text: str, only_scalars: bool = False, narrow_rows: bool = False) -> list[str]:
    """Return the lines of the intermediate representation with a fault that the top of this file describes.

    only_scalars: offsets of whole matrices alone count. narrow_rows: the kernel numbers rows in int32.
    """
    numbers, constants, narrow, found = set(), set(), set(), []  # numbers: values that depend on a program or a loop
    for line in map(str.strip, text.splitlines()):
        line = re.sub(r"\s*loc\(.*\)\s*\{?$", "", line)
        loop = re.match(r"(?:(%[\w:]+) = )?scf\.for (%\w+) = ", line)
        results = re.findall(r"%\w+", line.split(" = ")[0]) if " = " in line else []
        operands = re.findall(r"%\w+", line.split(" = ", 1)[1]) if results else []
        if loop:
            results = [loop.group(2), *results]
        for names in (numbers, constants, narrow):
            names.difference_update(results)  # the branches of a condition may use the same names
        if "arith.constant" in line or "tt.make_range" in line:
            constants.update(results)
        if "arith.minnumf" in line or "arith.maxnumf" in line:
            found.append(line)
        if results and operands and all(x in constants for x in operands):
            constants.update(results)
        # a truth value is no such number, and neither is the root of a tile's number: its square is
        ends = "arith.cmpi" in line or "arith.fptosi" in line
        if "tt.get_program_id" in line or loop or (any(x in numbers for x in operands) and not ends):
            numbers.update(results)
        is_narrow = any(x in narrow for x in operands) or (
            "arith.muli" in line
            and re.search(r"i32(?:>|$)", line)
            and not any(x in constants for x in operands)
            and any(x in numbers for x in operands)
        )
        if is_narrow and "tt.load" not in line:
            narrow.update(results)
        if "tt.addptr" in line:
            offset = operands[1]
            scalar = not line.split(" : ")[1].startswith("tensor")
            if scalar or not only_scalars:
                is_row = narrow_rows and re.search(r"tensor<\d+xi32>$", line)
                is_int32 = re.search(r"i32>?$", line) and not is_row
                if offset in numbers and (is_int32 or offset in narrow):
                    found.append(line)
            # do not report it again where something is added to it
            narrow.difference_update(results)
    return found


def main() -> None:
    import torch

    from nanochat_kernels import dispatch
    from nanochat_kernels.triton_helpers import recorded_launches

    for kernel in dispatch.tunable_kernels():
        if kernel.name not in sys.argv[1:]:
            continue
        with recorded_launches() as launches:
            for run in kernel.launches(kernel.keys[0], kernel.dtypes[0], torch.device("meta")).values():
                run(None)
        assert launches, kernel.name
        for launch in launches:
            only_scalars, narrow_rows = kernel.name.endswith("_product"), launch.kernel.fn.__name__ in NUMBER_ROWS
            for line in faults(intermediate_representation(launch), only_scalars, narrow_rows):
                if kernel.name in SUM_NAN and "arith.maxnumf" in line:
                    continue
                print(f"{kernel.name}: {line}")


if __name__ == "__main__":
    main()
