"""Compile every launch of every kernel ahead of time, for the library that CMakeLists.txt builds. No GPU is needed.

The folder gets a cubin and the PTX of every launch, manifest.json, which describes them with registers, spills, shared memory,
instructions and parameters, and what the library embeds: code.bin with all code, and table.cpp, which says what is where.

A kernel of the library is a Triton kernel with its constants and options. It has one variant for every specialisation of its
arguments (dtypes, multiples of 16, ones), from which the library takes the first that the arguments of a launch satisfy. For
training, in bfloat16, there is a variant for batches of any size too.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanochat_kernels import configs, inspect
from nanochat_kernels.export_table import write_table
from nanochat_kernels.inspect import Place
from nanochat_kernels.library import identity
from nanochat_kernels.operation import MODEL_WIDTHS
from nanochat_kernels.triton_helpers import Launch, triton

PTX_OF = {"pointer": ("u64",), "integer32": ("u32",), "integer64": ("u64",), "float32": ("f32",), "float64": ("f64",)}
HIDDEN = ("u64", "u64")  # Triton's scratch memory, which is unused: export_launch makes sure
INTEGERS = {"i1": "integer8", "i8": "integer8", "i16": "integer16", "i32": "integer32", "i64": "integer64"}
FLOATS = {"fp32": "float32", "fp64": "float64"}


class CannotExport(RuntimeError):
    """The launcher of the library cannot launch this code; the message says why."""


def parameters(source, metadata) -> list[dict[str, Any]]:
    """Return the arguments that a caller gives, in order, with what the code requires of each.

    kind: pointer, integer32, integer64, float32, float64, matrix (a tensor descriptor), or constant for an integer or None (value)
    that was compiled in. multiple: what the integer or the address is divisible by.
    """
    names = source.fn.arg_names
    matrices = iter(getattr(metadata, "tensordesc_meta", None) or ())

    def flat(signature, path: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        name = ".".join([names[path[0]], *map(str, path[1:])])
        if isinstance(signature, tuple):
            for number, part in enumerate(signature):
                yield from flat(part, (*path, number))
        elif isinstance(source.constants.get(path), triton.language.constexpr):
            pass  # a constant of the kernel, see library.identity
        elif signature == "constexpr":
            if source.constants[path] not in (None, 1):
                raise CannotExport(f"{name} was compiled in as {source.constants[path]}, which the table cannot say")
            yield {"name": name, "kind": "constant", "value": source.constants[path]}
        elif signature.startswith("tensordesc"):
            matrix = next(matrices, None)
            if matrix is None or matrix["fp4_padded"]:
                raise CannotExport(f"{name} is a descriptor that this architecture has no instructions for")
            dtype = re.match(r"tensordesc<(\w+)\[", signature)[1]
            kept = {key: matrix[key] for key in ("swizzle", "block_size")}
            yield {"name": name, "kind": "matrix", "dtype": dtype, **kept}
        else:
            multiple = 16 if ["tt.divisibility", 16] in source.attrs.get(path, []) else 1
            dtype = signature.lstrip("*")
            kind = "pointer" if signature[0] == "*" else (INTEGERS | FLOATS).get(signature)
            if kind not in PTX_OF:
                raise CannotExport(f"{name} is of type {signature}, which the library's launcher does not pass")
            yield {"name": name, "kind": kind, "dtype": dtype, "multiple": multiple}

    declared = {param.num for param in source.fn.params if param.is_constexpr}
    types = enumerate(source.signature.values())
    return [part for number, signature in types if number not in declared for part in flat(signature, (number,))]


def export_launch(place: Place, architecture: str, folder: Path) -> dict[str, Any]:
    """Compile a launch, write its cubin and PTX, and return its line in the manifest. Raises CannotExport."""
    launch = inspect.launch_at(place, architecture)
    compiled = inspect.compile_launch(launch, architecture)
    metadata = compiled.metadata
    unused = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    for name in unused:
        if getattr(metadata, name, 0):
            raise CannotExport(
                f"{metadata.name} of {place.kernel} needs {name}, which the library's launcher does not provide"
            )
    if metadata.num_ctas != 1:
        raise CannotExport(f"{metadata.name} of {place.kernel} runs in clusters of {metadata.num_ctas} blocks")
    source, _ = inspect.specialize(launch, architecture)
    wanted = parameters(source, metadata)
    check_signature(compiled.asm["ptx"], wanted)
    content = {"cubin": compiled.asm["cubin"], "ptx": compiled.asm["ptx"].strip().encode() + b"\n\0"}
    name = f"{metadata.name}-{hashlib.sha256(content['cubin'] + content['ptx']).hexdigest()[:16]}"
    for kind, code in content.items():
        (folder / f"{name}.{kind}").write_bytes(code)
    found = asdict(inspect.inspect_code(compiled, launch, architecture, place))
    kept = ("registers", "spilled", "shared", "instructions", "defects")
    if place.any_batch:  # the launch tables are tuned without spills at the batches that training has
        found["defects"] = [defect for defect in found["defects"] if "spilled" not in defect]
    return {
        "code": name, "symbol": metadata.name, "any_batch": place.any_batch, "warps": metadata.num_warps, "parameters": wanted,
        "bytes": {kind: len(code) for kind, code in content.items()},
        **{key: found[key] for key in kept},
    }  # fmt: skip


def check_signature(ptx: str, wanted: list[dict[str, Any]]) -> None:
    """Raise CannotExport if the parameters of the entry in PTX are not those that the launcher will pass."""
    entry = re.search(r"\.entry \w+\(([^)]*)\)", ptx)[1]
    found = tuple(re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", entry))
    passed: tuple[str, ...] = ()
    for parameter in wanted:
        if parameter["kind"] == "matrix":
            rank = len(parameter["block_size"])
            passed += ("b8", *["u32"] * rank, *["u64"] * rank)
        elif parameter["kind"] != "constant":
            passed += PTX_OF[parameter["kind"]]
    if found != passed + HIDDEN:
        raise CannotExport(f"the code takes {' '.join(found)}, but the launcher passes {' '.join(passed + HIDDEN)}")


def fixed_of(launch: Launch) -> tuple:
    """Return the values of the arguments that are constants, in the tuple of an epilogue's."""
    flat = [x for given in launch.arguments for x in (given if isinstance(given, tuple) else (given,))]
    return tuple(x.value for x in flat if isinstance(x, triton.language.constexpr))


