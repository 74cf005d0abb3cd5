"""Reinforcement learning: the reward rises, and the run resumes; each chosen token has the gradient of its answer's advantage."""

import json
import random
import shutil
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.checkpoint import CheckpointStore, find_checkpoint, weights_hash
from nanochat.evaluate.answers import Answer, pass_at, sample_answers
from nanochat.gpt import GPTConfig
from nanochat.inference.engine import Engine, Token
from nanochat.optim import MuonAdamW
from nanochat.options.report import ReportOptions
from nanochat.options.train import TrainRlOptions
from nanochat.platform.distributed import Runtime
from nanochat.platform.paths import Paths, steps_in
from nanochat.report.build import build_report
from nanochat.report.sections import read_section
from nanochat.synthetic import world
from nanochat.tasks import GSM8K
from nanochat.tokenizer.chat_format import render_prompt
from nanochat.train.memory import Memory
from nanochat.train.metrics import read_metrics
from nanochat.train.micro_step import MicroStep
from nanochat.train.plan import step_size
from nanochat.train.reinforce import Rollouts, batch_of, pass_rates, reinforce
from nanochat.train.trainer import Trainer
from tests import forked
from tests.conftest import assert_fails_with, command, environment, made_once, nanochat
from tests.nanochat.models import perturbed

# a model that has read eight word problems often enough to solve a fifth of what it is asked, with the calculator
BASE = (
    "--depth 1 --context-length 128 --num-iterations 30 --device-batch-size 8 --total-batch-size 1024 --eval-every -1 "
    "--core-metric-every -1 --sample-every -1 --save-every 0 --device cpu"
).split()
MID = (
    "--device-batch-size 8 --total-batch-size 1024 --smoltalk 0 --mmlu 0 --simple-spelling 0 --spelling-bee 0 "
    "--identity-repeats 0 --eval-every -1 --save-every 0 --device cpu"
).split()
RL = (
    "--source mid --gsm8k 160 --examples-per-step 8 --num-samples 8 --max-tokens 48 --device-batch-size 24 --sample-rows 40 "
    "--init-lr-fraction 0.3 --eval-every 10 --eval-samples 16 --save-every 3"
).split()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ON = {"cpu": ("--device", "cpu"), "cuda": ("--device", "cuda", "--deterministic")}


@pytest.fixture(scope="module")
def midtrained(tmp_path_factory, world_base):
    """The base directory of that model; copy it before writing to it."""

    def make(base) -> None:
        shutil.copytree(world_base, base)
        rng = random.Random(0)
        problems = [dict(zip(("question", "answer"), world.problem(rng), strict=True)) for _ in range(8)]
        for split, repeats in (("train", 120), ("test", 1)):
            path = Paths(base).chat_data / "gsm8k" / f"{split}.parquet"
            pq.write_table(pa.Table.from_pylist(problems * repeats), path)
        for stage, arguments in (("base", BASE), ("mid", MID)):
            done = nanochat(base, "train", stage, *arguments)
            assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "midtrained", make)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reinforced(midtrained, tmp_path_factory, device):
    """The same after reinforcement learning; copy it before writing to it."""
    base = shutil.copytree(midtrained, tmp_path_factory.mktemp("reinforced") / "base")
    done = nanochat(base, "train", "rl", *RL, *ON[device])
    assert done.returncode == 0, done.stderr
    return base


def records(base) -> list[dict]:
    """What was logged of each step, without times."""
    names = "step", "loss", "grad_norm", "reward", "answer_tokens", "lr_multiplier"
    return [{name: r[name] for name in names} for r in read_metrics(Paths(base).metrics("rl"), *names)]


def weights(base) -> bytes:
    return ([*steps_in(Paths(base).checkpoints("rl")).values()][-1] / "model.safetensors").read_bytes()


