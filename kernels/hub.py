"""Write the package in the layout of Hugging Face's kernels hub, from which its library `kernels` loads it.

A repository of the hub has a folder for each variant of a build. These are without an architecture, because Triton compiles the
kernels: build/torch-cuda, and build/torch-cpu for the references. A variant has the Python files, the launch tables and
metadata.json, and is imported under a name of its own, so that its imports are relative.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

SOURCE = Path(__file__).parent
VERSION = 1
ARCHITECTURES = ["8.0", "9.0"]  # those with launch tables
# what the command line needs, and not the operations
LEFT_OUT = {"__main__.py", "export.py", "export_table.py", "hub.py"}


def relative_imports(text: str, depth: int) -> str:
    """Return the source of a module of this package, `depth` folders below its root, with relative imports."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*)from nanochat_kernels import ", rf"\1from {dots} import ", text, flags=re.MULTILINE)
    return re.sub(r"^(\s*)from nanochat_kernels\.", rf"\1from {dots}", text, flags=re.MULTILINE)


def write_hub(folder: Path) -> None:
    """Replace the variants of this package in folder/build."""
    files = [
        path for path in sorted(SOURCE.rglob("*")) if path.suffix in (".py", ".json") and path.name not in LEFT_OUT
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    for backend in ("cuda", "cpu"):
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path in files:
            name = path.relative_to(SOURCE)
            text = path.read_text("utf-8")
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                text = relative_imports(text, len(name.parts) - 1)
            (variant / name).write_text(text, "utf-8")
        metadata = {
            "id": f"_nanochat_kernels_{backend}_{digest}",
            "name": "nanochat-kernels",
            "version": VERSION,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend} | ({"archs": ARCHITECTURES} if backend == "cuda" else {}),
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
