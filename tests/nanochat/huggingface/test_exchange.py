"""What is exported is the same model in the transformers library, to the token and to float32's rounding, and comes back as it was."""

import errno
import json
import shutil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.checkpoint import load_model
from nanochat.data.shards import Shards
from nanochat.gpt import GPTConfig
from nanochat.huggingface.exchange import export_model, import_model, write_model
from nanochat.huggingface.tokenizer import byte_characters, tokenizer_from, tokenizer_json
from nanochat.inference.engine import Engine
from nanochat.options.exchange import ExportOptions, ImportOptions
from nanochat.platform.errors import UserError
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.report.sections import read_section
from nanochat.tokenizer.bpe import SPECIALS
from nanochat.tokenizer.chat_format import render, render_prompt
from tests.conftest import TINY_EVALUATE_BASE, TINY_SFT, assert_fails_with, nanochat
from tests.nanochat.models import perturbed

transformers = pytest.importorskip("transformers")

CONVERSATIONS = (
    [{"role": "user", "content": "Where does Tilda live?"}, {"role": "assistant", "content": "In Dunmere."}],
    [{"role": "system", "content": " Be short.\n"}, {"role": "user", "content": "\n17 + 4 = ?  "},
     {"role": "assistant", "content": "21"},
     {"role": "user", "content": "é\u3000漢字 😀"},
     {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "How many 'o' are in 'bloodool'?"},
     {"role": "assistant", "content": [{"type": "text", "text": "Check: \n"}, {"type": "python", "text": "'bloodool'.count('o')"},
                                       {"type": "python_output", "text": "4"}, {"type": "text", "text": "\n\n#### 4"}]}],
)  # fmt: skip


@pytest.fixture(scope="module", params=[4, 1], ids=["heads", "shared heads"])
def exported(request, tokenizer, tmp_path_factory):
    """A model whose every weight counts, its tokenizer, and the directory that they were written to."""
    model = perturbed(GPTConfig(3, 64, 4, request.param, tokenizer.vocab_size, 48))
    directory = tmp_path_factory.mktemp("exported")
    write_model(directory, model, tokenizer)
    return model, tokenizer, directory


@pytest.fixture(scope="module")
def theirs(exported):
    """The tokenizer as transformers loads it."""
    return transformers.AutoTokenizer.from_pretrained(exported[2])


def test_transformers_loads_every_weight_and_gives_the_same_logits(exported):
    model, _, directory = exported
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(loaded).__name__ == "NanoChatForCausalLM" and loaded.dtype == torch.float32
    assert not any(info.values()), info
    assert sum(p.numel() for p in loaded.parameters()) == model.config.num_parameters
    tokens = torch.randint(model.config.vocab_size, (3, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, found = model(tokens), loaded(tokens).logits
    assert ours.std() > 0.1
    assert loaded.config.rms_norm_eps == torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, ours, rtol=5e-6, atol=5e-6)


def test_greedy_answers_are_the_same(exported):
    model, tokenizer, directory = exported
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
    special = [tokenizer.special(name) for name in ("assistant_end", "bos")]
    assert loaded.generation_config.eos_token_id == special
    prompt = render_prompt(tokenizer, {"messages": CONVERSATIONS[0]})
    [answer] = Engine(model, tokenizer).generate([prompt], 20, temperature=0.0)
    found = loaded.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    forced = {tokenizer.special("python_end")}  # after which the engine calls the calculator
    assert not forced & {*answer} and found[: len(answer)] == answer and len(answer) > 3


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("  two  spaces\t\n\n\r\n end ")
@example("it's WE'LL 12345 x=1;;;\u00a0\u3000\u2028\x85 日本語 école naïve 😀👩‍👩‍👧")
@example("a" * 70 + "aba" * 30 + " " * 40)
def test_texts_have_the_same_tokens(exported, theirs, text):
    _, tokenizer, _ = exported
    if any(name in text for name in SPECIALS):
        return
    ids = tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [tokenizer.bos, *ids]
    assert theirs.decode(ids) == text


def test_a_whole_shard_has_the_same_tokens(exported, theirs, world):
    _, tokenizer, _ = exported
    texts = [text for _, text in zip(range(500), Shards.of(world, "val").documents(), strict=False)]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "parts"])
def test_the_chat_template_renders_conversations_as_training_does(exported, theirs, messages):
    _, tokenizer, _ = exported
    ids, _ = render(tokenizer, {"messages": messages})
    options = {"tokenize": True, "return_dict": False}
    assert theirs.apply_chat_template(messages, **options) == ids
    prompt = render_prompt(tokenizer, {"messages": messages})
    assert theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **options) == prompt
    with pytest.raises(Exception, match="take turns, got user"):
        theirs.apply_chat_template([messages[-2], messages[-2]], **options)