def constants_of(launch: Launch) -> dict[str, Any]:
    """Return the constants and options that a launch gives, functions by their names."""
    return {name: getattr(value, "__name__", value) for name, value in sorted(launch.constants.items())}


def export(architecture: str, folder: Path, only: tuple[str, ...] = (), training_only: bool = False) -> dict[str, Any]:
    """Compile for an architecture into a folder and return its part of the manifest."""
    launches, codes, kernels, entries = [], {}, {}, []
    for place, launch in inspect.recorded(architecture, only, training_only):
        code = inspect.code_of(launch, architecture)
        kernel = identity(launch.kernel, launch.constants, fixed_of(launch))
        codes.setdefault(code, place)
        kernels.setdefault(kernel, {"function": launch.kernel.__name__, "constants": constants_of(launch), "codes": {}})
        kernels[kernel]["codes"][code] = None  # a set with an order
        launches.append((place, kernel, launch.grid))
        if trains(place):
            code = inspect.code_of(inspect.for_any_batch(launch), architecture)
            codes.setdefault(code, place._replace(any_batch=True))
            kernels[kernel]["codes"][code] = None
    jobs = list(codes.values())
    (folder / architecture).mkdir(parents=True, exist_ok=True)
    exported = inspect.on_every_core(
        export_launch, jobs, *([x] * len(jobs) for x in (architecture, folder / architecture))
    )
    variants = dict(zip(codes, exported, strict=True))
    for kernel in kernels.values():
        kernel["variants"] = sorted((variants[code] for code in kernel.pop("codes")), key=generality)
    for place, kernel, grid in launches:
        dtype, key = configs.dtype_name(place.dtype), configs.format_key(place.key)
        words = {"kernel": place.kernel, "dtype": dtype, "shape": key, "flags": place.flags, "launch": place.number}
        entries.append(words | {"id": kernel, "grid": grid})
    return {"kernels": kernels, "entries": entries}


