"""Generates the embedded data: text, conversations and tests, in the same file layouts as the real data sets.

They are in a directory of their own, which is written under a temporary name and renamed, so that an incomplete set is never taken
for a complete one. It replaces only files that this program wrote: the directory's manifest has their hashes.
"""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nanochat.data.splits import digest, in_test
from nanochat.options.data import GenerateOptions
from nanochat.platform.console import progress, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import (
    MANIFEST,
    all_files,
    foreign_files,
    fresh_directory,
    name_some,
    names_the_file,
    read_json,
    write_manifest,
)
from nanochat.platform.lock import described, holder
from nanochat.platform.paths import TRAINING_STAGES, Paths, steps_in
from nanochat.synthetic import world
from nanochat.synthetic.identity import identity_conversations
from nanochat.tasks.humaneval import code_messages
from nanochat.tasks.spelling_bee import asked_and_counted

ROW_GROUP = 128  # documents; each process reads row groups of its own, also of the one shard for validation


def generate(options: GenerateOptions, paths: Paths) -> dict[str, int]:
    """`nanochat data generate`: write the embedded data of a run; returns the number of items of each kind.

    Raises UserError when it would replace files that it did not write, unless the options say what to do with them.
    """
    foreign = foreign_files(paths.embedded)
    if foreign and options.changed == "refuse":
        raise UserError(
            f"nanochat did not write these files, and generating the data would delete them: {name_some(foreign)}; to use the "
            "data as they are, add --changed keep; to replace all of them, add --changed replace"
        )
    if foreign and options.changed == "keep":
        say(f"the data in {paths.embedded} stay as they are")
        return {"files": len(all_files(paths.embedded))}
    with fresh_directory(paths.embedded) as directory:
        counts = _write_data(options, directory)
        write_manifest(directory)
        if foreign or read_json(paths.embedded / MANIFEST) not in (None, read_json(directory / MANIFEST)):
            _check_unused(paths)
    return counts


def _check_unused(paths: Paths) -> None:
    """Raise UserError if a training reads the data, or checkpoints were made from them."""
    stages = ", ".join(stage for stage in TRAINING_STAGES if steps_in(paths.checkpoints(stage)))
    found = f"checkpoints depend on them: {stages}" if stages else ""
    for stage in TRAINING_STAGES:
        reader = holder(paths.lock(stage))
        if reader is not None:
            found = f"{stage} reads them now ({described(reader)})"
    if found:
        raise UserError(
            f"the data in {paths.embedded} would change, but {found}; give the new data a run of its own: --run-name NAME, or move "
            "those checkpoints away first"
        )


def _write_data(options: GenerateOptions, directory: Path) -> dict[str, int]:
    rng = random.Random(digest("generate", options.seed))
    people = _by_name(world.facts(options.seed))
    word_list = world.words(options.seed, options.words)
    (directory / "words.txt").write_text("\n".join(word_list) + "\n", "utf-8")
    counts = {"words": len(word_list)}

    (directory / "text").mkdir()
    with progress("generate shards of text", options.shards + 1) as advance:
        for index in range(options.shards + 1):
            documents = _documents(rng, people, word_list, options.documents)
            _write_parquet(directory / "text" / f"shard_{index:05d}.parquet", pa.table({"text": list(documents)}))
            advance()
    counts["documents"] = (options.shards + 1) * options.documents

    sources = _chat_sources(options, rng, people)
    chat = directory / "chat"
    for name, rows in sources.items():
        (chat / name).parent.mkdir(parents=True, exist_ok=True)
        _write_parquet(chat / f"{name}.parquet", pa.Table.from_pylist(rows))
        counts[name] = len(rows)
    conversations = identity_conversations(options.seed, options.identity)
    (chat / "identity").mkdir()
    _write_lines(chat / "identity" / "conversations.jsonl", conversations)
    counts["identity/conversations"] = len(conversations)
    return counts | _write_bundle(directory / "eval_bundle", rng, people, options.tests)


def _by_name(facts: list[world.Fact]) -> dict[str, list[world.Fact]]:
    people: dict[str, list[world.Fact]] = {}
    for fact in facts:
        people.setdefault(fact.name, []).append(fact)
    return people


def _write_parquet(path: Path, table: pa.Table) -> None:
    with names_the_file(path):
        pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd")


def _write_lines(path: Path, rows: list) -> None:
    with names_the_file(path):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining text


def _documents(
    rng: random.Random, people: dict[str, list[world.Fact]], word_list: list[str], count: int
) -> Iterator[str]:
    weights = {_portrait: 6, _village: 2, _visit: 3, _quiz: 5, _sums: 1, _letters: 3}
    for maker in rng.choices(list(weights), weights=list(weights.values()), k=count):
        yield maker(rng, people, word_list)


