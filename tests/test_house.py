"""The rules of the house that a machine can hold: imports run one way, and every import is declared."""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("kernels", "nanochat", "bench", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]
# A module may import from its own layer and from those below it. A name stands for everything in it, the longest one counts.
LAYERS = (
    ("nanochat.cli", "nanochat.__main__"),
    ("nanochat.cluster.submit", "nanochat.cluster.status", "nanochat.tools"),
    ("nanochat.speedrun",),
    ("nanochat.report", "nanochat.chat"),
    ("nanochat.train",),
    ("nanochat.evaluate",),
    ("nanochat.huggingface",),
    ("nanochat.checkpoint", "nanochat.synthetic"),
    ("nanochat.training_state",),
    ("nanochat.tasks",),
    (
        "nanochat.inference",
        "nanochat.optim",
        "nanochat.parameter_groups",
        "nanochat.gate",
        "nanochat.data",
        "nanochat.tokenizer.training",
    ),
    ("nanochat.gpt", "nanochat.tokenizer"),
    ("nanochat.cluster",),
    ("nanochat.options",),
    ("nanochat.platform", "nanochat"),
    ("nanochat_kernels",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    """The number of a module's layer: of the longest name in LAYERS that it begins with."""
    while module not in LAYER_OF:
        module = module.rpartition(".")[0]
    return LAYER_OF[module]


def test_imports_run_one_way():
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module.split(".")[0] == "kernels":
            assert not {n for n in imports(path) if n.split(".")[0] in ("nanochat", "bench", "tests")}, path
        if not module.startswith("nanochat."):
            continue
        for name in imports(path):
            if name.startswith("nanochat."):
                assert layer(name) >= layer(module), f"{module} imports {name}, which lies above it"
            if name.startswith("nanochat_kernels"):
                assert name.count(".") <= 1, f"{module} imports {name}: only kernels' public functions are its business"


def test_every_module_of_our_own_that_is_imported_exists():
    """Also in files that no test imports, as programs in bench/ that need a GPU or a network."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                package, *rest = module.split(".")
                if package in ("nanochat_kernels", "nanochat", "bench", "tests"):
                    file = ROOT.joinpath(package.removeprefix("nanochat_") if "_" in package else package, *rest)
                    assert file.is_dir() or file.with_suffix(".py").exists(), f"{path} imports {module}"


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for part in project["optional-dependencies"].values() for d in part)]
    names = {re.match(r"[\w-]+", d).group().lower().replace("-", "_") for d in declared}
    modules = {"quack": "quack_kernels", "yaml": "pyyaml", "markdown_it": "markdown_it_py", "tomli": None}
    for path in SOURCES:
        for name in {n.split(".")[0] for n in imports(path)}:
            if name in sys.stdlib_module_names or name in ("nanochat_kernels", "nanochat", "bench", "tests", "tomllib"):
                continue
            wanted = modules.get(name, name)
            assert wanted is None or wanted in names, f"{path} imports {name}, which pyproject.toml does not declare"


def test_every_dependency_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {"pyyaml": "yaml", "markdown-it-py": "markdown_it"}
    imported = {name.split(".")[0] for path in SOURCES if "tests" not in path.parts for name in imports(path)}
    for dependency in project["dependencies"]:
        name = re.match(r"[\w-]+", dependency).group()
        assert modules.get(name, name) in imported, f"pyproject.toml lists {name}, which nothing imports"


def test_the_packages_are_those_of_the_tree_and_none_is_called_kernels():
    """Hugging Face's library is called kernels: a package of that name would overwrite it, or be taken for it."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for folder in ("kernels", "nanochat", "bench")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(setuptools["packages"]) == {re.sub("^kernels", "nanochat_kernels", name) for name in folders}
    assert setuptools["package-dir"] == {"nanochat_kernels": "kernels"}
    # in code within strings too: from the root of the tree, that name would import a second copy
    second_copy = re.compile(r"\b(import (\w+, )*" + r"kernels|from " + r"kernels)\b")
    for path in SOURCES:
        assert not second_copy.search(path.read_text("utf-8")), path


def test_files_stay_short_or_say_why():
    for path in SOURCES:
        text = path.read_text("utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        says_why = "This file is long because" in docstring
        assert len(text.splitlines()) <= 400 or says_why, f"{path} has more than 400 lines and does not say why"


def test_the_environment_is_read_in_one_place():
    for path in SOURCES:
        if path == ROOT / "nanochat" / "platform" / "environment.py" or "tests" in path.parts:
            continue
        for line in path.read_text("utf-8").splitlines():
            reads = re.search(r"os\.(environ\.get|getenv|environ\[[^\]]+\](?! *=))", line)
            assert not reads, f"{path} reads the environment: {line.strip()}"


def test_a_constant_of_the_model_stands_in_one_file():
    """SOFTCAP and ROPE_BASE are part of the definition of operations: the model takes them from there."""
    for name in ("SOFTCAP", "ROPE_BASE"):
        defines = [path for path in SOURCES if re.search(rf"^{name} = ", path.read_text("utf-8"), re.MULTILINE)]
        assert defines == [ROOT / "kernels" / "reference.py"], name
