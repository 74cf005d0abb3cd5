"""The closed world of the embedded data: people with their facts, word problems, words to spell. One seed determines all of it.

What the tests ask is held out of training data by construction. Each wording of a fact is withheld for one fact in five
(`Fact.held_out`). All questions about one fact in four are withheld (`Fact.challenge`). Word problems and words belong to train
or test by the hash of their text (`in_test`).
"""

import random
from dataclasses import dataclass

from nanochat.data.splits import digest, in_test

NAMES = (
    "Tilda Bram Mora Jonas Petra Ansel Wanda Corin Lena Otis Freya Hugo Nadia Silas Greta Milo Edith Rufus Clara Boris "
    "Selma Tobin Agnes Pavel Rosa Linus Hedda Orson Ingrid Felix Marta Dorian Paula Kasper Olga Emil Vera Anton Judith "
    "Leon Hilda Magnus"
).split()
VALUES = {
    "home": "Oakford Millbrook Stonewell Fernhill Harbury Larkmoor Winterby Dunmere Ashgrove Seaholm".split(),
    "work": "baker carpenter teacher sailor tailor gardener blacksmith doctor painter miller".split(),
    "pet": "goat parrot rabbit turtle donkey ferret pigeon hedgehog kitten puppy".split(),
    "food": "soup porridge cheese pancakes dumplings cherries walnuts noodles carrots honey".split(),
    "colour": "red blue green yellow purple brown white black".split(),
    "music": "violin flute drum harp trumpet banjo cello piano".split(),
}
# {n} is the name, {v} the value. Each wording is withheld for one fact in five.
SENTENCES = {
    "home": (
        "{n} lives in {v}.",
        "The home of {n} is in {v}.",
        "You find the house of {n} in {v}.",
        "{n} has a house in {v}.",
        "Every evening {n} walks home to {v}.",
    ),
    "work": (
        "{n} works as a {v}.",
        "{n} is a {v} by trade.",
        "The work of {n} is that of a {v}.",
        "People know {n} as a good {v}.",
        "Long ago {n} became a {v}.",
    ),
    "pet": (
        "{n} keeps a {v}.",
        "The pet of {n} is a {v}.",
        "{n} looks after a {v}.",
        "At home {n} has a {v}.",
        "Each morning {n} feeds the {v}.",
    ),
    "food": (
        "{n} likes to eat {v}.",
        "The best meal for {n} is {v}.",
        "{n} always asks for {v}.",
        "For supper {n} cooks {v}.",
        "Nothing pleases {n} more than {v}.",
    ),
    "colour": (
        "{n} wears a {v} coat.",
        "The coat of {n} is {v}.",
        "{n} painted the door {v}.",
        "The colour {n} loves is {v}.",
        "{n} bought a {v} hat.",
    ),
    "music": (
        "{n} plays the {v}.",
        "{n} makes music on the {v}.",
        "The instrument of {n} is the {v}.",
        "On Sundays {n} takes out the {v}.",
        "{n} learned the {v} as a child.",
    ),
}
QUESTIONS = {
    "home": (
        "Where does {n} live?",
        "In which village is the home of {n}?",
        "What is the village of {n}?",
        "Which place does {n} call home?",
    ),
    "work": (
        "What is the work of {n}?",
        "What does {n} do for a living?",
        "Which trade has {n}?",
        "What job does {n} have?",
    ),
    "pet": (
        "Which pet does {n} keep?",
        "What animal does {n} have?",
        "What is the pet of {n}?",
        "Which animal does {n} feed?",
    ),
    "food": (
        "What does {n} like to eat?",
        "What is the best meal for {n}?",
        "Which food does {n} ask for?",
        "What does {n} cook for supper?",
    ),
    "colour": (
        "What colour is the coat of {n}?",
        "Which colour does {n} love?",
        "What colour does {n} wear?",
        "Which colour has the hat of {n}?",
    ),
    "music": (
        "Which instrument does {n} play?",
        "What does {n} play on Sundays?",
        "What is the instrument of {n}?",
        "On what does {n} make music?",
    ),
}


