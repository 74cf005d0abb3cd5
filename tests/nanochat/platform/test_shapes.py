"""Files whose JSON, YAML or CSV is valid but of another shape: each reader says in one line where, or leaves them out."""

import copy
import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bench.compare import compare
from bench.report import write_report
from nanochat.checkpoint import read_meta
from nanochat.evaluate.core import load_bundle
from nanochat.gate import run_shape, take_gate
from nanochat.gpt import GPTConfig
from nanochat.platform import lock
from nanochat.platform.errors import UserError
from nanochat.platform.files import read_json, write_json
from nanochat.platform.paths import Paths
from nanochat.platform.shapes import check_shape
from nanochat.speedrun.assets import problems, read_fetched
from nanochat.tokenizer.bpe import Tokenizer
from nanochat_kernels import gate
from tests.bench.test_kernel_bench import result, row

OTHERS = (None, True, -1, 10**30, math.nan, math.inf, "", "x", [], ["x"], [[5]], {}, {"x": 5}, [{}])


def variants(document: object) -> Iterator[object]:
    """The document with other values in place of each of its parts, or without the part."""
    for path in _paths_in(document):
        for other in OTHERS:
            yield _changed(document, path, other)
        if path:
            yield _changed(document, path, None, drop=True)


def _paths_in(document: object, path: tuple = ()) -> Iterator[tuple]:
    yield path
    parts = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, part in list(parts)[:6] + list(parts)[-1:]:
        yield from _paths_in(part, (*path, key))


def _changed(document: object, path: tuple, value: object, drop: bool = False) -> object:
    if not path:
        return value
    changed = copy.deepcopy(document)
    part = changed
    for key in path[:-1]:
        part = part[key]
    if drop:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return changed


def rejected(write: Callable[[object], object], document: object, read: Callable[[], object], name: str) -> int:
    """How many variants of a document are rejected; each by a UserError that names the file, and by no other error."""
    count = 0
    for variant in variants(document):
        write(variant)
        try:
            read()
        except UserError as error:
            count += 1
            assert name in str(error), (variant, error)
    write(document)
    read()
    return count


def test_a_bundle(base):
    bundle = Paths(base).eval_bundle
    listing, meta = bundle / "core.yaml", bundle / "eval_meta_data.csv"

    def write_rows(rows: object) -> None:
        with meta.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([line if isinstance(line, list) else [line] for line in rows] if rows else [])

    rows = list(csv.reader(meta.read_text("utf-8").splitlines()))
    entries = yaml.safe_load(listing.read_text("utf-8"))
    assert (
        rejected(lambda d: listing.write_text(yaml.safe_dump(d)), entries, lambda: load_bundle(bundle), "eval_bundle")
        > 50
    )
    for label, percent in (
        ("world_choice", "nan"),
        ("world_choice", "100"),
        ("world_choice", "-1"),
        ("world_choice", "many"),
    ):
        write_rows([rows[0], [label, percent], *rows[2:]])
        with pytest.raises(UserError, match="eval_meta_data.csv needs the columns 'Eval Task' and 'Random baseline'"):
            load_bundle(bundle)
    for text in ("", "a,b\n1,2\n", "Eval Task,Random baseline\nworld_choice\n", "Eval Task,Random baseline\n\x00\n"):
        meta.write_text(text)
        with pytest.raises(UserError, match="eval_meta_data.csv"):
            load_bundle(bundle)
    meta.write_bytes(b"Eval Task,Random baseline\n\xff,5\n")
    with pytest.raises(UserError, match="eval_meta_data.csv"):
        load_bundle(bundle)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "a: [", "\x00", "[" * 5000, "- a: 1\n b"])
def test_yaml_that_is_not_plain(base, text):
    bundle = Paths(base).eval_bundle
    (bundle / "core.yaml").write_text(text)
    with pytest.raises(UserError, match="core.yaml cannot be read"):
        load_bundle(bundle)


def test_a_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    read = lambda: Tokenizer.load(tmp_path).encode("some 'text'")  # noqa: E731
    assert rejected(lambda d: path.write_text(json.dumps(d)), stored, read, "tokenizer.json is damaged") > 50


def test_a_checkpoint(trained_base, tmp_path):
    newest = max((Paths(trained_base).checkpoints("sft")).glob("step_*"))
    path = shutil.copytree(newest, tmp_path / newest.name)
    meta = json.loads((path / "meta.json").read_bytes())
    read = lambda: GPTConfig(**read_meta(path)["config"])  # noqa: E731
    assert rejected(lambda d: (path / "meta.json").write_text(json.dumps(d)), meta, read, "") > 50


def test_a_gate_file(tmp_path, cpu):
    model = GPTConfig.from_depth(1, 512, 32)
    valid_for, paths = gate.identity(run_shape(model, 4), cpu.device, cpu.compute_dtype), Paths(tmp_path)
    micro_step = {"impl": {}, "ms": {"graph": 1.5}}
    gate.write(paths.gate, valid_for, {"rms_norm": {"impl": "reference"}}, micro_step=micro_step)
    made = json.loads(paths.gate.read_text())
    write = lambda d: paths.gate.write_text(json.dumps(d))  # noqa: E731
    assert rejected(write, made, lambda: take_gate(paths, model, 4, cpu), "gate.json") > 50


def test_a_result_of_the_bench(tmp_path):
    path = result(tmp_path / "a.json", row(ratio_to={"eager": 0.5}))
    write = lambda d: path.write_text(json.dumps(d))  # noqa: E731
    stored = json.loads(path.read_text())
    assert rejected(write, stored, lambda: compare(path, path), "") > 50
    with pytest.raises(UserError, match=r"a.json\['product_tflops'\] is 'fast', wanted a finite number"):
        write(stored | {"product_tflops": "fast"})
        write_report((path,), tmp_path / "out")


def test_what_was_fetched(base):
    paths = Paths(base)
    write = lambda d: paths.assets.write_text(json.dumps(d))  # noqa: E731
    for variant in variants({"words": {"words.txt": [5, "abc"]}}):
        write(variant)
        assert isinstance(read_fetched(paths), dict)
        for _, _, problem in problems("d20", paths):
            assert isinstance(problem, str)


def test_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 0.02)
    holder = {**lock._place(), "process": 1, "started": "0", "job": "", "command": "x", "since": "now"}
    for variant in variants(holder):
        (tmp_path / "a.lock").write_text(json.dumps(variant))
        with lock.locked(tmp_path / "a.lock", "train base"):
            pass


def test_shapes():
    for value in (math.nan, math.inf, True, "1", None):
        with pytest.raises(UserError, match="x is .*, wanted a finite number"):
            check_shape(value, float, "x")
    check_shape({"a": [1, 2.5]}, {str: [float]}, "x")


def test_a_damaged_file_that_may_be_missing_counts_as_missing(tmp_path):
    write_json(tmp_path / "a.json", {"seconds": 1.5})
    assert read_json(tmp_path / "a.json", {"seconds": float}) == {"seconds": 1.5}
    for text in ("[" * 100_000, "{", "[]", '{"seconds": NaN}', '{"seconds": "1"}'):
        (tmp_path / "a.json").write_text(text)
        assert read_json(tmp_path / "a.json", {"seconds": float}) is None
    assert read_json(Path(tmp_path), {}) is None