def test_the_reward_rises(reinforced):
    measured = read_metrics(Paths(reinforced).metrics("rl"), "pass@1", "pass@4")
    assert [record["step"] for record in measured] == [0, 10, 20]
    assert measured[-1]["pass@1"] > measured[0]["pass@1"] + 0.12  # two standard errors: 128 answers on each side
    assert all(record["pass@1"] <= record["pass@2"] <= record["pass@4"] for record in measured)
    rewards = [record["reward"] for record in records(reinforced)]
    assert len(rewards) == 20 and sum(rewards[-5:]) > sum(rewards[:5]) + 1
    rates = read_metrics(Paths(reinforced).metrics("rl"), "samples_per_second")
    assert len(rates) == 20 and all(record["samples_per_second"] > 0 for record in rates)


def test_what_was_learned_is_evaluated_reported_and_talked_to(reinforced, tmp_path):
    base = shutil.copytree(reinforced, tmp_path / "base")
    paths = Paths(base)
    evaluated = nanochat(base, *"evaluate chat --stage rl --tasks GSM8K --max-tokens 48 --device cpu".split())
    assert evaluated.returncode == 0, evaluated.stderr
    assert read_section(paths, "rl-eval")["results"]["GSM8K"] > 0.3
    build_report(ReportOptions(), paths)
    report = (paths.report / "report.md").read_text("utf-8")
    assert "| metric | chance | base | mid | sft | rl |" in report and "### Reinforcement learning" in report
    assert "trained by rewards on 160 word problems" in report and "![Reward of rl](reward-rl.svg)" in report
    pass_1 = read_section(paths, "rl")["results"]["pass@1"]
    assert f"| GSM8K stand-in, pass@1 | – | – | – | – | {pass_1:.4f} |" in report
    question = GSM8K(paths, "test")[0]["messages"][0]["content"]
    chat = nanochat(base, "chat", "--source", "rl", "--max-tokens", "48", "--device", "cpu", "-p", question)
    assert chat.returncode == 0 and "nanochat:" in chat.stdout, chat.stderr


def test_a_killed_run_resumes_bit_for_bit(midtrained, reinforced, device, tmp_path):
    base = shutil.copytree(midtrained, tmp_path / "base")
    process = forked.start(*command("train", "rl", *RL, *ON[device])[1:], env=environment(base))
    deadline = time.monotonic() + 120
    while not steps_in(Paths(base).checkpoints("rl")).keys() - {0}:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert max(steps_in(Paths(base).checkpoints("rl"))) < 20
    again = nanochat(base, "train", "rl", *RL, *ON[device])
    assert again.returncode == 0 and "resuming rl at step" in again.stdout, again.stderr
    assert records(base) == records(reinforced) and weights(base) == weights(reinforced)


def test_two_processes_share_the_questions_and_one_goes_on(midtrained, tmp_path):
    base = shutil.copytree(midtrained, tmp_path / "base")
    both = nanochat(base, "train", "rl", *RL, *ON["cpu"], "--gsm8k", "64", processes=2)
    assert both.returncode == 0, both.stderr
    assert len(records(base)) == 8 and any(record["reward"] for record in records(base))
    path = [*steps_in(Paths(base).checkpoints("rl")).values()][-1] / "meta.json"
    meta = json.loads(path.read_text())
    assert meta["positions"] == [[32], [32]]  # four questions of each step for each
    settings = meta["settings"] | {"gsm8k": 80, "questions": 80}
    path.write_text(json.dumps(meta | {"settings": settings}))
    alone = nanochat(
        base, "train", "rl", *RL, *ON["cpu"], "--gsm8k", "80", "--sample-rows", "16"
    )  # as after memory ran out
    assert alone.returncode == 0 and "resuming rl at step 8" in alone.stdout, alone.stderr
    assert len(records(base)) == 10