def test_the_chat_template_joins_parts_of_text_and_rejects_what_is_no_text(theirs):
    def rendered(*contents) -> str:
        roles = ("system", "user", "assistant")[-len(contents) :] if len(contents) > 1 else ("user",)
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return theirs.apply_chat_template(messages, tokenize=False)

    def text(*texts) -> list[dict]:
        return [{"type": "text", "text": text} for text in texts]

    assert rendered(text("Be ", "short."), text("\n2 + ", "2?"), text("4")) == rendered("Be short.", "\n2 + 2?", "4")
    image, call = {"type": "image_url", "image_url": {"url": "x"}}, {"type": "python", "text": "2+2"}
    for content in (None, 5, {"type": "text", "text": "2"}, [*text("2"), image], [call], ["2"], [{"type": "text"}]):
        for contents in ((content,), (content, "2?", "4")):
            with pytest.raises(Exception, match="content must be text|unknown part of a message of (user|system)"):
                rendered(*contents)
        if content != [call]:
            with pytest.raises(Exception, match="content must be text|unknown part of a message of assistant"):
                rendered("Be short.", "2?", content)
    with pytest.raises(Exception, match="there must be one message or more"):
        theirs.apply_chat_template([[]], tokenize=False)  # of a batch


def test_special_tokens_have_their_ids_and_roles(exported, theirs):
    _, tokenizer, _ = exported
    assert theirs.convert_tokens_to_ids([*SPECIALS]) == [tokenizer.special(name[2:-2]) for name in SPECIALS]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (SPECIALS[0], SPECIALS[4], SPECIALS[4])
    assert theirs.decode(tokenizer.special("user_end"), skip_special_tokens=True) == ""
    assert len(theirs) == tokenizer.vocab_size


def test_the_tokenizer_comes_back_and_so_do_all_bytes(tokenizer):
    assert tokenizer_from(json.loads(json.dumps(tokenizer_json(tokenizer))), "x").hash == tokenizer.hash
    assert len({*byte_characters()}) == 256 and all(character.isprintable() for character in byte_characters())


