"""The documentation tells what is: line references, commands and options. python -m tests.test_docs brings it up to date."""

import ast
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from nanochat.cli import COMMANDS
from nanochat.options.ranges import Between
from nanochat_kernels.dispatch import operations

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = ROOT / "docs" / "reference" / "options.md"
REFERENCE = re.compile(r"`([\w/]+\.py):(\d+)` `([^`]+)`")


def line_of(file: str, text: str) -> int:
    return line_in((ROOT / file).read_text("utf-8"), text)


def line_in(source: str, text: str) -> int:
    """The number of the line that begins with the text: `def newton_schulz` is not found in `def newton_schulz_op`."""
    begins = re.compile(rf"\s*{re.escape(text)}(?!\w)")
    numbers = [number for number, line in enumerate(source.splitlines(), 1) if begins.match(line)]
    assert len(numbers) == 1, f"{text!r} begins {len(numbers)} lines instead of one: {numbers}"
    return numbers[0]


def descriptions(kind: type) -> dict[str, str]:
    """The string under each field of a configuration."""
    source = Path(__import__(kind.__module__, fromlist=["x"]).__file__).read_text("utf-8")
    [body] = [n.body for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    pairs = zip(body, body[1:], strict=False)
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }


def options(kind: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(option, default, what it does), those of nested configurations too."""
    told = {
        name: text for base in reversed(kind.__mro__) if is_dataclass(base) for name, text in descriptions(base).items()
    }
    found, hints = [], get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = field.default if field.default is not MISSING else field.default_factory()
        given = re.search(r"name='(\w*)'", str(field.type))
        name = field.name if given is None else given[1]
        if is_dataclass(default):
            found += options(type(default), f"{prefix}{name}." if name else prefix)
        else:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            text = told.get(field.name, "")
            allowed = [r for r in getattr(hints[field.name], "__metadata__", ()) if isinstance(r, Between)]
            text += f" ({allowed[0]})" if text and allowed else ""
            option = name.upper() if "Positional" in str(field.type) else f"--{prefix}{name}".replace("_", "-")
            found.append((option, shown, text))
    return found


def reference() -> str:
    lines = [
        "# Every option of every command",
        "",
        "The defaults are those without a preset. A preset overrides defaults, and an option on the command line overrides both.",
        "",
    ]
    for name, command in COMMANDS.items():
        kind = command.load_options()
        summary = " ".join((kind.__doc__ or command.summary).split())
        lines += [f"## nanochat {name}", "", summary, ""]
        rows = options(kind)
        if rows:
            lines += ["| option | default | what it does |", "|---|---|---|"]
            lines += [
                f"| `{o}` | {f'`{d}`' if d else ''} | {' '.join(t.split()).replace('|', '/')} |" for o, d, t in rows
            ]
            lines.append("")
    return "\n".join(lines)


def updated(text: str) -> str:
    return REFERENCE.sub(lambda match: f"`{match[1]}:{line_of(match[1], match[3])}` `{match[3]}`", text)


def test_line_references_are_true():
    found = 0
    for page in PAGES:
        for file, number, text in REFERENCE.findall(page.read_text("utf-8")):
            found += 1
            assert line_of(file, text) == int(number), f"{page}: {text} is at {file}:{line_of(file, text)}"
    assert found > 15


def test_a_reference_is_to_a_whole_name_that_is_there_once():
    source = "def newton_schulz_op():\n    pass\n\n\ndef newton_schulz(x):\n    pass\n"
    assert line_in(source, "def newton_schulz") == 5 and line_in(source, "def newton_schulz_op") == 1
    for text in ("def newton", "pass"):
        with pytest.raises(AssertionError, match=f"{text}' begins"):
            line_in(source, text)


def test_files_that_are_named_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "bench").rglob("*.md"))]:
        for name in re.findall(r"`((?:kernels|nanochat|bench|tests|slurm)/[\w/.-]+\.\w+)[:`]", page.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{page} names {name}"


def files_of_tree(text: str) -> set[str]:
    """The files that the tree of the README lists: by indentation in folders, several names apart by two spaces on a line."""
    found, folders = set(), []
    for line in re.search(r"^```\n(kernels/.*?)^```", text, re.DOTALL | re.MULTILINE)[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"(?:(?<=^)|(?<=  ))[\w.]+(?:/|\.\w+)(?=  |$)", line)
        assert names and len(line) <= 132, line
        if names[0].endswith("/"):
            folders = [*folders[:depth], names[0]]
        else:
            found |= {"".join(folders[:depth]) + name for name in names}
    return found


def test_the_tree_of_the_readme_has_every_file():
    listed = files_of_tree((ROOT / "README.md").read_text("utf-8"))
    folders = [ROOT / name for name in ("kernels", "nanochat", "bench", "native", "slurm")]
    files = {path for folder in folders for path in folder.rglob("*.*") if path.is_file()}
    there = {
        str(path.relative_to(ROOT)) for path in files if not {"results", "__pycache__", "configs"} & set(path.parts)
    }
    assert listed == {name for name in there if not name.rpartition("/")[2].startswith("__")}


def test_the_readme_names_every_fused_operation():
    named = re.search(r"These are(.*?)\n\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[1]
    fused = {name for name, operation in operations().items() if "triton" in operation.implementations}
    assert set(re.findall(r"`(\w+)`", named)) == fused


def test_the_options_are_all_there():
    assert OPTIONS.read_text("utf-8") == reference(), "run: python -m tests.test_docs"
    for command in COMMANDS.values():
        assert all(text for _, _, text in options(command.load_options()))


def test_commands_exist_and_links_lead_somewhere():
    known = {option for command in COMMANDS.values() for option, _, _ in options(command.load_options())}
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                call = re.search(r"(?:^|/| )nanochat ((?:[a-z]+ ?){1,2})(.*?)(?:#|$)", line)
                if call and not line.startswith(("git", "cd")):
                    words = call[1].split()
                    assert " ".join(words) in COMMANDS or words[0] in COMMANDS, f"{page}: {line}"
                    for option in re.findall(r"--[a-z][\w.-]*", call[2]):
                        assert option in known, f"{page}: {line}"
        for target in re.findall(r"\]\(([^)#h][^)#]*)\)", text):
            assert (page.parent / target).exists(), f"{page} links to {target}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text("utf-8")), "utf-8")
    OPTIONS.write_text(reference(), "utf-8")