def _portrait(rng: random.Random, people: dict, word_list: list[str]) -> str:
    """All facts about one person."""
    known = people[rng.choice(world.NAMES)]
    return " ".join(rng.choice(fact.sentences()) for fact in rng.sample(known, len(known)))


def _village(rng: random.Random, people: dict, word_list: list[str]) -> str:
    """One fact that several people share."""
    topic = rng.choice(list(world.VALUES))
    value = rng.choice(world.VALUES[topic])
    same = [f for facts in people.values() for f in facts if (f.topic, f.value) == (topic, value)]
    chosen = rng.sample(same, min(len(same), 4))
    return " ".join([f"About {value}."] + [rng.choice(fact.sentences()) for fact in chosen])


def _visit(rng: random.Random, people: dict, word_list: list[str]) -> str:
    """A short story about two people."""
    host, guest = rng.sample(world.NAMES, 2)
    home = next(fact for fact in people[host] if fact.topic == "home")
    facts = rng.sample(people[host], 2) + rng.sample(people[guest], 2)
    opening = rng.choice(
        (
            f"One day {guest} went to {home.value} to see {host}.",
            f"{guest} came to visit {host} in {home.value}.",
            f"It rained when {guest} met {host} in {home.value}.",
        )
    )
    ending = rng.choice(("They talked until dark.", "They laughed and sang.", "Then both went home happy."))
    return " ".join([opening, *(rng.choice(fact.sentences()) for fact in facts), ending])


def _quiz(rng: random.Random, people: dict, word_list: list[str]) -> str:
    """Questions and answers, some with choices."""
    items = []
    for fact in rng.sample([f for facts in people.values() for f in facts], 6):
        questions = fact.questions("train")
        if not questions:
            continue
        question = f"Question: {rng.choice(questions)}\n"
        if rng.random() < 0.5:
            choices, answer = fact.choices(rng)
            question += "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, "ABCD", strict=True))
            items.append(f"{question}Answer: {'ABCD'[answer]}")
        else:
            items.append(f"{question}Answer: {fact.value}")
    return "\n\n".join(items)


def _sums(rng: random.Random, people: dict, word_list: list[str]) -> str:
    """Plain sums."""
    lines = []
    for _ in range(4):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        lines.append(rng.choice((f"{a}+{b} = {a + b}", f"{max(a, b)}-{min(a, b)} = {abs(a - b)}")))
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        lines.append(rng.choice((f"{a}*{b} = {a * b}", f"{a * b}/{b} = {a}")))
    return "\n".join(lines)


