"""Which checkpoint, which tasks, how many answers, and models of the transformers library."""

import csv
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.evaluate import chat
from nanochat.evaluate.chat import chat_accuracies
from nanochat.evaluate.core import load_bundle
from nanochat.evaluate.scope import scope_of
from nanochat.evaluate.scores import Score, as_results, write_csv
from nanochat.evaluate.scoring import logits_at
from nanochat.evaluate.transformers_model import load_transformers, slug
from nanochat.inference.engine import Token
from nanochat.options.evaluate import ChatTaskOptions, EvaluateBaseOptions, EvaluateChatOptions
from nanochat.options.report import ReportOptions
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat.platform.paths import Paths, steps_in
from nanochat.report.build import build_report
from nanochat.report.sections import read_section
from tests.conftest import TINY_EVALUATE_BASE, TINY_EVALUATE_CHAT, assert_fails_with, nanochat


def table(path) -> dict[str, tuple[str, str]]:
    """The lines of a CSV file by their first column."""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["task", "value", "centred"]
    return {name: (value, centred) for name, value, centred in rows}


def test_scores_are_centred_and_written_as_a_table(tmp_path):
    scores = [Score("easy, with a comma", 0.5, 0.25), Score("hard", 0.1, 0.0)]
    results = as_results(scores, "mean")
    assert results == {"easy, with a comma": 0.5, "hard": 0.1, "mean": pytest.approx((1 / 3 + 0.1) / 2)}
    assert "mean" not in as_results(scores, "")
    write_csv(tmp_path / "new" / "scores.csv", scores, {"mean": results["mean"]})
    assert table(tmp_path / "new" / "scores.csv") == {
        "easy, with a comma": ("0.500000", "0.333333"),
        "hard": ("0.100000", "0.100000"),
        "mean": ("0.216667", ""),
    }


class Guess:
    """Numbers to guess; an answer is right if it is the number."""

    name, kind, baseline, files = "Guess", "generative", 0.0, ()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {"messages": [{"role": "user", "content": str(index)}, {"role": "assistant", "content": str(index)}]}

    def judge(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


@pytest.mark.parametrize(("samples", "right"), [(1, 0.25), (2, 0.5), (4, 1.0)])
def test_one_of_several_answers_has_to_be_right(tokenizer, world, cpu, monkeypatch, samples, right):
    class CountsUp:
        """Answers every question with 0, 1, 2, … in turn."""

        positions = 512

        def __init__(self, *_):
            self.tokenizer, self.asked = tokenizer, []

        def answers(self, prompts, max_tokens, rows, samples, seed, temperature, top_k, numbers):
            assert (temperature, top_k, numbers) == (0.7, 9, [0, 1, 2, 3])
            for number in range(len(prompts) * samples):
                yield number, [Token(token, True, 0.0, []) for token in tokenizer.encode(str(number % samples))]

    monkeypatch.setattr(chat, "TASKS", {"guess": lambda paths: Guess()})
    monkeypatch.setattr(chat, "Engine", CountsUp)
    options = ChatTaskOptions(num_samples=samples, temperature=0.7, top_k=9, rows=samples)
    found = chat_accuracies(None, tokenizer, world, cpu, options, ("guess",))
    assert found == {"guess, temperature 0.7" if samples == 1 else f"guess, any of {samples}": right}  # and no ChatCORE


def test_the_random_numbers_of_an_answer_are_those_of_its_question(tokenizer):
    """Whichever questions this process has, and whatever does not fit."""
    given = []

    class Silent:
        positions = 40

        def answers(self, prompts, max_tokens, rows, numbers, **sampling):
            given.append((len(prompts), numbers))
            return ((number, []) for number in range(len(prompts)))

    class Long(Guess):
        def __getitem__(self, index: int) -> dict:
            text = "too long " * 40 if index == 3 else str(index)
            return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]}

    engine = Silent()
    engine.tokenizer = tokenizer
    judged = chat.judged_answers(engine, Long(), [1, 3, 7], ChatTaskOptions())
    assert list(judged) == [[True], [None], [True]] and given == [(2, [1, 7])]


