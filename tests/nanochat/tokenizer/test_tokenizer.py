import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.shards import Shards
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tokenizer.bpe import LONGEST_SPACE, SPECIALS, Tokenizer, encode_ordinary, pieces_of
from nanochat.tokenizer.chat_format import render, render_prompt
from tests.conftest import TINY_BASE, assert_fails_with, nanochat

any_text = st.text(st.characters(exclude_categories=("Cs",)))
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
                {"type": "text", "text": "4."},
            ],
        },
    ]
}


@given(text=any_text)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("space", [" ", "\t", " \t", "\u3000", "\n", "\r\n", " \n"])
def test_a_long_run_of_white_space_comes_back(tokenizer, space):
    text = f"a b{space * (2_500_000 // len(space))} y z"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids[-4:] == tokenizer.encode(f"{space * 1000} y z")[-4:]


@pytest.mark.parametrize("length", [LONGEST_SPACE - 1, LONGEST_SPACE])
def test_what_can_be_encoded_as_a_whole_is(tokenizer, length):
    text = f"the first{' ' * length}one"
    assert pieces_of(text) == [text]
    assert tokenizer.encode(text) == tokenizer._encoding.encode_to_numpy(text).tolist()
    with pytest.raises(ValueError, match="stack size"):  # and the length is the longest that can be
        tokenizer._encoding.encode_to_numpy(f"the first{' ' * (LONGEST_SPACE + 1)}one")


def test_other_errors_of_an_encoding_are_raised(tokenizer):
    with pytest.raises(ValueError, match="of the encoding"):
        encode_ordinary(BrokenEncoding(), " " * 2_000_000)


class BrokenEncoding:
    def encode_to_numpy(self, text: str, **options):
        raise ValueError("of the encoding")


def test_a_document_of_white_space_among_others_is_read_by_all_stages(base):
    """A tokenizer is trained on it and evaluated, and a model trained."""
    shard = Shards.of(Paths(base), "train").files[0]
    text = pq.read_table(shard).column("text").to_pylist()
    text[0] = f"Tilda lives{' ' * 1_000_000}in Dunmere."
    pq.write_table(pa.table({"text": text}), shard, row_group_size=256)
    for words in (
        ("tokenizer", "train", "--vocab-size", "512", "--doc-cap", "2000000"),
        ("tokenizer", "eval"),
        ("train", "base", *TINY_BASE, "--eval-every", "-1"),
    ):
        done = nanochat(base, *words)
        assert done.returncode == 0, done.stderr


@given(before=any_text, special=st.sampled_from(SPECIALS), after=any_text)
def test_text_never_encodes_to_a_special_token(tokenizer, before, special, after):
    ids = tokenizer.encode(before + special + after)
    assert max(ids) < tokenizer.vocab_size - len(SPECIALS)
    assert tokenizer.decode(ids) == before + special + after


@given(before=any_text, lone=st.characters(categories=("Cs",)), after=any_text)
def test_lone_surrogates_are_refused(tokenizer, before, lone, after):
    with pytest.raises(UserError, match=f"lone surrogate U\\+{ord(lone):04X} at character {len(before)}"):
        tokenizer.encode(before + lone + after)


def test_stored_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode("Tilda lives in Oakford.") == tokenizer.encode("Tilda lives in Oakford.")
    stored = np.load(tmp_path / "token_bytes.npy", allow_pickle=False)
    assert stored.dtype == np.int32 and (stored == tokenizer.token_bytes).all()
    assert (stored[-len(SPECIALS) :] == 0).all() and (stored[: -len(SPECIALS)] > 0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token_bytes.npy", "tokenizer.json"]


def test_specials_come_after_the_merges_in_order(tokenizer):
    first = tokenizer.vocab_size - len(SPECIALS)
    assert [tokenizer.special(name[2:-2]) for name in SPECIALS] == list(range(first, first + 9))


def test_a_damaged_tokenizer_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged"):
        Tokenizer.load(tmp_path)


def test_rendering_masks_what_the_assistant_says(tokenizer):
    ids, mask = render(tokenizer, TALK)
    spoken = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert spoken == "It is <|python_start|>2+2<|python_end|>4.<|assistant_end|>"
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>Be brief.\n\n2+2?<|user_end|><|assistant_start|>It is <|python_start|>2+2<|python_end|>"
        "<|output_start|>4<|output_end|>4.<|assistant_end|>"
    )
    assert render(tokenizer, TALK, 7) == (ids[:7], mask[:7])


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    ids, _ = render(tokenizer, TALK)
    prompt = render_prompt(tokenizer, TALK)
    assert prompt == ids[: len(prompt)] and prompt[-1] == tokenizer.special("assistant_start")
    assert render_prompt(tokenizer, {"messages": TALK["messages"][:-1]}) == prompt


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (None, "wanted {'messages'"),
        ({"messages": []}, "one message or more"),
        ({"messages": [{"role": "user"}]}, "message 0 needs the keys role and content"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "message 0 is from 'assistant', wanted 'user'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "message 1 is from 'user'",
        ),
        ({"messages": [{"role": "system", "content": "a"}]}, "must be followed by a user message"),
        (
            {"messages": [{"role": "system", "content": None}, {"role": "user", "content": "a"}]},
            "message 0 \\(system\\) must be text, got NoneType",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": ["b"]}]},
            "message 1 \\(user\\) must be text, got list",
        ),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("system", "user", "user")]},
            "message 2 is from 'user', wanted 'assistant'",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 0 \\(user\\) must be text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "x", "text": ""}]},
                ]
            },
            "message 1 has a part",
        ),
    ],
)
def test_malformed_conversations_are_refused(tokenizer, conversation, message):
    with pytest.raises(UserError, match=message):
        render(tokenizer, conversation)


def test_vocabulary_too_small_or_too_large_for_the_text():
    with pytest.raises(UserError, match="at least 265"):
        Tokenizer.train(["text"], 264)
    with pytest.raises(UserError, match="gives only"):
        Tokenizer.train(["some text"], 5000)


def test_the_same_command_again_changes_nothing(base):
    before = (Paths(base).run / "tokenizer" / "tokenizer.json").read_bytes()
    result = nanochat(base, "tokenizer", "train", "--vocab-size", "512")
    assert result.returncode == 0, result.stderr
    assert (Paths(base).run / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_under_a_checkpoint_is_not_replaced(base):
    checkpoint = Paths(base).run / "checkpoints" / "base" / "step_000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text("{}")
    before = (Paths(base).run / "tokenizer" / "tokenizer.json").read_bytes()
    assert_fails_with(nanochat(base, "tokenizer", "train", "--vocab-size", "400"), "checkpoints depend on it: base")
    assert (Paths(base).run / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_evaluation_names_encodings_that_are_not_there(base):
    result = nanochat(base, "tokenizer", "eval")
    assert result.returncode == 0, result.stderr
    for kind in ("news", "korean", "code", "latex", "science", "train", "val"):
        assert f"\n{kind} " in f"\n{result.stdout}"
    assert "gpt2: left out" in result.stdout and "cl100k_base: left out" in result.stdout
