"""SimpleSpelling: write a word letter by letter, for training."""

from nanochat.tasks.words import WordTask, ask, spell

SPELL_QUESTIONS = (
    "Spell the word: {word}",
    "Spell {word}.",
    "How do you spell {word}?",
    "Which letters make up {word}?",
    "Write {word} letter by letter.",
    "Buchstabiere {word}.",
    "Wie schreibt man {word}?",
    "Épelle le mot {word}.",
    "Comment écrit-on {word}?",
    "Deletrea la palabra {word}.",
    "¿Cómo se escribe {word}?",
)


class SimpleSpelling(WordTask):
    """Spell a word."""

    name = "SimpleSpelling"

    def __getitem__(self, index: int) -> dict:
        rng, word = self.draw(index)
        question = ask(rng, SPELL_QUESTIONS, word=word)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": spell(word)}]}
