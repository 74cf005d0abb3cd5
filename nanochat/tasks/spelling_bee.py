"""SpellingBee: count a letter in a word, by spelling the word and calling the calculator."""

from nanochat.tasks.gsm8k import final_number
from nanochat.tasks.words import WordTask, spell

COUNT_QUESTIONS = (
    "How many '{letter}' are in '{word}'?",
    "How often is the letter '{letter}' in '{word}'?",
    "Count the '{letter}' in the word '{word}'.",
    "In '{word}', how many times do you see '{letter}'?",
    "Tell me the number of '{letter}' in '{word}'.",
)


class SpellingBee(WordTask):
    """Count a letter in a word; the answer is the number after ####."""

    name, kind, baseline = "SpellingBee", "generative", 0.0

    def __getitem__(self, index: int) -> dict:
        rng, word = self.draw(index)
        # nine of ten letters are from the word, so that the answer is rarely zero
        letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
        count = str(word.count(letter))
        parts = [
            {"type": "text", "text": f"The letters are {spell(word)}. "},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"\n\n#### {count}"},
        ]
        question = rng.choice(COUNT_QUESTIONS).format(letter=letter, word=word)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def judge(self, conversation: dict, completion: str) -> bool:
        return final_number(completion) == final_number(conversation["messages"][-1]["content"][-1]["text"])
