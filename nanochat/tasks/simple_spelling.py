"""SimpleSpelling: write a word letter by letter, for training."""

from nanochat.tasks.words import WordTask, spell

SPELL_QUESTIONS = (
    "Spell the word '{word}'.",
    "How do you spell '{word}'?",
    "Which letters make up '{word}'?",
    "Write '{word}' letter by letter.",
)


class SimpleSpelling(WordTask):
    """Spell a word."""

    name = "SimpleSpelling"

    def __getitem__(self, index: int) -> dict:
        rng, word = self.draw(index)
        question = rng.choice(SPELL_QUESTIONS).format(word=word)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": spell(word)}]}
