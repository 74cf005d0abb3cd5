"""Shards, the token stream, mixtures and batches."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.batches import prefetched
from nanochat.data.conversations import Limited, Mixture, packed_batches, padded_batches
from nanochat.data.conversations import measured_batches as conversation_batches
from nanochat.data.positions import conversation_position, text_position
from nanochat.data.pretraining import TokenStream, measured_batches
from nanochat.data.shards import Shards
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.synthetic.generate import ROW_GROUP
from nanochat.tasks import MMLU, Identity, SmolTalk, SpellingBee
from nanochat.tokenizer.chat_format import render
from tests.conftest import TINY_BASE, TINY_DATA, assert_fails_with, nanochat


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def tokens_of(shards, tokenizer, row_groups):
    return [t for g in row_groups for text in shards.read(g) for t in [tokenizer.bos, *tokenizer.encode(text)]]


def test_a_rank_reads_every_token_once_in_order(world, tokenizer, pool):
    shards = Shards.of(world, "train")
    for rank, size in ((0, 1), (1, 2)):
        expected = tokens_of(shards, tokenizer, range(rank, len(shards.row_groups), size))
        stream = TokenStream(shards, tokenizer, rank, size, pool)
        batches = list(islice(stream.batches(3, 16), len(expected) // 48))
        got = torch.cat([batch.inputs.flatten() for batch in batches])
        assert got.tolist() == expected[: len(got)]
        for batch in batches[:5]:
            assert torch.equal(batch.inputs.flatten()[1:], batch.targets.flatten()[:-1])


def test_ranks_share_the_row_groups_and_one_epoch_follows_another(world, tokenizer, pool):
    shards = Shards.of(world, "val")
    count = len(shards.row_groups)
    assert count == -(-TINY_DATA.documents // ROW_GROUP) and count % 2
    starts = [next(TokenStream(shards, tokenizer, r, 2, pool).documents((0, -1, 0, 0)))[0] for r in (0, 1)]
    assert starts == [(0, 0, 0, 0), (0, 1, 0, 0)]
    seen = []
    for (epoch, group, document, _), _ in TokenStream(shards, tokenizer, 0, 2, pool).documents((0, -1, 0, 0)):
        if document == 0:
            seen.append((epoch, group))
        if len(seen) == count // 2 + 3:
            break
    assert seen == [*((0, group) for group in range(0, count, 2)), (1, 0), (1, 2)]


@given(after=st.integers(0, 120), rows=st.integers(1, 4), length=st.integers(1, 40))
def test_a_stream_resumes_at_any_batch(world, tokenizer, pool, after, rows, length):
    stream = TokenStream(Shards.of(world, "train"), tokenizer, 0, 1, pool)
    batches = list(islice(stream.batches(rows, length), after + 3))
    resumed = list(islice(stream.batches(rows, length, batches[after].position), 2))
    for a, b in zip(batches[after + 1 :], resumed, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.position == b.position


def test_another_number_of_ranks_resumes_after_all_that_was_read():
    saved = [(0, 4, 17, 3), (0, 7, 2, 0), (0, 5, 0, 0)]
    assert text_position(saved, 1, 3, 100) == (0, 7, 2, 0)
    for size in (1, 2, 4):
        starts = [text_position(saved, rank, size, 100) for rank in range(size)]
        assert all(group > 7 and group % size == rank for rank, (_, group, _, _) in enumerate(starts))
    assert text_position(saved, 1, 2, 9) == (1, 1, 0, 0)


def test_more_processes_than_row_groups_are_rejected(world, tokenizer, pool):
    shards = Shards.of(world, "val")
    count = len(shards.row_groups)
    with pytest.raises(UserError, match=f"{count} row groups cannot feed {count + 1} processes"):
        TokenStream(shards, tokenizer, 0, count + 1, pool)


def test_prefetching_gives_the_same_batches_and_raises_their_errors():
    with prefetched(iter([1, 2, 3])) as items:
        assert list(items) == [1, 2, 3]

    def broken():
        yield 1
        raise UserError("broken")

    with prefetched(broken()) as items, pytest.raises(UserError, match="broken"):
        list(items)
    with prefetched(iter(int, 1)) as items:  # endless: leaving ends the thread
        assert next(items) == 0


# --- bad shards ---


def test_an_empty_corpus_is_rejected(tmp_path):
    assert_fails_with(nanochat(tmp_path, "tokenizer", "train"), "0 parquet shards", "nanochat data generate")


def damage(base, how):
    files = sorted((Paths(base).data / "text").glob("*.parquet"))
    if how == "missing":
        files[0].unlink()
        shutil.copy(files[1], files[1].with_name("shard_00002.parquet"))
    elif how == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:-100])
    elif how == "text":
        files[1].write_text("no parquet at all")
    elif how == "column":
        pq.write_table(pa.table({"other": ["a"]}), files[1])
    elif how == "type":
        pq.write_table(pa.table({"text": [1, 2]}), files[1])
    elif how == "rows":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), files[1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "shard_00000.parquet is missing"),
        ("truncated", "shard_00001.parquet is truncated or no parquet file"),
        ("text", "shard_00001.parquet is truncated or no parquet file"),
        ("column", "has no column 'text' (it has other)"),
        ("type", "the column 'text' is int64, wanted texts"),
        ("rows", "has no rows"),
    ],
)
def test_bad_shards_are_rejected_before_training(base, how, message):
    damage(base, how)
    result = nanochat(base, "train", "base", "--depth", "1", "--num-iterations", "1", "--total-batch-size", "65536")
    assert_fails_with(result, message)
    assert not (Paths(base).run / "checkpoints").exists()


@pytest.mark.parametrize("text", [None, ""])
@pytest.mark.parametrize(("split", "commands"), [
    ("train", (("train", "base", *TINY_BASE), ("tokenizer", "train", "--vocab-size", "512"), ("tokenizer", "eval"))),
    ("val", (("train", "base", *TINY_BASE), ("tokenizer", "eval"))),
])  # fmt: skip
def test_shards_without_text_end_with_a_line_that_names_them(base, text, split, commands):
    chosen = Shards.of(Paths(base), split).files
    for shard in chosen:
        pq.write_table(pa.table({"text": pa.array([text] * 8, pa.string())}), shard, row_group_size=4)
    for words in commands:
        result = nanochat(base, *words)
        parts = f"{chosen[0]}", f"all texts of {2 * len(chosen)} row groups are null or empty", "generate them again"
        assert_fails_with(result, *parts)


@pytest.mark.parametrize("world_size", [1, 2])
def test_row_groups_without_text_among_others_are_passed_over(tmp_path, tokenizer, pool, world_size):
    """A rank whose row groups all have none cannot go on; another one can."""
    for number in (0, 1):
        column = pa.array([None, "", "a b", None, "", None, "c", ""], pa.string())
        path = tmp_path / f"text/shard_{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": column}), path, row_group_size=2)
    shards = Shards.of(Paths(tmp_path), "train")
    assert list(shards.documents()) == ["a b", "c"]
    starts = [
        [
            position
            for position, _ in islice(
                TokenStream(shards, tokenizer, rank, world_size, pool).documents((0, -1, 0, 0)), 3
            )
        ]
        for rank in range(1, world_size)
    ]
    assert starts == [[(0, 1, 0, 0), (0, 3, 0, 0), (1, 1, 0, 0)]] * (world_size - 1)
    first = TokenStream(shards, tokenizer, 0, world_size, pool).documents((0, -1, 0, 0))
    if world_size == 1:
        assert [position for position, _ in islice(first, 3)] == [(0, 1, 0, 0), (0, 3, 0, 0), (1, 1, 0, 0)]
    else:
        with pytest.raises(UserError, match="shard_00000.parquet: all texts of 2 row groups"):
            next(first)


def test_a_text_that_is_no_utf_8_is_named(tmp_path):
    column = pa.array([b"a", None, b"b", b"", b"c", b"\xff"], pa.binary()).view(pa.string())
    for number in (0, 1):
        path = tmp_path / f"text/shard_{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": column}), path, row_group_size=2)
    shards = Shards.of(Paths(tmp_path), "train")
    assert shards.read(1) == ["b"]
    with pytest.raises(UserError, match="shard_00000.parquet has a text that is no UTF-8, at row 6 .*0xff"):
        list(shards.documents())


# --- conversations ---


@pytest.fixture(scope="module")
def mixture(world):
    tasks = [
        SmolTalk(world),
        Limited(MMLU(world, "auxiliary_train"), 30),
        SpellingBee(world, "train", 20),
        Identity(world),
    ]
    return Mixture(tasks)


def test_mixtures_hold_every_row_in_a_fixed_order(mixture, world):
    assert mixture.sizes() == {"SmolTalk": 120, "MMLU": 30, "SpellingBee": 20, "Identity": 20}
    assert sorted(mixture._order) == [(t, i) for t, n in enumerate((120, 30, 20, 20)) for i in range(n)]
    again = Mixture(mixture.tasks)
    assert [mixture[i] for i in range(190)] == [again[i] for i in range(190)]
    twice = Mixture([Identity(world)] * 2)
    assert twice.sizes() == {"Identity": 40}


@given(after=st.integers(0, 20), rows=st.integers(1, 3), rank=st.integers(0, 1))
def test_packed_batches_hold_each_token_once_and_resume(mixture, tokenizer, after, rows, rank):
    batches = list(packed_batches(mixture, tokenizer, rows, 64, rank, 2))
    expected = [t for i in range(rank, len(mixture), 2) for t in render(tokenizer, mixture[i], 64)[0]]
    got = torch.cat([b.inputs.flatten() for b in batches]).tolist()
    assert got == expected[: len(got)] and len(expected) - len(got) <= rows * 64
    assert all(a.progress <= b.progress for a, b in zip(batches, batches[1:], strict=False))
    resumed = list(packed_batches(mixture, tokenizer, rows, 64, rank, 2, batches[after].position))
    assert len(resumed) == len(batches) - after - 1
    for a, b in zip(batches[after + 1 :], resumed, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.position == b.position


def test_padded_batches_learn_only_what_the_assistant_says(mixture, tokenizer):
    batches = list(padded_batches(mixture, tokenizer, 4, 96, 1, 2))
    assert len(batches) == len(mixture) // 8
    batch = batches[3]
    for row in range(4):
        ids, mask = render(tokenizer, mixture[3 * 8 + row * 2 + 1], 97)
        said = [i for i, m in zip(ids[1:], mask[1:], strict=True) if m]
        targets = batch.targets[row]
        assert targets[targets != -1].tolist() == said
        where = targets != -1
        assert batch.inputs[row][: len(ids) - 1].tolist() == ids[:-1]
        assert where.sum() == len(said)
    resumed = list(padded_batches(mixture, tokenizer, 4, 96, 1, 2, batches[5].position))
    assert torch.equal(resumed[0].inputs, batches[6].inputs) and len(resumed) == len(batches) - 6


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_what_is_measured_does_not_depend_on_the_number_of_ranks(world, mixture, tokenizer, pool, world_size):
    def texts(many, rows):
        return rows_of(
            measured_batches(Shards.of(world, "val"), tokenizer, rank, many, pool, rows, 16, 175)
            for rank in range(many)
        )

    def conversations(many, rows):
        return rows_of(conversation_batches(mixture, tokenizer, rows, 32, rank, many) for rank in range(many))

    def rows_of(ranks):
        """What all ranks learn from, without padding."""
        rows = [row for batches in ranks for batch in batches for row in zip(batch.inputs, batch.targets, strict=True)]
        return sorted((inputs[targets >= 0].tolist(), targets[targets >= 0].tolist()) for inputs, targets in rows)

    assert texts(world_size, 2) == texts(1, 3) and len(texts(1, 3)) == 10
    assert conversations(world_size, 2) == conversations(1, 3) and len(conversations(1, 3)) == len(mixture)


def test_conversations_resume_with_another_number_of_ranks():
    assert conversation_position([(5, 3), (6, 0)], 1, 2) == (6, 0)
    assert conversation_position([(5, 3), (6, 0)], 0, 1) == (12, 0)
    assert conversation_position([(5, 0), (5, 2)], 0, 3) == (4, 0)
    assert conversation_position([(6,), (6,)], 0, 1) == (12,)