def test_bad_options(midtrained, tmp_path):
    base = shutil.copytree(midtrained, tmp_path / "base")
    for arguments, parts in (
        (["--gsm8k", "7"], ("7 questions do not fill one step of 8", "--examples-per-step", "--num-epochs")),
        (["--num-samples", "1"], ("--num-samples must be at least 2, got 1",)),
        (["--source", "sft"], ("no checkpoint of sft", "there are: base, mid")),
        (["--temperature", "0"], ("--temperature 0 and --top-k 50 all answers", "are the same", "above 0")),
        (["--top-k", "1"], ("--temperature 1 and --top-k 1 all answers", "above 1")),
    ):
        assert_fails_with(nanochat(base, "train", "rl", *RL, *ON["cpu"], *arguments), *parts)
    result = nanochat(base, "train", "rl", *RL, *ON["cpu"], "--examples-per-step", "7", processes=2)
    assert (
        "a step of 7 questions is not a multiple of the 2 questions that 2 process(es) take at once; the"
        in result.stderr
    )
    path = Paths(base).chat_data / "gsm8k" / "train.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[6]["question"] = "How many? " * 2000
    pq.write_table(pa.Table.from_pylist(rows), path)
    too_long = nanochat(base, "train", "rl", *RL, *ON["cpu"], "--gsm8k", "-1")
    assert_fails_with(too_long, f"{path}, row 7: a prompt of", "the model's 1280 positions", "shorten the question")
    assert not Paths(base).checkpoints("rl").exists()


def test_a_step_of_questions_says_nothing_about_rows(tmp_path, cpu, capsys):
    """Answers are cut into micro-batches of any size, whatever the number of questions."""
    options = TrainRlOptions(preset="cpu", device_batch_size=7, examples_per_step=16)
    store = CheckpointStore(Paths(tmp_path).checkpoints("rl"), replace(cpu, world_size=3))
    assert step_size(options, "rl", 1, store) == (1, 5, 15)
    assert capsys.readouterr().out == (
        "steps of 15 questions: 3 processes cannot share the 16 of the preset cpu, and this is the nearest number; each takes "
        "5 questions\n"
    )