@dataclass(frozen=True)
class Fact:
    """A value of one topic for one person: Tilda, home, Dunmere."""

    name: str
    topic: str
    value: str

    @property
    def challenge(self) -> bool:
        """Whether training data have no question about this fact; the pretraining text still tells it."""
        return in_test("challenge", self.name, self.topic, share=4)

    def held_out(self, template: str) -> bool:
        """Whether training data never use this wording for this fact."""
        return in_test("template", self.name, self.topic, template, share=5)

    def say(self, template: str) -> str:
        return template.format(n=self.name, v=self.value)

    def sentences(self, held_out: bool = False) -> list[str]:
        """The sentences that training data may use for this fact, or those that are held out."""
        return [self.say(t) for t in SENTENCES[self.topic] if self.held_out(t) == held_out]

    def questions(self, split: str) -> list[str]:
        """The questions of a split: train, test (the wording is held out) or challenge (the fact is never asked in training)."""
        if self.challenge != (split == "challenge"):
            return []
        wanted = {"train": (False,), "test": (True,), "challenge": (False, True)}[split]
        return [self.say(t) for t in QUESTIONS[self.topic] if self.held_out(t) in wanted]

    def choices(self, rng: random.Random, initials: bool = False) -> tuple[list[str], int]:
        """Four values and the index of the right one; with `initials`, all begin with different letters."""
        options = [self.value]
        for value in rng.sample(VALUES[self.topic], len(VALUES[self.topic])):
            used = {option[0] for option in options} if initials else set(options)
            if len(options) < 4 and (value[0] if initials else value) not in used:
                options.append(value)
        rng.shuffle(options)
        return options, options.index(self.value)


def facts(seed: int) -> list[Fact]:
    """The facts of the world: for each person, one value for each topic."""
    rng = random.Random(digest("facts", seed))
    return [Fact(name, topic, rng.choice(values)) for name in NAMES for topic, values in VALUES.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Words to spell

ONSETS = "b bl br c cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sl sm sn sp st t tr v w z".split()
VOWELS = "a e i o u ai ea ee oa oo ou".split()
CODAS = "b ck d g l ll m n nd ng nt p r rn rt s sh st t tt x".split()


def words(seed: int, count: int) -> list[str]:
    """`count` different invented words of one to three syllables, sorted."""
    rng, invented = random.Random(digest("words", seed)), set()
    while len(invented) < count:
        syllables = rng.choices((1, 2, 3), weights=(1, 4, 2))[0]
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
        if 4 <= len(word) <= 11:
            invented.add(word)
    return sorted(invented)


# ---------------------------------------------------------------------------------------------------------------------
# Word problems, in the notation of GSM8K: <<expression=result>>result, the answer after ####

THINGS = "apples nuts pears shells stones candles buttons eggs plums coins".split()


def problem(rng: random.Random) -> tuple[str, str]:
    """A word problem of one or two steps, and its worked answer."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(3, 49), rng.randint(2, 9), rng.randint(3, 12)
    kind = rng.randrange(6)
    if kind == 0:
        b = rng.randint(3, 49)
        question = f"{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have?"
        steps = [(f"{a}+{b}", a + b)]
    elif kind == 1:
        a = a + 40
        b = rng.randint(3, 40)
        question = f"{name} has {a} {thing} and loses {b}. How many {thing} are left?"
        steps = [(f"{a}-{b}", a - b)]
    elif kind == 2:
        question = f"{name} fills {b} bags with {c} {thing} each. How many {thing} is that?"
        steps = [(f"{b}*{c}", b * c)]
    elif kind == 3:
        question = f"{name} shares {b * c} {thing} among {b} friends. How many {thing} does each friend get?"
        steps = [(f"{b * c}/{b}", c)]
    elif kind == 4:
        question = f"{name} has {a} {thing} and buys {b} bags with {c} {thing} each. How many {thing} are there now?"
        steps = [(f"{b}*{c}", b * c), (f"{a}+{b * c}", a + b * c)]
    else:
        question = f"{name} has {b} boxes with {c} {thing} each and gives {b} {thing} to {other}. How many are left?"
        steps = [(f"{b}*{c}", b * c), (f"{b * c}-{b}", b * c - b)]
    lines = [f"{expression} = <<{expression}={result}>>{result}" for expression, result in steps]
    return question, "\n".join([*lines, f"#### {steps[-1][1]}"])


# ---------------------------------------------------------------------------------------------------------------------
# Small functions, in the notation of HumanEval

FUNCTIONS = {
    "add": ("Return x plus {k}.", "x + {k}", lambda x, k: x + k),
    "take": ("Return x minus {k}.", "x - {k}", lambda x, k: x - k),
    "times": ("Return x times {k}.", "x * {k}", lambda x, k: x * k),
    "least": ("Return x, but at least {k}.", "max(x, {k})", lambda x, k: max(x, k)),
    "most": ("Return x, but at most {k}.", "min(x, {k})", lambda x, k: min(x, k)),
}


def function(kind: str, k: int) -> dict[str, str]:
    """A row in HumanEval's layout: signature with docstring, solution, and a check of the solution."""
    text, body, compute = FUNCTIONS[kind]
    name = f"{kind}_{k}"
    checks = "\n".join(f"    assert candidate({x}) == {compute(x, k)}" for x in (0, 3, k, 100))
    return {
        "task_id": f"World/{name}",
        "prompt": f'def {name}(x):\n    """{text.format(k=k)}"""\n',
        "canonical_solution": f"    return {body.format(k=k)}\n",
        "test": f"def check(candidate):\n{checks}\n",
        "entry_point": name,
    }