def test_a_step_and_tasks_are_chosen_and_the_scores_are_beside_the_report(trained_base, tmp_path):
    paths = Paths(shutil.copytree(trained_base, tmp_path / "base"))
    first, last = steps_in(paths.checkpoints("sft"))
    arguments = ["evaluate", "chat", *TINY_EVALUATE_CHAT]
    less = "_tasks-ARC-Easy+SpellingBee_max-per-task-4_max-tokens-8"
    for step, options in ((last, []), (first, ["--step", str(first)])):
        done = nanochat(paths.base, *arguments, *options)
        assert done.returncode == 0 and ("the report keeps" in done.stdout) == (step == first), done.stderr
        found = table(paths.report / f"sft-eval_{step:06d}{less}.csv")
        assert found.keys() == {"ARC-Easy", "SpellingBee"}
        if step == last:
            section = paths.section("sft-eval").read_bytes()
            right = read_section(paths, "sft-eval")["results"]["ARC-Easy"]
            assert found["ARC-Easy"] == (f"{right:.6f}", f"{(right - 0.25) / 0.75:.6f}")
    assert_fails_with(
        nanochat(paths.base, *arguments, "--step", "1"), "no checkpoint of step 1 of sft", f"{first}, {last}"
    )
    sampled = nanochat(paths.base, *arguments, "--num-samples", "3")
    assert_fails_with(sampled, "--num-samples 3 at --temperature 0", "give a temperature")
    scores = (paths.report / f"sft-eval_{last:06d}{less}.csv").read_bytes()
    assert nanochat(paths.base, *arguments, "--num-samples", "3", "--temperature", "0.5").returncode == 0
    sampled = table(paths.report / f"sft-eval_{last:06d}{less}_3-answers_temperature-0.5.csv")
    assert sampled.keys() == {"ARC-Easy", "SpellingBee, any of 3"}
    # the report has the newest checkpoint's most likely answers
    assert (paths.report / f"sft-eval_{last:06d}{less}.csv").read_bytes() == scores
    assert paths.section("sft-eval").read_bytes() == section


def test_core_of_a_step_and_of_some_tasks(trained_base, tmp_path):
    paths = Paths(shutil.copytree(trained_base, tmp_path / "base"))
    base = ["evaluate", "base", *"--tokens 512 --batch-size 4 --device cpu".split()]
    assert nanochat(paths.base, *base).returncode == 0
    [newest] = paths.report.glob("base-eval_*_tokens-512.csv")
    assert table(newest).keys() == {
        *(task.label for task in load_bundle(paths.eval_bundle)), "CORE", "val_bpb", "train_bpb", "unigram_bpb",
    }  # fmt: skip
    step = next(iter(steps_in(paths.checkpoints("base"))))
    chosen = nanochat(paths.base, *base, "--core-tasks", "world_choice", "--step", str(step))
    assert chosen.returncode == 0, chosen.stderr
    assert read_section(paths, "base-eval")["results"]["CORE"] and "the report keeps" in chosen.stdout
    found = table(paths.report / f"base-eval_{step:06d}_core-tasks-world_choice_tokens-512.csv")
    assert "world_choice" in found and not {"CORE", "world_schema"} & found.keys()
    assert_fails_with(
        nanochat(paths.base, *base, "--hf-path", "x", "--step", "4"), "--step 4", "--hf-path", "leave one"
    )
    every = [task.label for task in load_bundle(paths.eval_bundle)][::-1]
    assert nanochat(paths.base, *base, "--core-tasks", *every).returncode == 0
    assert "CORE" in table(newest)
    assert_fails_with(
        nanochat(paths.base, *base, "--core-tasks", "nothing"), "unknown task 'nothing' of CORE", "world_choice"
    )


def column(paths: Paths, stage: str) -> dict[str, str]:
    """A stage's cells in the table of results of the report, by the name of the metric; without those that have none."""
    build_report(ReportOptions(), paths)
    text = (paths.report / "report.md").read_text("utf-8").partition("## Results\n")[2].partition("\n## ")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if "|" in line]
    return {row[0]: row[head.index(stage)] for row in rows if row[head.index(stage)] != "–"}