class Scripted:
    """An engine that says what a script says: for each prompt, by its last token, its answers, of which the last ones come first."""

    positions = 512

    def __init__(self, tokenizer, script: dict[int, list[Answer]]):
        self.tokenizer, self.script, self.calls = tokenizer, script, []

    def answers(self, prompts, max_tokens, rows, samples, seed, **sampling):
        self.calls.append((rows, seed, sampling))
        for number in reversed(range(len(prompts) * samples)):
            answer = self.script[prompts[number // samples][-1]][number % samples]
            yield number, [Token(*found, 0.0, []) for found in zip(answer.tokens, answer.sampled, strict=True)]


def test_answers_come_in_order_whichever_ends_first(tokenizer):
    script = {
        prompt: [Answer([prompt, number, 7][: number + 1], [True, False, True][: number + 1]) for number in range(3)]
        for prompt in (1, 2, 3)
    }
    engine = Scripted(tokenizer, script)
    found = list(sample_answers(engine, [[9, 1], [2], [3]], 3, 6, 20, seed=5, temperature=1.0, top_k=50))
    assert found == list(script.values()) and engine.calls == [(6, 5, {"temperature": 1.0, "top_k": 50})]
    assert list(sample_answers(engine, [], 3, 6, 20, seed=5)) == []


def test_answers_do_not_depend_on_how_many_are_made_at_a_time(tokenizer):
    engine = Engine(perturbed(GPTConfig(1, 32, 1, 1, tokenizer.vocab_size, 64)), tokenizer)
    found = [list(sample_answers(engine, [[9, 1], [2]], 3, rows, 8, seed=5, temperature=1.0)) for rows in (1, 4, 64)]
    assert found[0] == found[1] == found[2] and found[0][0][0] != found[0][0][1]


def test_the_chance_that_one_of_k_answers_is_right():
    assert [pass_at(k, 1, 4) for k in (1, 2, 4)] == pytest.approx([0.25, 0.5, 1.0])
    assert pass_at(3, 0, 8) == 0 and pass_at(1, 8, 8) == 1 and pass_at(2, 3, 4) == 1
    # all pairs of four answers, two of which are right
    assert pass_at(2, 2, 4) == pytest.approx(5 / 6)


def test_the_loss_is_reinforce_over_the_tokens_that_the_model_chose():
    """The gradient of a step against −1/N Σ A·log p, written out; the second answer has forced tokens, the third none at all."""
    model = perturbed(GPTConfig.from_depth(2, 301, 64))
    rows = [
        ([5, 6, 7], Answer([8, 9, 10], [True] * 3), 0.75),
        ([5, 6, 7], Answer([20, 21, 22, 23, 24], [True, True, False, False, True]), -0.25),
        ([11, 12], Answer(), -0.25),
        ([11, 12], Answer([30], [True]), 0.0),
    ]
    logged = 0.0
    for prompt, answer, advantage in rows:
        tokens = torch.tensor([[*prompt, *answer.tokens]])
        log_p = torch.log_softmax(model(tokens), dim=-1)[0]
        for place, (token, chosen) in enumerate(zip(answer.tokens, answer.sampled, strict=True), len(prompt)):
            logged = logged - advantage * log_p[place - 1, token] * chosen
    (logged / 7).backward()  # seven tokens were chosen
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for execution in ("eager", "graph"):
        optimizer = MuonAdamW(model)
        step = MicroStep(model, optimizer, execution, one_length=False)
        micro_batches = [batch_of(rows[:1], ()), batch_of(rows[1:], ())]
        for batch in micro_batches:
            step(batch, int((batch.targets != -1).sum()) / 7)
        optimizer.synchronize()
        assert step.loss.item() == pytest.approx(logged.item() / 7, rel=1e-4)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
        for group in optimizer.groups:
            group.gradients.zero_()


def test_each_process_asks_its_own_questions_and_all_of_them_once(tokenizer, midtrained):
    paths, asked = Paths(midtrained), []
    model = perturbed(GPTConfig.from_depth(1, tokenizer.vocab_size, 64))
    options = TrainRlOptions(gsm8k=8, num_samples=2, device_batch_size=3, max_tokens=2)

    class Noted(GSM8K):
        def __getitem__(self, index: int) -> dict:
            asked.append(index)
            return super().__getitem__(index)

    task = Noted(paths, "train")
    for rank in range(2):
        runtime = Runtime(rank, 2, torch.device("cpu"), torch.float32)
        rollouts = Rollouts(Engine(model, tokenizer), task, options, 2, runtime)
        assert rollouts.micro_batches == 2  # four answers, three at a time
        made = rollouts.batches(0)
        batches = [next(made) for _ in range(4)]
        assert [len(batch.inputs) for batch in batches] == [3, 1, 3, 1]
        assert [batch.position for batch in batches] == [(2,), (2,), (4,), (4,)]
    assert sorted(asked) == list(range(8))


def test_what_the_options_say_is_what_training_does(midtrained, tmp_path, cpu, monkeypatch, capsys):
    """The plan of the stage, and the memory that is predicted for it on a GPU: that of the training and of the answers' cache."""
    started, asked = [], []
    monkeypatch.setattr(Trainer, "run", lambda trainer: started.append(trainer) or {})
    monkeypatch.setattr(Runtime, "memory", int(80e9))
    monkeypatch.setattr("nanochat.train.trainer.predict_run", lambda *_: Memory(2e9, 0, 0, 0, 0))
    monkeypatch.setattr(Engine, "cache_bytes", lambda engine, *arguments: asked.append(arguments) or int(3e9))
    paths = Paths(shutil.copytree(midtrained, tmp_path / "base"))
    options = TrainRlOptions(source="mid", gsm8k=16, sample_rows=40, max_tokens=48, init_lr_fraction=0.3)
    reinforce(options, paths, cpu)
    [trainer], [(rows, tokens)] = started, asked
    task, tokenizer = GSM8K(paths, "train"), trainer.tokenizer
    longest = max(len(render_prompt(tokenizer, task[number])) for number in range(16))
    assert (rows, tokens) == (
        40,
        longest + 48,
    ) and "memory: about 5.0 GB of 80.0 with 8 rows" in capsys.readouterr().out
    assert [trainer.plan.lr_multiplier(progress) for progress in (0, 0.5, 1)] == pytest.approx([0.3, 0.15, 0])
    assert {trainer.plan.momentum(step) for step in (0, 100, 1000)} == {0.95}
    first = weights_hash(find_checkpoint(paths, "mid", cpu)[2])
    assert first and trainer.settings["first_weights"] == first


def test_a_cache_has_keys_and_values_in_whole_pages(tokenizer):
    engine = Engine(perturbed(GPTConfig(2, 32, 2, 1, tokenizer.vocab_size, 64)), tokenizer)
    token = 2 * 2 * 16 * 4  # keys and values of two layers, one head of 16 channels, float32
    assert engine.cache_bytes(3, 65) == 3 * 128 * token and engine.cache_bytes(1000, 64) == engine.rows * 64 * token
    assert engine.cache_bytes(1, 10**6) == 640 * token  # no row is longer than the positions
    list(engine.answers([[5] * 200] * 40, 40, rows=40))
    assert engine.cache_bytes(40, 240) <= engine.cache.keys.nbytes + engine.cache.values.nbytes


def test_answers_are_sampled_as_the_options_say(tokenizer, midtrained, cpu):
    task, started = GSM8K(Paths(midtrained), "train"), tokenizer.special("assistant_start")
    engine = Scripted(tokenizer, {started: [Answer([7], [True])] * 2})
    sampling = {"temperature": 0.7, "top_k": 9}
    for seed in (1, 2):
        options = TrainRlOptions(
            num_samples=2, device_batch_size=2, seed=seed, eval_samples=2, eval_examples=4, **sampling
        )
        batches = Rollouts(engine, task, options, 1, cpu).batches(0)
        next(batches), next(batches)
    assert len({seed for _, seed, _ in engine.calls}) == 4  # of two steps with two seeds
    pass_rates(engine, task, options, cpu)
    assert [given for *_, given in engine.calls] == [*[sampling] * 4, sampling | {"numbers": [0, 1, 2, 3]}]


def test_each_process_measures_its_own_questions(tokenizer, midtrained, cpu, monkeypatch):
    task, started = GSM8K(Paths(midtrained), "train"), tokenizer.special("assistant_start")
    right = tokenizer.encode(task[2]["messages"][1]["content"][-1]["text"])
    engine = Scripted(tokenizer, {started: [Answer(right, [True] * len(right))]})
    options = TrainRlOptions(eval_samples=1, eval_examples=5)
    whole = pass_rates(engine, task, options, cpu)["pass@1"]
    monkeypatch.setattr(Runtime, "sum", lambda runtime, values: values)
    shares = [pass_rates(engine, task, options, replace(cpu, rank=rank, world_size=2))["pass@1"] for rank in range(2)]
    assert whole > 0 and sum(shares) == pytest.approx(whole)


def test_an_answer_is_worth_its_reward_less_the_mean_of_its_question(tokenizer, midtrained, cpu):
    task, started = GSM8K(Paths(midtrained), "train"), tokenizer.special("assistant_start")
    right = tokenizer.encode(task[0]["messages"][1]["content"][-1]["text"])
    answers = [right, tokenizer.encode("#### 999999"), tokenizer.encode("I do not know"), right]
    engine = Scripted(tokenizer, {started: [Answer(tokens, [True] * len(tokens)) for tokens in answers]})
    options = TrainRlOptions(num_samples=4, device_batch_size=4)
    rollouts = Rollouts(engine, task, options, 1, cpu)
    batch = next(rollouts.batches(0))
    for row, (tokens, advantage) in enumerate(zip(answers, (0.5, -0.5, -0.5, 0.5), strict=True)):
        chosen = batch.targets[row] >= 0
        assert batch.targets[row, chosen].tolist() == tokens
        assert batch.loss_weight[row, chosen].tolist() == [advantage] * len(tokens)
        assert batch.inputs[row, chosen].tolist() == [started, *tokens[:-1]]
    found = rollouts.measured()
    assert (
        found["reward"] == 0.5
        and found["answer_tokens"] == sum(map(len, answers)) / 4
        and found["samples_per_second"] > 0
    )
