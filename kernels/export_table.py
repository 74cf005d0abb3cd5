"""Write what the ahead-of-time library embeds: code.bin, all code in a row, and table.cpp, the rows of kernels/native/table.h."""

from pathlib import Path
from typing import Any

DTYPES = {
    "bf16": "NK_BFLOAT16", "fp16": "NK_FLOAT16", "fp32": "NK_FLOAT32", "fp64": "NK_FLOAT64", "i1": "NK_BOOL", "u8": "NK_UINT8",
    "i8": "NK_INT8", "i16": "NK_INT16", "i32": "NK_INT32", "i64": "NK_INT64",
}  # fmt: skip
ALIGNMENT = 64  # bytes; the driver reads a cubin in place
EMBEDDED = {"sm80": ("cubin", "ptx"), "sm90": ("cubin",)}  # sm_90a's PTX runs on sm_90 only, as its cubin does


class Rows:
    """Rows of a table in the order in which they were first seen, as C++; equal rows and equal runs of rows are stored once."""

    def __init__(self):
        self.rows: list[str] = []
        self.runs: dict[tuple[str, ...], int] = {}

    def place(self, rows: list[str]) -> str:
        """Return "first, count" of a run of rows."""
        key = tuple(rows)
        if key not in self.runs:
            self.runs[key] = len(self.rows)
            self.rows += rows
        return f"{self.runs[key]}, {len(rows)}"


def array(declaration: str, rows: list[str]) -> str:
    """Return the definition of an array. It has a row at least, which C++ requires and an empty run of rows never reads."""
    return "\n".join([f"const {declaration}[] = {{", *(f"    {{{row}}}," for row in rows or [""]), "};"])


def quoted(text: Any) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def parameter_row(parameter: dict[str, Any]) -> str:
    kind = parameter["kind"]
    if kind == "constant":
        is_none = parameter["value"] is None
        return f"{quoted(parameter['name'])}, Kind::{'none' if is_none else 'one'}, NK_NO_DTYPE, 1, 0, 0, {{}}"
    dtype = DTYPES[parameter["dtype"]] if kind in ("pointer", "matrix") else "NK_NO_DTYPE"
    block = parameter.get("block_size", [])
    numbers = f"{parameter.get('multiple', 1)}, {len(block)}, {parameter.get('swizzle', 0)}"
    return f"{quoted(parameter['name'])}, Kind::{kind}, {dtype}, {numbers}, {{{', '.join(map(str, block))}}}"


def write_table(manifest: dict[str, Any], folder: Path) -> None:
    """Write code.bin and table.cpp into the folder that the manifest describes."""
    constants, parameters, variants = Rows(), Rows(), Rows()
    kernels, entries, position = [], [], {}
    placed: dict[Path, str] = {}
    with (folder / "code.bin").open("wb") as code:

        def embed(path: Path) -> str:
            """Append a file, unless it is there already, and return "offset, size"."""
            if path not in placed:
                code.write(bytes(-code.tell() % ALIGNMENT))
                content = path.read_bytes()
                placed[path] = f"{{{code.tell()}, {len(content)}}}"
                code.write(content)
            return placed[path]

        for architecture, part in manifest["architectures"].items():
            number = architecture.removeprefix("sm")
            for name, kernel in part["kernels"].items():
                rows = []
                for variant in kernel["variants"]:
                    run = parameters.place([parameter_row(p) for p in variant["parameters"]])
                    codes = [
                        embed(folder / architecture / f"{variant['code']}.{kind}")
                        if kind in EMBEDDED[architecture]
                        else "{0, 0}"
                        for kind in ("cubin", "ptx")
                    ]
                    numbers = ", ".join(str(variant[key]) for key in ("warps", "shared", "registers", "spilled"))
                    rows.append(f"{quoted(variant['symbol'])}, {run}, {', '.join(codes)}, {numbers}")
                values = [
                    f"{quoted(key)}, {float(value)!r}"
                    for key, value in kernel["constants"].items()
                    if isinstance(value, int | float)
                ]
                run = f"{constants.place(values)}, {variants.place(rows)}"
                position[name, number] = len(kernels)
                kernels.append(f"{quoted(name)}, {quoted(kernel['function'])}, {number}, {run}")
            for entry in part["entries"]:
                words = ", ".join(quoted(entry[key]) for key in ("kernel", "dtype", "shape", "flags"))
                entries.append(f"{words}, {entry['launch']}, {number}, &kernels[{position[entry['id'], number]}]")
    text = [
        "// Written by python -m nanochat_kernels export",
        '#include "table.h"',
        "namespace nanochat {",
        "namespace {",
        array("Constant constants", constants.rows),
        array("Parameter parameters", parameters.rows),
        array("Variant variants", variants.rows),
        array("nk_kernel kernels", kernels),
        array("nk_entry entries", entries),
        "}  // namespace",
        f"const Table table = {{constants, parameters, variants, kernels, {len(kernels)}, entries, {len(entries)}, nk_code}};",
        "}  // namespace nanochat\n",
    ]
    (folder / "table.cpp").write_text("\n".join(text), "utf-8")
