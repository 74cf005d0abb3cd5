"""A tiny world shared by the tests: data, a tokenizer, and a command to run nanochat in a process of its own."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

if not torch.cuda.is_available():  # before the kernels are imported: interpreted, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # tensors are small, and threads that wait for each other keep the cores from other tests
    if importlib.util.find_spec("triton"):
        from tests.interpreter import quicken

        quicken()

from nanochat.data.shards import Shards
from nanochat.options.data import GenerateOptions
from nanochat.platform.distributed import Runtime
from nanochat.platform.paths import Paths
from nanochat.synthetic.generate import generate
from nanochat.tokenizer.bpe import Tokenizer
from tests import forked

for number in (
    signal.SIGINT,
    signal.SIGHUP,
):  # ignored where nohup or a script's & has started the tests, and so in their processes
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

settings.register_profile("nanochat", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("nanochat")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plant", action="store_true", help="plant each fault in a copy of the kernels; a test must fail")
    parser.addoption("--sm80", action="store_true", help="run the PTX that is made for an A100 on the GPU here")
    parser.addoption("--library", type=Path, help="launch kernels from this libnanochat_kernels.so on the GPU here")
    parser.addoption("--slurm-preset", default="tiny", help="what the long Slurm test runs: tiny (minutes) or cpu")


LONGEST = (
    "test_slurm",
    "test_resume",
    "test_stopping",
    "test_distributed",
    "test_qkv_projection",
    "test_checkpoint",
    "test_qk_norm_rope",
    "test_newton_schulz",
    "test_optim",
    "test_evaluate_options",
    "test_stage_options",
    "test_reinforce",
    "test_exchange",
    "test_step_size",
    "test_relu2_mlp",
    "test_terminal",
    "test_web",
    "test_sandbox",
    "test_dispatch",
    "test_speedrun",
    "test_cli",
    "test_linear_cross_entropy",
    "test_output_projection",
    "test_adding_an_operation",
    "test_library",
    "test_kernel_bench",
    "test_scaled_product",
    "test_gate",
)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sm80"):
        from nanochat_kernels.architecture import run_ptx_of

        run_ptx_of("sm80")
    if config.getoption("--library"):
        if not torch.cuda.is_available():
            pytest.exit(
                "--library launches kernels on a GPU, and this machine has none", returncode=77
            )  # skipped, to CTest
        from nanochat_kernels import library

        library.use(config.getoption("--library"))


def pytest_terminal_summary(terminalreporter) -> None:
    library = sys.modules.get("nanochat_kernels.library")
    if found := library and library.in_use():
        terminalreporter.write_line(f"{found.path} served {found.served} launches")
        for kernel, reason in found.compiled.items():
            terminalreporter.write_line(f"Triton compiled {kernel}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take half a minute or more first, the longest at the beginning, so that no core is left with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


TINY_DATA = GenerateOptions(
    shards=2, documents=2100, chats=120, questions=120, problems=80, identity=20, words=300, tests=24
)
TINY_BASE = (
    "--depth 1 --context-length 32 --num-iterations 24 --device-batch-size 4 --total-batch-size 128 --eval-every 10 "
    "--eval-tokens 256 --core-metric-every -1 --sample-every -1 --save-every 4 --device cpu"
).split()
TINY_MID = (
    "--device-batch-size 4 --total-batch-size 512 --smoltalk 40 --mmlu 20 --gsm8k 20 --simple-spelling 10 "
    "--spelling-bee 10 --eval-rows 8 --eval-every 8 --save-every 5 --device cpu"
).split()
TINY_SFT = (
    "--device-batch-size 4 --examples-per-step 8 --arc-easy 10 --arc-challenge 10 --gsm8k 10 --smoltalk 10 "
    "--identity 10 --simple-spelling 5 --spelling-bee 5 --eval-every 5 --eval-rows 8 --chat-metric-every 0 "
    "--chat-metric-max-per-task 4 --save-every 3 --device cpu"
).split()
TINY_EVALUATE_BASE = "--tokens 512 --batch-size 4 --core-max-per-task 4 --device cpu".split()
TINY_EVALUATE_CHAT = "--max-per-task 4 --max-tokens 8 --tasks ARC-Easy SpellingBee --device cpu".split()


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A directory that is made by the worker that first needs it, for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        if not (root / name).exists():
            shutil.rmtree(root / f"{name}.part", ignore_errors=True)
            make(root / f"{name}.part")
            (root / f"{name}.part").rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def world_base(tmp_path_factory) -> Path:
    """A base directory with the tiny data and a tokenizer; copy it before writing to it."""

    def make(base: Path) -> None:
        paths = Paths(base)
        generate(TINY_DATA, paths)
        Tokenizer.train(Shards.of(paths, "train").documents(), 512).save(paths.tokenizer)

    return made_once(tmp_path_factory, "world", make)


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory, world_base) -> Path:
    """The tiny base directory after all three stages of training; copy it before writing to it."""

    def make(base: Path) -> None:
        shutil.copytree(world_base, base)
        for stage, arguments in (("base", TINY_BASE), ("mid", TINY_MID), ("sft", TINY_SFT)):
            done = nanochat(base, "train", stage, *arguments)
            assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def world(world_base) -> Paths:
    return Paths(world_base)


@pytest.fixture(scope="session")
def tokenizer(world) -> Tokenizer:
    return Tokenizer.load(world.tokenizer)


@pytest.fixture
def base(world_base, tmp_path) -> Path:
    """A copy of the tiny base directory, to be written to."""
    target = tmp_path / "base"
    shutil.copytree(world_base, target)
    return target


@pytest.fixture(scope="session")
def cpu() -> Runtime:
    return Runtime(0, 1, torch.device("cpu"), torch.float32)


def copy_packages(target: Path) -> None:
    """A copy of the source tree to change, importable with PYTHONPATH=target; its tests pass as the tree's do."""
    root = Path(__file__).parent.parent
    for folder in ("kernels", "nanochat", "bench", "tests"):
        shutil.copytree(root / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(root / "pyproject.toml", target)
    (target / "nanochat_kernels").symlink_to("kernels")


def environment(base: Path | None, **changes: str) -> dict[str, str]:
    """One thread, so that a busy machine does not change sums; `base` as the base directory. A PYTHONPATH comes before the one
    there is, which may be where the packages are."""
    env = {k: v for k, v in os.environ.items() if k not in ("NANOCHAT_BASE_DIR", "TRITON_INTERPRET")}
    if "PYTHONPATH" in changes and env.get("PYTHONPATH"):
        changes["PYTHONPATH"] += os.pathsep + env["PYTHONPATH"]
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **changes}
    return env | {"NANOCHAT_BASE_DIR": str(base)} if base else env


def nanochat(base: Path | None, *arguments: str, processes: int = 1, **changes: str) -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    return forked.run(*command(*arguments, processes=processes)[1:], env=environment(base, **changes))


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "nanochat", *arguments]


def assert_fails_with(result: subprocess.CompletedProcess, *parts: str) -> None:
    """A non-zero exit, one line on stderr that has all the parts, and no traceback."""
    assert result.returncode != 0, result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("nanochat: error:"), result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