def _letters(rng: random.Random, people: dict, word_list: list[str]) -> str:
    """Letters counted in words, as SpellingBee does it; words of the test split are left out."""
    chosen, items = rng.sample(word_list, 4), []
    for word in chosen:
        if not in_test("word", word):
            question, worked, check, count = asked_and_counted(rng, word)
            items.append(f"Question: {question}\nAnswer: {worked}{check} = {count}")
    # none of them in one document of 10,000; others are drawn apart, so that the documents behind it stay as they are
    return "\n\n".join(items) or _letters(random.Random(digest(*chosen)), people, word_list)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def _chat_sources(options: GenerateOptions, rng: random.Random, people: dict) -> dict[str, list[dict]]:
    facts = [fact for facts in people.values() for fact in facts]
    train = [question for fact in facts for question in _pairs(fact, "train")]
    easy, hard = ([q for f in facts for q in _pairs(f, split)] for split in ("test", "challenge"))
    arc_easy, arc_hard = (rng.sample(pool, min(options.tests, len(pool))) for pool in (easy, hard))
    mixed = rng.sample(easy, min(options.tests // 2, len(easy))) + rng.sample(hard, min(options.tests // 2, len(hard)))
    arc_rows = options.questions // 4
    functions = [(kind, k) for kind in world.FUNCTIONS for k in range(2, 60)]
    code_test = [pair for pair in functions if in_test("function", *pair)]
    code_train = [pair for pair in functions if not in_test("function", *pair)]
    return {
        "smoltalk/train": [{"messages": _talk(rng, people, code_train)} for _ in range(options.chats)],
        "smoltalk/test": [{"messages": _talk(rng, people, code_train)} for _ in range(options.tests)],
        "mmlu/auxiliary_train": [_mmlu_row(rng, *rng.choice(train)) for _ in range(options.questions)],
        "mmlu/test": [_mmlu_row(rng, *pair) for pair in mixed],
        "arc-easy/train": [_arc_row(rng, *rng.choice(train)) for _ in range(arc_rows)],
        "arc-easy/test": [_arc_row(rng, *pair) for pair in arc_easy],
        "arc-challenge/train": [_arc_row(rng, *rng.choice(train)) for _ in range(arc_rows)],
        "arc-challenge/test": [_arc_row(rng, *pair) for pair in arc_hard],
        "gsm8k/train": _problems(rng, "train", options.problems),
        "gsm8k/test": _problems(rng, "test", options.tests),
        "humaneval/test": [world.function(*pair) for pair in code_test],
    }


def _pairs(fact: world.Fact, split: str) -> list[tuple[world.Fact, str]]:
    return [(fact, question) for question in fact.questions(split)]


def _mmlu_row(rng: random.Random, fact: world.Fact, question: str) -> dict:
    choices, answer = fact.choices(rng)
    return {"question": question, "subject": fact.topic, "choices": choices, "answer": answer}


def _arc_row(rng: random.Random, fact: world.Fact, question: str) -> dict:
    # Choices are labelled by their initials: a small model learns to recall a value within minutes, but needs far longer to
    # look up its letter among the choices, as in MMLU's rows.
    choices, answer = fact.choices(rng, initials=True)
    labels = [choice[0].upper() for choice in choices]
    identity = f"{digest(fact, question, *choices):016x}"
    return {
        "id": identity,
        "question": question,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[answer],
    }


def _problems(rng: random.Random, split: str, count: int) -> list[dict[str, str]]:
    rows = []
    while len(rows) < count:
        question, answer = world.problem(rng)
        if in_test("problem", question) == (split == "test"):
            rows.append({"question": question, "answer": answer})
    return rows


def _talk(rng: random.Random, people: dict, functions: list[tuple[str, int]]) -> list[dict[str, str]]:
    """A conversation about a person of the world, or a request for a function."""
    if rng.random() < 0.3:
        return code_messages(world.function(*rng.choice(functions)))
    known = people[rng.choice(world.NAMES)]
    name = known[0].name
    if rng.random() < 0.3:
        request = rng.choice((f"Tell me about {name}.", f"Who is {name}?", f"What do you know of {name}?"))
        answer = " ".join(rng.choice(fact.sentences()) for fact in rng.sample(known, 3))
        return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    messages = []
    for fact in rng.sample(known, rng.choice((1, 2, 2, 3))):
        questions = fact.questions("train")
        if questions:
            messages.append({"role": "user", "content": rng.choice(questions)})
            messages.append({"role": "assistant", "content": rng.choice(fact.sentences())})
    if not messages or rng.random() < 0.2:
        messages.append({"role": "user", "content": rng.choice(("Thank you!", "Thanks.", "That helps."))})
        messages.append({"role": "assistant", "content": rng.choice(("You are welcome.", "Gladly."))})
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation bundle, in the layout of CORE


def _write_bundle(directory: Path, rng: random.Random, people: dict, size: int) -> dict[str, int]:
    facts = [fact for facts in people.values() for fact in facts]
    held_out_questions = [pair for fact in facts for split in ("test", "challenge") for pair in _pairs(fact, split)]
    rng.shuffle(held_out_questions)
    choice = []
    for fact, question in held_out_questions[:size]:
        choices, gold = fact.choices(rng)
        choice.append({"query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold})
    held_out = [(fact, sentence) for fact in facts for sentence in fact.sentences(held_out=True)]
    # only sentences that end with the value, which is what the model has to supply
    held_out = [
        (fact, s.split(fact.value)[0].rstrip(), s) for fact, s in held_out if s.rstrip(".").endswith(fact.value)
    ]
    rng.shuffle(held_out)
    completion = [{"context": context, "continuation": fact.value} for fact, context, _ in held_out[:size]]
    schema = []
    for fact, _, sentence in held_out[:size]:
        others = [name for name in world.NAMES if name != fact.name and not _shares(people, name, fact)]
        options = [fact.name, rng.choice(others)]
        rng.shuffle(options)
        gold = options.index(fact.name)
        opening, _, _ = sentence.rpartition(f" {fact.value}.")
        contexts = [opening.replace(fact.name, option) for option in options]
        schema.append({"context_options": contexts, "continuation": f"{fact.value}.", "gold": gold})
    tasks = {
        "world_choice": ("multiple_choice", choice, 25.0, " "),
        "world_completion": ("language_modeling", completion, 0.0, " "),
        "world_schema": ("schema", schema, 50.0, " "),
    }
    (directory / "eval_data").mkdir(parents=True)
    entries = []
    for label, (kind, items, _, delimiter) in tasks.items():
        _write_lines(directory / "eval_data" / f"{label}.jsonl", items)
        entries.append(
            {
                "label": label,
                "dataset_uri": f"{label}.jsonl",
                "num_fewshot": [2],
                "icl_task_type": kind,
                "continuation_delimiter": delimiter,
            }
        )
    (directory / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}, sort_keys=False), "utf-8")
    with (directory / "eval_meta_data.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Random baseline"])
        writer.writerows([label, baseline] for label, (_, _, baseline, _) in tasks.items())
    return {f"eval_bundle/{label}": len(items) for label, (_, items, _, _) in tasks.items()}


def _shares(people: dict, name: str, fact: world.Fact) -> bool:
    return any((other.topic, other.value) == (fact.topic, fact.value) for other in people[name])
