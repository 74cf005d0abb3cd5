"""`nanochat preflight`: checks before a run that its data are complete and that disk, GPUs and time suffice.

It needs no network and starts no work on a GPU.
"""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat.checkpoint import leftovers
from nanochat.gate import check_gate_rows, gate_rows, take_gate
from nanochat.gpt import GPTConfig
from nanochat.options.presets import EMBEDDED, ON_CPU, with_preset
from nanochat.options.speedrun import PreflightOptions
from nanochat.options.train import TrainBaseOptions, TrainMidOptions, TrainRlOptions, TrainSftOptions
from nanochat.platform.console import say
from nanochat.platform.distributed import Runtime, compute_dtype, pick_device
from nanochat.platform.environment import slurm_seconds_left
from nanochat.platform.errors import UserError
from nanochat.platform.files import MANIFEST, all_files, read_json
from nanochat.platform.paths import TRAINING_STAGES, Paths, steps_in
from nanochat.speedrun.assets import problems, remedy
from nanochat.speedrun.records import count_start
from nanochat.speedrun.stages import STAGES
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.train.memory import MOST_ROWS, rows_that_fit
from nanochat.train.plan import horizon

MFU = 0.5  # model FLOPs utilization that the estimate of time assumes
OTHER_STAGES = 0.35  # the time of all other stages, as a share of pretraining's


def preflight(options: PreflightOptions, paths: Paths) -> None:
    """Check everything and print a line for each check. Raises UserError at the end when a check failed.

    In a job that is queued again and again without progress it raises UserError at once.
    """
    if not options.data_only:
        count_start(paths)  # here and not in the run, which may be stopped before it has begun
    failures, missing = [], []
    for asset, rows, problem in problems(options.preset, paths, options.shards):
        if problem:
            failures.append(problem)
            missing.append(asset)
        else:
            say(f"ok   {asset.name}: {rows:,} {'shards' if asset.name == 'text' else 'rows'}")
    if options.preset in EMBEDDED:
        written = [paths.embedded / name for name in read_json(paths.embedded / MANIFEST) or {}]
        unreadable = [problem for path in written if (problem := _problem_of(path, paths))]
        failures += unreadable
        if not unreadable:
            say(f"ok   data: {'the run generated them' if paths.embedded.exists() else 'the run generates them'}")
    if not options.data_only:
        failures += _check_machine(options, paths)
    for failure in failures:
        say(f"BAD  {failure}")
    if failures:
        more = f" and {len(failures) - 1} more, see above" if len(failures) > 1 else ""
        what_to_do = f"; {remedy(options.preset, missing, options.shards)}" if missing else ""
        raise UserError(f"preflight of {options.preset}: {failures[0]}{more}{what_to_do}")
    say(f"preflight of {options.preset}: everything is there")


def _problem_of(path: Path, paths: Paths) -> str:
    """What is wrong with a file of generated data; empty for one that can be read."""
    try:
        if not path.is_file():
            raise FileNotFoundError("it is no file, or gone")
        if path.suffix == ".parquet":
            pq.ParquetFile(path).metadata.num_rows  # noqa: B018
        else:
            path.read_text("utf-8")
    except (OSError, ValueError, pa.ArrowException) as error:
        replace = f"nanochat data generate{paths.as_option} --changed replace"
        return f"{path} cannot be read ({error}); correct it, or write all generated data again with: {replace}"
    return ""


def _check_machine(options: PreflightOptions, paths: Paths) -> list[str]:
    """Check GPUs, disk, time and gate file; returns the failures."""
    failures = []
    device = pick_device("auto")
    if options.preset not in ON_CPU and device != "cuda":
        failures.append(
            "there is no GPU here, and the preset needs one; request GPUs with: nanochat cluster submit --gpus"
        )
    base = with_preset(TrainBaseOptions(), "train base", options.preset)
    vocabulary = Tokenizer.load(paths.tokenizer, paths.make_tokenizer).vocab_size if paths.tokenizer.exists() else 65536
    model = GPTConfig.from_depth(base.depth, vocabulary, base.context_length, base.n_kv_head)
    # a checkpoint has 4 bytes for each weight, each momentum of a matrix, and each mean and variance of embedding and head
    embeddings = 2 * model.vocab_size * model.width
    checkpoint = 8 * (model.num_parameters - embeddings) + 12 * embeddings
    trained = [stage.name for stage in STAGES if stage.trains and (options.rl or not stage.optional)]
    kept = sum(len(steps_in(paths.checkpoints(stage))) for stage in trained)
    needed, free = checkpoint * max(1, 2 * len(trained) + 1 - kept), shutil.disk_usage(paths.base).free
    # each stage removes its own when it starts
    swept = [path for stage in TRAINING_STAGES for path in leftovers(paths.checkpoints(stage))]
    free += sum(file.stat().st_size for path in swept for file in all_files(path))
    line = f"disk: {free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.1f} more"
    if free < needed:
        failures.append(f"{line}; free space in {paths.base}, or set NANOCHAT_BASE_DIR")
    else:
        say(f"ok   {line}")
    if device == "cuda":
        count = torch.cuda.device_count()
        runtime = Runtime(0, 1, torch.device("cuda", 0), compute_dtype(device))
        say(f"ok   {count} × {runtime.device_name}")
        _estimate(base, model, runtime, count)
        try:
            model, micro_step_ms = take_gate(paths, model, 1, runtime)
            most, given = min(MOST_ROWS, gate_rows(paths) or MOST_ROWS), base.device_batch_size
            rows = rows_that_fit(model, runtime, base.run.execution, given, count, most, micro_step_ms)
            say(f"ok   memory: micro-batches of up to {rows} rows fit into the {runtime.memory / 1e9:.1f} GB of a GPU")
            check_gate_rows(paths, max(given_rows(options.preset)))
        except UserError as error:
            failures.append(str(error))
    if not paths.gate.exists():
        say(
            f"ok   no gate file: the launch tables choose the kernels (nanochat kernels gate --preset {options.preset} would measure "
            "them on this device)"
        )
    return failures


def given_rows(preset: str) -> list[int]:
    """The rows of a micro-batch that a preset names for each stage of training; 0: as many as fit."""
    stages = {
        "train base": TrainBaseOptions,
        "train mid": TrainMidOptions,
        "train sft": TrainSftOptions,
        "train rl": TrainRlOptions,
    }
    return [with_preset(kind(), name, preset).device_batch_size for name, kind in stages.items()]


def most_rows(preset: str, model: GPTConfig, runtime: Runtime) -> int:
    """The largest micro-batch of a preset's training stages, in rows, by any number of processes; a gate at this size serves all of
    them. Raises UserError if the model does not fit on the device."""
    given = given_rows(preset)
    if min(given) > 0:
        return max(given)
    # each of many processes has a smaller share of the optimizer's state, but memory for their exchange
    return max(rows_that_fit(model, runtime, "auto", processes=processes) for processes in (8, 1000))


def _estimate(base: TrainBaseOptions, model: GPTConfig, runtime: Runtime, count: int) -> None:
    """Print how long the run takes, and whether the Slurm job ends before it is done."""
    if not runtime.peak_flops:
        return
    flops = horizon(base, model) * base.total_batch_size * model.flops_per_token
    hours = flops / (runtime.peak_flops * count * MFU) * (1 + OTHER_STAGES) / 3600
    left = slurm_seconds_left()
    say(f"ok   time: about {hours:.1f} h from the beginning, at {100 * MFU:.0f} % of the peak")
    if left is not None and left / 3600 < hours:
        say(f"note the job ends in {left / 3600:.1f} h: a run that is not done then is saved and queued again")