def test_a_smaller_evaluation_does_not_replace_a_larger_one(trained_base, tmp_path):
    """Neither in the report nor in the table; and the mean of a part is no ChatCORE and no CORE."""
    paths = Paths(shutil.copytree(trained_base, tmp_path / "base"))
    [*_, last] = steps_in(paths.checkpoints("sft"))
    chat = ["evaluate", "chat", *"--preset tiny --run-name default --device cpu --max-tokens 4".split()]
    assert nanochat(paths.base, *chat, "--max-per-task", "3").returncode == 0  # there is no other: the report takes it
    assert len(column(paths, "sft")) == 6
    assert nanochat(paths.base, *chat, "--max-tokens", "16", "--max-per-task", "20").returncode == 0
    section, shown = paths.section("sft-eval").read_bytes(), column(paths, "sft")
    assert len(shown) == 7 and "ChatCORE stand-in" in shown
    whole = (paths.report / f"sft-eval_{last:06d}.csv").read_bytes()
    for options, suffix, told in (
        ("--max-per-task 4 --max-tokens 16", "_max-per-task-4", "more than --max-per-task 4"),
        ("--tasks GSM8K --max-tokens 16", "_tasks-GSM8K", "more than --tasks GSM8K"),
        ("--tasks GSM8K MMLU", "_tasks-GSM8K+MMLU_max-tokens-4", "more than --tasks GSM8K MMLU and --max-tokens 4"),
    ):
        done = nanochat(paths.base, *chat, *options.split())
        assert "the report keeps the results that it has" in done.stdout and told in " ".join(done.stdout.split())
        assert "ChatCORE" not in done.stdout
        assert table(paths.report / f"sft-eval_{last:06d}{suffix}.csv").keys() - {"ChatCORE"}
        assert paths.section("sft-eval").read_bytes() == section and column(paths, "sft") == shown
    assert (paths.report / f"sft-eval_{last:06d}.csv").read_bytes() == whole
    os.utime(steps_in(paths.checkpoints("sft"))[last])  # trained again: what the report has is of another model
    assert nanochat(paths.base, *chat, "--max-per-task", "4").returncode == 0
    assert paths.section("sft-eval").read_bytes() != section
    base = ["evaluate", "base", *"--preset tiny --run-name default --device cpu".split()]
    assert nanochat(paths.base, *base).returncode == 0
    section = paths.section("base-eval").read_bytes()
    for options in (["--core-max-per-task", "4"], ["--core-tasks", "world_choice"], ["--tokens", "512"]):
        done = nanochat(paths.base, *base, *options)
        assert f"more than {' '.join(options)}" in " ".join(done.stdout.split()), done.stdout + done.stderr
        assert ("CORE" in done.stdout) == ("--tokens" in options) and paths.section("base-eval").read_bytes() == section
    [whole] = [path for path in paths.report.glob("base-eval_*.csv") if "-" not in path.stem.partition("_")[2]]
    assert "CORE" in table(whole)
    larger = nanochat(paths.base, *base, "--core-max-per-task", "-1")
    assert larger.returncode == 0 and paths.section("base-eval").read_bytes() != section


