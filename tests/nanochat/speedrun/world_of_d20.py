"""A d20 asset set whose files have the real numbers of rows and next to no content."""

import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.speedrun.assets import Asset, assets
from nanochat.synthetic.identity import identity_conversations


def parquet(rows: int, columns: tuple[str, ...]) -> bytes:
    buffer = io.BytesIO()
    constant = pa.repeat(pa.scalar("word"), rows)
    pq.write_table(pa.table({column: constant for column in columns}), buffer, row_group_size=1024 * 64)
    return buffer.getvalue()


def bundle(tasks: int) -> bytes:
    """A zip archive of an evaluation bundle."""
    buffer = io.BytesIO()
    listing, baselines = ["icl_tasks:"], ["Eval Task,Random baseline"]
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(tasks):
            listing += [f"- label: task{i}", f"  dataset_uri: task{i}.jsonl", "  num_fewshot: [0]",
                        "  icl_task_type: language_modeling"]  # fmt: skip
            baselines += [f"task{i},0"]
            archive.writestr(f"eval_bundle/eval_data/task{i}.jsonl", '{"context": "a", "continuation": "b"}\n')
        archive.writestr("eval_bundle/core.yaml", "\n".join(listing))
        archive.writestr("eval_bundle/eval_meta_data.csv", "\n".join(baselines))
    return buffer.getvalue()


def content(asset: Asset) -> dict[str, bytes]:
    """File → content, of the hub, the web or under the base directory."""
    if asset.name == "text":
        shard = parquet(1024, asset.columns)
        return dict.fromkeys(asset.files, shard)
    if asset.name == "identity":
        lines = [json.dumps(messages) for messages in identity_conversations(1, asset.rows)]
        return {asset.target: "\n".join(lines).encode()}
    if asset.name == "words":
        return {asset.target: b"word\n" * asset.rows}
    if asset.name == "eval_bundle":
        return {asset.target: bundle(asset.rows)}
    return {asset.files[0].replace("*", "00000-of-00001"): parquet(asset.rows, asset.columns)}


def on_disk(base, shards: int = 0) -> None:
    """As fetch leaves it, without the record."""
    for asset in assets("d20", shards):
        for name, data in content(asset).items():
            if asset.name == "eval_bundle":
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    archive.extractall(base)
                continue
            target = base / asset.target / name.rpartition("/")[2] if asset.files else base / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