def test_a_run_is_exported_imported_evaluated_and_trained_on(trained_base, tmp_path, cpu):
    paths = Paths(shutil.copytree(trained_base, tmp_path / "base"))
    for stage in ("base", "mid"):
        result = nanochat(
            paths.base, "export", "--run-name", "default", "--stage", stage, "--output", str(tmp_path / f"hf-{stage}")
        )
        assert result.returncode == 0 and str(tmp_path / f"hf-{stage}") in result.stdout, result.stderr
        result = nanochat(paths.base, "import", str(tmp_path / f"hf-{stage}"), "--stage", stage, "--run-name", "copy")
        assert result.returncode == 0, result.stderr
        model, tokenizer, _ = load_model(paths, stage, cpu)
        again, tokenizer_again, meta = load_model(paths.of_run("copy"), stage, cpu)
        assert tokenizer.hash == tokenizer_again.hash and meta["step"] == 0
        for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name
    # repeated: what it wrote itself is replaced, and nothing else
    assert nanochat(paths.base, "export", "--run-name", "default", "--output", str(tmp_path / "hf-mid")).returncode == 0
    (tmp_path / "hf-mid" / "notes.txt").write_text("mine")
    again = nanochat(paths.base, "export", "--run-name", "default", "--output", str(tmp_path / "hf-mid"))
    assert_fails_with(again, "notes.txt", "give another --output")
    again = nanochat(paths.base, "import", str(tmp_path / "hf-base"), "--stage", "base", "--run-name", "copy")
    assert_fails_with(again, "has checkpoints already", "--run-name NAME")
    # transformers' model of the base has the same scores as ours
    own = ["evaluate", "base", *TINY_EVALUATE_BASE]
    assert nanochat(paths.base, *own).returncode == 0
    assert nanochat(paths.base, *own, "--hf-path", str(tmp_path / "hf-base")).returncode == 0
    ours, found = (read_section(paths, f"{name}-eval")["results"] for name in ("base", "hf"))
    assert found and found == {name: ours[name] for name in found}
    # the stage after an imported one can be trained, and the imported one itself not
    shutil.copytree(paths.embedded, paths.of_run("copy").embedded)
    assert nanochat(paths.base, "train", "sft", *TINY_SFT, "--run-name", "copy").returncode == 0
    first, second = (load_model(paths.of_run(name), "sft", cpu)[0] for name in ("default", "copy"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    resumed = nanochat(paths.base, *"train mid --run-name copy --total-batch-size 512 --device cpu".split())
    assert_fails_with(resumed, "was imported, so that its training cannot be resumed")


def edited(name: str, edit):
    """Changes the content of a JSON file in a directory."""

    def change(directory):
        content = json.loads((directory / name).read_text())
        edit(content)
        (directory / name).write_text(json.dumps(content))

    return change


def of_weights(edit):
    def change(directory):
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors")

    return change


LM_HEAD = "lm_head.weight"
MISTAKES = {
    "another architecture": (edited("config.json", lambda c: c.update(model_type="llama")), "architecture 'llama', wanted 'nanochat'"),
    "another softcap": (edited("config.json", lambda c: c.update(final_logit_softcapping=None)), "final_logit_softcapping None, and"),
    "another rope": (edited("config.json", lambda c: c["rope_parameters"].update(rope_theta=1e6)), "rope_theta 1000000.0, and"),
    "another mlp": (edited("config.json", lambda c: c.update(intermediate_size=100)), "intermediate_size 100, and"),
    "a large eps": (edited("config.json", lambda c: c.update(rms_norm_eps=0.1)), "rms_norm_eps 0.1, wanted 1.19e-07"),
    "a size as text": (edited("config.json", lambda c: c.update(hidden_size="64")), r"\['hidden_size'\]"),
    "other heads": (edited("config.json", lambda c: c.update(num_key_value_heads=3)), "n_kv_head 3 does not divide"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "has no config.json"),
    "another vocabulary": (edited("config.json", lambda c: c.update(vocab_size=7)), "a model of 7 tokens and a tokenizer of 512"),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    "a tokenizer of words": (edited("tokenizer.json", lambda c: c["model"].update(type="WordLevel")), "is WordLevel with the pattern"),
    "a missing byte": (edited("tokenizer.json", lambda c: c["model"]["vocab"].pop("!")), "has ids with gaps"),
    "an odd token": (edited("tokenizer.json", lambda c: c["model"]["vocab"].update({"漢": 3})), "'漢', which is not written in bytes"),
    "mixed merges": (edited("tokenizer.json", lambda c: c["model"]["merges"].reverse()), "merges in another order"),
    "other specials": (edited("tokenizer.json", lambda c: c["added_tokens"].pop()), "has the special tokens <|bos|>"),
    "a tensor less": (of_weights(lambda t: t.pop(LM_HEAD)), "has no lm_head.weight"),
    "a tensor more": (of_weights(lambda t: t.update(more=torch.zeros(1))), "has the unknown tensor more"),
    "another shape": (of_weights(lambda t: t.update({LM_HEAD: torch.zeros(3, 4)})), r"lm_head.weight is .* of shape \(3, 4\)"),
    "integers": (of_weights(lambda t: t.update({LM_HEAD: t[LM_HEAD].int()})), "lm_head.weight is torch.int32"),
    "a cut file": (lambda directory: (directory / "model.safetensors").write_bytes(b"x" * 20), "model.safetensors cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_model_of_ours_is_named_and_leaves_nothing(exported, tmp_path, mistake):
    change, message = MISTAKES[mistake]
    source = shutil.copytree(exported[2], tmp_path / "source")
    change(source)
    with pytest.raises(UserError, match=message):
        import_model(ImportOptions(source=source), Paths(tmp_path / "base"))
    assert not (tmp_path / "base").exists()


def test_nothing_is_imported_or_exported_where_another_command_writes(exported, trained_base, tmp_path):
    paths, output = Paths(trained_base), tmp_path / "new" / "hf"
    source = exported[2]
    target = Paths(tmp_path / "base")
    with locked(target.lock("sft"), "train sft"), pytest.raises(UserError, match="another train sft is running"):
        import_model(ImportOptions(source=source), target)
    with locked(target.lock("tokenizer"), "tokenizer train"), pytest.raises(UserError, match="another tokenizer train"):
        import_model(ImportOptions(source=source), target)
    assert not target.tokenizer.exists() and not target.checkpoints("sft").exists()
    with locked(output.with_name("hf.lock"), "export"), pytest.raises(UserError, match="another export is running"):
        export_model(ExportOptions(output=output), paths)
    export_model(ExportOptions(output=output), paths)
    assert [path.name for path in output.parent.iterdir()] == ["hf"]


def test_weights_in_several_files_and_in_bfloat16_are_read(exported, tmp_path, cpu):
    """As a model from the hub may have them; older files of a tokenizer write merges as texts."""
    model, _, directory = exported
    source = shutil.copytree(directory, tmp_path / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00002.safetensors": sorted(tensors)[:5],
        "model-00002-of-00002.safetensors": sorted(tensors)[5:],
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, source / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    edited("tokenizer.json", lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]]))(
        source
    )
    edited("config.json", lambda c: c.update(rms_norm_eps=1e-6))(source)
    import_model(ImportOptions(source=source, stage="base", step=7), Paths(tmp_path / "base"))
    found, _, meta = load_model(Paths(tmp_path / "base"), "base", cpu)
    assert meta["step"] == 7
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())
    index["weight_map"][LM_HEAD] = "../other.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names the file '../other.safetensors', which is not in"):
        import_model(ImportOptions(source=source, stage="sft"), Paths(tmp_path / "base"))


def test_a_mistyped_run_leaves_nothing(tmp_path):
    paths = Paths(tmp_path, "mistyped")
    with pytest.raises(UserError, match="no checkpoint of sft"):
        export_model(ExportOptions(), paths)
    assert not list(tmp_path.iterdir())


def test_an_import_onto_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    """Of the import. safetensors has an error of its own for it."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("nanochat.checkpoint.save_file", full)
    paths = Paths(tmp_path, "new")
    with pytest.raises(OSError, match="No space left on device: .*model.safetensors") as found:
        import_model(ImportOptions(exported[2]), paths)
    assert found.value.errno == errno.ENOSPC and not paths.runs and not [p for p in tmp_path.rglob("*") if p.is_file()]
    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path, *exported[:2])