def test_a_damaged_section_is_no_larger_evaluation(tmp_path):
    paths, options = Paths(tmp_path), EvaluateChatOptions()
    for settings in ({}, {"tasks": 5, "task_options": 3}, {"tasks": [None], "task_options": {"max_per_task": "x"}}):
        write_json(paths.section("sft-eval"), {"settings": settings})
        assert scope_of(options, "evaluate chat", paths, chat.TASKS).kept == ""
    many = EvaluateBaseOptions(core_tasks=tuple(f"task_{number}" for number in range(22)))
    suffix = scope_of(many, "evaluate base", paths, [*many.core_tasks, "another"]).suffix
    assert suffix == "_core-tasks-22-of-them"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, world):
    """The directory of a tiny GPT-2, with a tokenizer of bytes."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("gpt2")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Tilda lives in Dunmere."] * 4, vocab_size=300, special_tokens=["<|endoftext|>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=96, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_a_model_of_the_transformers_library_is_scored_by_its_own_logits(gpt2, cpu):
    model, tokenizer = load_transformers(str(gpt2), cpu)
    assert (
        model.positions == 96
        and tokenizer.bos == 0
        and tokenizer.encode("Tilda") == tokenizer.encode("Tilda lives")[:1]
    )
    sequences = [[0, *tokenizer.encode("Tilda lives in")], [0, *range(10, 80)], [0, *range(1, 120)]]
    spans = [(1, 3), (5, 71), (100, 120)]
    for tokens, (start, end), logits in zip(sequences, spans, logits_at(model, sequences, spans), strict=True):
        kept = tokens[-96:]
        gone = len(tokens) - len(kept)
        whole = model.model(torch.tensor([kept])).logits[0]
        torch.testing.assert_close(logits, whole[start - 1 - gone : end - 1 - gone], rtol=1e-4, atol=1e-5)


def test_a_model_of_the_transformers_library_is_evaluated_beside_the_run(gpt2, trained_base, tmp_path):
    paths = Paths(shutil.copytree(trained_base, tmp_path / "base"))
    own = ["evaluate", "base", *TINY_EVALUATE_BASE]
    assert nanochat(paths.base, *own).returncode == 0
    before = paths.section("base-eval").read_bytes()
    result = nanochat(paths.base, *own, "--hf-path", str(gpt2))
    assert result.returncode == 0, result.stderr
    assert paths.section("base-eval").read_bytes() == before
    results = read_section(paths, "hf-eval")["results"]
    found = table(paths.report / f"hf-eval_{slug(str(gpt2))}_core-max-per-task-4_tokens-512.csv")
    assert found["world_choice"][0] == f"{results['world_choice']:.6f}" and "val_bpb" not in results
    build_report(ReportOptions(), paths)
    assert "| base | mid | sft | hf |" in (paths.report / "report.md").read_text("utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_fails_with(
        nanochat(paths.base, *own, "--hf-path", str(empty)), f"--hf-path {empty}: transformers cannot load it"
    )


def settings_of(directory, change) -> None:
    """Change the content of config.json."""
    content = json.loads((directory / "config.json").read_text())
    change(content)
    (directory / "config.json").write_text(json.dumps(content))


def without_a_weight(directory) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def without_a_tokenizer(directory) -> None:
    for path in directory.glob("*token*"):
        path.unlink()


def with_weights_in_pickles(directory) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def cut_off(directory) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


DAMAGES = {
    "a missing weight": (without_a_weight, "lacks 1 of the model's weights, such as transformer.h.1.mlp.c_fc.weight"),
    "no tokenizer": (without_a_tokenizer, "turns a text into no tokens"),
    "pickled weights": (with_weights_in_pickles, "transformers cannot load it"),
    "a cut file": (cut_off, "transformers cannot load it"),
    "other sizes": (lambda d: settings_of(d, lambda c: c.update(n_embd=64)), "transformers cannot load it"),
    "a package that is missing": (
        lambda d: settings_of(d, lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        "transformers cannot load it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_of_the_transformers_library_is_no_score(gpt2, cpu, tmp_path, damage):
    change, message = DAMAGES[damage]
    directory = shutil.copytree(gpt2, tmp_path / "other")
    change(directory)
    with pytest.raises(UserError, match=message):
        load_transformers(str(directory), cpu)


def test_no_code_that_comes_with_a_model_runs_even_if_somebody_says_yes(gpt2, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    directory, trace = shutil.copytree(gpt2, tmp_path / "other"), tmp_path / "ran"
    (directory / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings_of(directory, lambda c: c.update(auto_map=names, model_type="own", architectures=["OwnModel"]))
    with pytest.raises(UserError, match="transformers cannot load it"):
        load_transformers(str(directory), cpu)
    assert not trace.exists()


def test_a_tokenizer_without_a_first_token_is_rejected(gpt2, cpu, tmp_path):
    directory = shutil.copytree(gpt2, tmp_path / "other")
    for path in directory.glob("*token*.json"):
        settings = json.loads(path.read_text())
        settings.pop("eos_token", None)
        path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="neither a token that begins a text nor one that ends it"):
        load_transformers(str(directory), cpu)


def test_each_model_has_a_table_of_its_own(tmp_path, monkeypatch):
    assert slug("gpt2") == "gpt2" and slug("openai community/gpt2") == "openai-community--gpt2"
    assert slug("a_b/c") != slug("a/b_c")
    directories = [tmp_path / folder / "out" / "hf" for folder in "ab"]
    for directory in directories:
        directory.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    first, second = (slug(str(directory)) for directory in directories)
    assert first != second and first == slug("a/out/hf") == slug("a/../a/out/hf/")
    assert first.startswith("out--hf--")