def export_all(architectures: list[str], folder: Path, only: tuple[str, ...] = (), training_only: bool = False) -> None:
    """Compile for architectures such as "80" and write the folder. training_only: see inspect.recorded.

    Raises CannotExport for an unknown architecture or kernel.
    """
    unknown = {number for number in architectures if f"sm{number}" not in inspect.SHARED_MEMORY_LIMIT}
    if unknown:
        raise CannotExport(
            f"there are launch tables for the architectures 80 and 90, not for {', '.join(sorted(unknown))}"
        )
    names = [kernel.name for kernel in inspect.dispatch.tunable_kernels()]
    if set(only) - set(names):
        raise CannotExport(f"no kernel is called {', '.join(set(only) - set(names))}; there are {', '.join(names)}")
    parts = {f"sm{number}": export(f"sm{number}", folder, only, training_only) for number in architectures}
    manifest = {"versions": versions(), "architectures": parts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, default=str) + "\n", "utf-8")
    write_table(manifest, folder)


def trains(place: Place) -> bool:
    """Whether training may launch it, with any batch: in its dtype, at a shape class of the launch table or a model's width."""
    kernel = next(kernel for kernel in inspect.dispatch.tunable_kernels() if kernel.name == place.kernel)
    if kernel.trained_in or place.dtype not in kernel.training_dtypes:
        return False
    return place.key in kernel.keys or bool(set(MODEL_WIDTHS.values()) & set(place.key))


def generality(variant: dict[str, Any]) -> tuple:
    """The sorting key that puts the variants that require most before those that serve more arguments."""
    required = [p["kind"] == "constant" or p.get("multiple", 1) > 1 for p in variant["parameters"]]
    narrow = [p["kind"] == "integer32" for p in variant["parameters"]]
    return -sum(required), -sum(narrow), variant["code"]


def versions() -> dict[str, str]:
    ptxas = triton.knobs.nvidia.ptxas
    return {"torch": torch.__version__, "triton": triton.__version__, "ptxas": ptxas.version}


def defects(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with the code, a sentence for each variant that has a defect."""
    found = []
    for architecture, part in manifest["architectures"].items():
        users = {entry["id"]: entry for entry in reversed(part["entries"])}
        for name, kernel in part["kernels"].items():
            words = " ".join(str(users[name][key]) for key in ("kernel", "dtype", "shape", "flags"))
            defective = [variant for variant in kernel["variants"] if variant["defects"]]
            found += [f"{architecture} {words}, {kernel['function']}: {', '.join(v['defects'])}" for v in defective]
    return found


def check(folder: Path) -> str:
    """Return what a folder that was exported contains. Raises CannotExport if some of its code has a defect or is missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        found = defects(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CannotExport(f"{folder / 'manifest.json'} is damaged ({error!r}); build again") from error
    lines = []
    for architecture, part in manifest["architectures"].items():
        variants = {v["code"]: v for kernel in part["kernels"].values() for v in kernel["variants"]}
        for code, variant in variants.items():
            for kind, size in variant["bytes"].items():
                path = folder / architecture / f"{code}.{kind}"
                if not path.is_file() or path.stat().st_size != size:
                    found.append(f"{path} is missing or has not {size} bytes; build again")
        names = {entry["kernel"] for entry in part["entries"]}
        lines.append(
            f"{architecture}: {len(part['entries'])} launches of {len(names)} kernels in {len(variants)} variants of code"
        )
    if found:
        raise CannotExport(f"{len(found)} defects, the first is {found[0]}")
    return "\n".join(lines)
