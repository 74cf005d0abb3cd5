"""The data that a run needs from outside, as one list for fetch, preflight and the speedrun, and their verification."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.evaluate.core import load_bundle
from nanochat.options.presets import EMBEDDED, SHARDS
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json, read_json_lines, write_json
from nanochat.platform.paths import Paths

VALIDATION_SHARD = 1822  # the last shard of the whole data set
MAX_GROWTH = 1.05  # a data set may have this many times the rows that were counted, since data sets grow
CORE_TASKS = 22
KEPT = "kept"  # in the record of a file that a user has put in the place of one that is fetched
ALL_EVALUATIONS = ("mid-eval", "sft-eval", "rl-eval")


@dataclass(frozen=True)
class Asset:
    """A data set, or a split of one.

    With `repo`, it is downloaded from the hub: `files` are patterns of its files, and `target` is a directory for them. With
    `url`, the file at that address becomes `target`, or an archive is unpacked to it. With neither, nanochat generates it.
    """

    name: str
    stages: tuple[str, ...]  # the stages that read it
    target: str  # path under the base directory
    rows: int  # the rows that were counted in it
    megabytes: float
    columns: tuple[str, ...] = ()
    repo: str = ""
    files: tuple[str, ...] = ()
    url: str = ""

    def present(self, paths: Paths) -> list[Path]:
        """Those of its files that exist."""
        target = paths.base / self.target
        if self.files:
            patterns = [pattern.rpartition("/")[2] for pattern in self.files]
            return sorted({path for pattern in patterns for path in target.glob(pattern)})
        if target.is_dir():
            return sorted(path for path in target.rglob("*") if path.is_file())
        return [target] if target.exists() else []


def _chat(
    name: str, stages: tuple[str, ...], rows: int, megabytes: float, columns: tuple[str, ...], repo: str, file: str
) -> Asset:
    return Asset(name, stages, f"chat/{name.partition('/')[0]}", rows, megabytes, columns, repo, (file,))


_CHOICES = ("question", "choices", "answerKey")
_CODE = ("prompt", "canonical_solution", "test", "entry_point")
_SMOLTALK, _MMLU, _ARC, _GSM8K = "HuggingFaceTB/smol-smoltalk", "cais/mmlu", "allenai/ai2_arc", "openai/gsm8k"
_ASSETS = (
    _chat("smoltalk/train", ("mid", "sft"), 460_341, 900, ("messages",), _SMOLTALK, "data/train-*.parquet"),
    _chat("smoltalk/test", ("mid", "sft"), 24_229, 50, ("messages",), _SMOLTALK, "data/test-*.parquet"),
    _chat("mmlu/auxiliary_train", ("mid",), 99_842, 50, ("question", "choices", "answer"), _MMLU,
          "all/auxiliary_train-*.parquet"),
    _chat("mmlu/test", ("mid", "sft", *ALL_EVALUATIONS), 14_042, 4, ("question", "choices", "answer"), _MMLU,
          "all/test-*.parquet"),
    _chat("gsm8k/train", ("mid", "sft", "rl"), 7_473, 3, ("question", "answer"), _GSM8K, "main/train-*.parquet"),
    _chat("gsm8k/test", ("mid", "rl", *ALL_EVALUATIONS), 1_319, 1, ("question", "answer"), _GSM8K, "main/test-*.parquet"),
    _chat("arc-easy/train", ("sft",), 2_251, 1, _CHOICES, _ARC, "ARC-Easy/train-*.parquet"),
    _chat("arc-easy/test", ("sft", *ALL_EVALUATIONS), 2_376, 1, _CHOICES, _ARC, "ARC-Easy/test-*.parquet"),
    _chat("arc-challenge/train", ("sft",), 1_119, 1, _CHOICES, _ARC, "ARC-Challenge/train-*.parquet"),
    _chat("arc-challenge/test", ALL_EVALUATIONS, 1_172, 1, _CHOICES, _ARC, "ARC-Challenge/test-*.parquet"),
    _chat("humaneval/test", ALL_EVALUATIONS, 164, 1, _CODE, "openai/openai_humaneval", "openai_humaneval/test-*.parquet"),
    Asset("identity", ("mid", "sft"), "chat/identity/conversations.jsonl", 1_000, 1),
    Asset("words", ("mid", "sft", *ALL_EVALUATIONS), "words.txt", 370_105, 5,
          url="https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"),
    Asset("eval_bundle", ("base", "base-eval"), "eval_bundle", CORE_TASKS, 160,
          url="https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"),
)  # fmt: skip


def text_asset(shards: int) -> Asset:
    """The pretraining text: the first `shards` shards of FineWeb-Edu, and the shard for validation."""
    numbers = [*range(shards), VALIDATION_SHARD]
    return Asset(
        "text", ("tokenizer", "tokenizer-eval", "base", "base-eval"), "text", len(numbers), 100.0 * len(numbers), ("text",),
        "karpathy/fineweb-edu-100b-shuffle", tuple(f"shard_{number:05d}.parquet" for number in numbers),
    )  # fmt: skip


def assets(preset: str, shards: int = 0) -> tuple[Asset, ...]:
    """The assets that a preset's stages read. shards: of pretraining text, 0 for the preset's number."""
    return () if preset in EMBEDDED else (text_asset(shards or SHARDS[preset]), *_ASSETS)


def verify(asset: Asset, paths: Paths, record: dict[str, list] | None = None) -> int:
    """Open every file of an asset; returns its number of rows (of shards, for text). Raises UserError that names the problem.

    record: what is known of the asset's files, by default from the record of all that was fetched.
    """
    files = asset.present(paths)
    record = read_fetched(paths).get(asset.name, {}) if record is None else record
    for name, content in record.items():
        size = content[0] if content else None
        actual = (paths.base / name).stat().st_size if (paths.base / name).exists() else None
        if actual != size:
            problem = "is missing" if actual is None else f"has {actual} of {size} bytes"
            raise _asset_error(asset, f"{paths.base / name} {problem}")
    if asset.name == "text":
        missing = set(asset.files) - {path.name for path in files}
        if missing:
            raise _asset_error(
                asset,
                f"of {len(asset.files)} shards of FineWeb-Edu {len(missing)} are missing, the first {min(missing)}",
            )
        for path in files:
            _rows(asset, path)
        return len(files)
    if not files:
        raise _asset_error(asset, f"there is nothing at {paths.base / asset.target}")
    rows = sum(_rows(asset, path) for path in files) if asset.name != "eval_bundle" else _bundle_tasks(asset, paths)
    # what is generated may be replaced by the user's own, which has any number of rows
    kept = not (asset.repo or asset.url) or any(KEPT in file for file in record.values())
    if not kept and not asset.rows <= rows <= asset.rows * MAX_GROWTH:
        raise _asset_error(
            asset, f"it has {rows:,} rows, wanted {asset.rows:,}: it is another configuration, or incomplete"
        )
    return rows


def _rows(asset: Asset, path: Path) -> int:
    try:
        if path.suffix != ".parquet":
            if path.suffix == ".jsonl":
                return len(read_json_lines(path))
            return sum(1 for line in path.read_text("utf-8").split("\n") if line.strip())
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
    except (OSError, ValueError, pa.ArrowException, UserError) as error:
        raise _asset_error(asset, f"{path} is truncated or of another format ({str(error).splitlines()[0]})") from error
    absent = [column for column in asset.columns if column not in names]
    if absent or not rows:
        raise _asset_error(asset, f"{path} has {rows} rows of {', '.join(names)}; wanted {', '.join(asset.columns)}")
    return rows


def _bundle_tasks(asset: Asset, paths: Paths) -> int:
    try:
        return len(load_bundle(paths.base / asset.target))
    except UserError as error:
        raise _asset_error(asset, str(error).partition(";")[0]) from error


def _asset_error(asset: Asset, problem: str) -> UserError:
    return UserError(f"{asset.name}, which the stages {', '.join(asset.stages)} read: {problem}")


def problems(preset: str, paths: Paths, shards: int = 0) -> Iterator[tuple[Asset, int, str]]:
    """Verify every asset of a preset; yields (asset, rows, problem) with an empty string for no problem."""
    for asset in assets(preset, shards):
        try:
            yield asset, verify(asset, paths), ""
        except UserError as error:
            yield asset, 0, str(error)


def remedy(preset: str, missing: list[Asset], shards: int = 0) -> str:
    """The one command that gets all missing assets of a preset, for a message."""
    everything = len(missing) == len(assets(preset, shards))
    only = "" if everything else f" --only {' '.join(asset.name for asset in missing)}"
    number = f" --shards {shards}" if shards else ""
    return f"fetch it on a node with internet: nanochat fetch{only} --preset {preset}{number}"


def read_fetched(paths: Paths) -> dict[str, dict[str, list]]:
    """The files that were fetched: asset → path under the base directory → [bytes, SHA-256]; and KEPT for a user's own."""
    return read_json(paths.assets, {str: {str: [object]}}) or {}


def note_fetched(paths: Paths, asset: Asset, files: dict[str, list]) -> None:
    """Record an asset as complete, with its files; this is the last step of fetching it."""
    write_json(paths.assets, read_fetched(paths) | {asset.name: files})
