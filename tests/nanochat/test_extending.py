"""A new task, stage or option needs the changes that CONTRIBUTING.md lists and no other: made here in a copy of the tree."""

import shutil
from pathlib import Path

import pytest

from nanochat.platform.paths import Paths
from tests import forked
from tests.conftest import copy_packages, environment

PARROT = '''"""Parrot: repeat a word, for training and evaluation."""


class Parrot:
    """Say the word that the user says."""

    name, kind, baseline = "Parrot", "generative", 0.0
    files = ()

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict:
        word = "abcdefg"[index]
        return {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}

    def judge(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]
'''
GREET_OPTIONS = '''"""The options of `nanochat greet`."""

from dataclasses import dataclass

from nanochat.options.presets import NamedRun


@dataclass(frozen=True)
class GreetOptions(NamedRun):
    """Greet the reader of the report."""

    word: str = "hello"
    """the greeting"""
'''
GREET = '''"""`nanochat greet`: the function of a toy command."""

from nanochat.options.greet import GreetOptions


def greet(options: GreetOptions) -> dict:
    return {"greeting": options.word}
'''
CHECKS = """
import tests.test_docs as docs
docs.test_the_tree_of_the_readme_has_every_file()
docs.test_the_options_are_all_there()
print("the documentation is complete")
"""
ROOT = Path(__file__).parents[2]


class Tree:
    """A copy of the packages to change; `changed` has the names of the new and the edited files."""

    def __init__(self, root: Path):
        self.root, self.changed = root, set()
        copy_packages(root)
        shutil.copy(ROOT / "README.md", root)
        for folder in ("docs", "slurm"):
            shutil.copytree(ROOT / folder, root / folder)

    def add_file(self, name: str, text: str) -> None:
        assert not (self.root / name).exists()
        (self.root / name).write_text(text, "utf-8")
        self.changed.add(name)

    def insert(self, name: str, after: str, text: str) -> None:
        content = (self.root / name).read_text("utf-8")
        assert content.count(after) == 1, f"{name}: {after}"
        (self.root / name).write_text(content.replace(after, after + text), "utf-8")
        self.changed.add(name)

    def run(self, base: Path, *arguments: str) -> str:
        env = environment(base, PYTHONPATH=str(self.root))
        done = forked.run(*arguments, cwd=self.root, env=env)
        return done.stdout + done.stderr

    def check_documentation(self, base: Path) -> None:
        """Regenerate what is generated; then the README must list every file, and the reference every option."""
        self.run(base, "-m", "tests.test_docs")
        assert "the documentation is complete" in (output := self.run(base, "-c", CHECKS)), output


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path / "tree")


def test_a_task_takes_its_file_its_export_a_line_in_the_readme_and_the_file_of_each_use(tree, world_base):
    tree.add_file("nanochat/tasks/parrot.py", PARROT)
    tree.insert("nanochat/tasks/__init__.py", "import MMLU\n", "from nanochat.tasks.parrot import Parrot\n")
    tree.insert("nanochat/train/midtrain.py", "from nanochat.tasks import ", "Parrot, ")
    tree.insert("nanochat/train/midtrain.py", "    return Mixture(\n        [", "Parrot(), ")
    tree.insert("nanochat/evaluate/chat.py", "from nanochat.tasks import ", "Parrot, ")
    tree.insert("nanochat/evaluate/chat.py", "object]] = {", '"Parrot": lambda paths: Parrot(), ')
    parrot = "    parrot.py                  repeating a word\n"
    tree.insert("README.md", "    mmlu.py                    MMLU\n", parrot)
    assert len(tree.changed) == 3 + 2
    tree.check_documentation(world_base)
    code = (
        "from nanochat.options.train import TrainMidOptions; from nanochat.platform.paths import base_paths; "
        "from nanochat.train.midtrain import mid_mixture; print(mid_mixture(TrainMidOptions(), base_paths()).sizes())"
    )
    assert "'Parrot': 7" in tree.run(world_base, "-c", code)
    assert "no checkpoint of sft" in tree.run(world_base, "-m", "nanochat", "evaluate", "chat", "--tasks", "Parrot")


def test_a_stage_takes_its_function_its_options_and_a_line_in_four_files(tree, tmp_path):
    tree.add_file("nanochat/report/greet.py", GREET)
    tree.add_file("nanochat/options/greet.py", GREET_OPTIONS)
    stage = 'Stage("greeting", ("greet",), _section("greeting"), has_preset=False), '
    tree.insert("nanochat/speedrun/stages.py", "STAGES = (", stage)
    command = '"greet": Command("greet:GreetOptions", "report.greet:greet", "greet", section="greeting"), '
    tree.insert("nanochat/cli.py", "COMMANDS = {", command)
    tree.insert("nanochat/report/sections.py", "TITLES = {", '"greeting": "The greeting", ')
    lines = {
        "    report.py                  report\n": "    greet.py                   greet\n",
        "    page.py                    markdown as one HTML page\n": "    greet.py                   `nanochat greet`\n",
    }
    for after, line in lines.items():
        tree.insert("README.md", after, line)
    assert len(tree.changed) == 2 + 4
    base = tmp_path / "base"
    tree.check_documentation(base)
    assert "`--word`" in (tree.root / "docs/reference/options.md").read_text("utf-8")
    speedrun = ("-m", "nanochat", "speedrun", "--from", "greeting", "--to", "greeting")
    done = tree.run(base, *speedrun)
    assert "greeting: done" in done and "all stages up to greeting are done" in done, done
    assert "greeting: finished before, skipped" in tree.run(base, *speedrun)
    assert "greeting" in tree.run(base, "-m", "nanochat", "cluster", "status")
    tree.run(base, "-m", "nanochat", "report")
    assert "## The greeting" in (Paths(base, "cpu").run / "report" / "report.md").read_text("utf-8")


def test_an_option_takes_one_field(tree, tmp_path):
    field = '\n    loudness: Annotated[int, AtLeast(1)] = 3\n    """volume of the report, in phons"""\n'
    tree.insert("nanochat/options/report.py", 'finished so far."""\n', field)
    assert len(tree.changed) == 1
    help_text = tree.run(tmp_path, "-m", "nanochat", "report", "--help")
    assert "--loudness" in help_text and "volume of the report, in phons" in help_text
    wrong = tree.run(tmp_path, "-m", "nanochat", "report", "--loudness", "0")
    assert "--loudness must be at least 1, got 0" in wrong
    code = "from nanochat.options.report import ReportOptions; from tests.test_docs import options; print(options(ReportOptions))"
    assert "('--loudness', '3', 'volume of the report, in phons (at least 1)')" in tree.run(tmp_path, "-c", code)
