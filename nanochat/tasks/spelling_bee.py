"""SpellingBee: count a letter in a word, by spelling the word, counting place by place, and checking with the calculator."""

import random

from nanochat.tasks.gsm8k import final_number
from nanochat.tasks.words import WordTask, ask, spell

COUNT_QUESTIONS = (
    # English
    "How many {letter} are in {word}?",
    "How many {letter}s does {word} have?",
    "How many times does {letter} occur in {word}?",
    "How often do you see {letter} in {word}?",
    "How often is {letter} used to write {word}?",
    "In {word}, how many letters are {letter}?",
    "If I write {word}, how many {letter} do I need?",
    "{word}: how many {letter}?",
    "What is the number of {letter} in {word}?",
    "What do you get when you count {letter} in {word}?",
    "Can you count the letter {letter} in the word {word}?",
    "Could you tell me how many {letter} there are in {word}?",
    "Do you know how often {letter} stands in {word}?",
    "Which number of {letter} does the word {word} contain?",
    "Of the letters of {word}, how many are {letter}?",
    "Count the {letter} in {word}.",
    "Tell me how often the word {word} has the letter {letter}.",
    "Find every {letter} in {word} and say how many there are.",
    "Look at {word} and count each {letter}.",
    "I want to know the number of {letter} in {word}.",
    # German
    "Wie viele {letter} hat {word}?",
    "Wie viele {letter} stehen in {word}?",
    "Wie oft kommt {letter} in {word} vor?",
    "Wie oft steht der Buchstabe {letter} im Wort {word}?",
    "Wie oft brauche ich {letter}, um {word} zu schreiben?",
    "Kannst du die {letter} in {word} zählen?",
    "Zähle den Buchstaben {letter} in {word}.",
    "Sag mir, wie viele {letter} du in {word} findest.",
    # French
    "Combien de {letter} y a-t-il dans {word}?",
    "Combien de {letter} le mot {word} a-t-il?",
    "Combien de fois voit-on {letter} dans {word}?",
    "Combien de fois la lettre {letter} est-elle dans le mot {word}?",
    "Quel est le nombre de {letter} dans {word}?",
    "Peux-tu compter les {letter} de {word}?",
    "Compte les {letter} dans le mot {word}.",
    "Dis-moi combien de {letter} tu trouves dans {word}.",
    # Spanish
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas {letter} tiene la palabra {word}?",
    "¿Cuántas veces aparece {letter} en {word}?",
    "¿Cuántas veces se escribe {letter} en la palabra {word}?",
    "¿Qué número de {letter} contiene {word}?",
    "¿Puedes contar las {letter} de {word}?",
    "Cuenta la letra {letter} en {word}.",
    "Dime cuántas {letter} ves en {word}.",
    # Italian
    "Quante {letter} ci sono in {word}?",
    "Quante {letter} ha la parola {word}?",
    "Quante volte compare {letter} in {word}?",
    "Quante volte si scrive {letter} nella parola {word}?",
    "Puoi contare le {letter} di {word}?",
    "Conta la lettera {letter} in {word}.",
    "Dimmi quante {letter} trovi in {word}.",
)


def asked_and_counted(rng: random.Random, word: str) -> tuple[str, str, str, int]:
    """A question for a letter of a word; the word spelled, and each of its letters with the count up to it; the check; the count."""
    # nine of ten letters are from the word, so that the answer is rarely zero
    letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
    so_far = ",".join(f"{place}{word[:end].count(letter)}" for end, place in enumerate(word, 1))
    worked = f"{spell(word)}\nCounting {letter}: {so_far}\nCheck: "
    return (
        ask(rng, COUNT_QUESTIONS, letter=letter, word=word),
        worked,
        f"'{word}'.count('{letter}')",
        word.count(letter),
    )


class SpellingBee(WordTask):
    """Count a letter in a word; the answer is the number after ####."""

    name, kind, baseline = "SpellingBee", "generative", 0.0

    def __getitem__(self, index: int) -> dict:
        question, worked, check, count = asked_and_counted(*self.draw(index))
        parts = [
            {"type": "text", "text": worked},
            {"type": "python", "text": check},
            {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"\n\n#### {count}"},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def judge(self, conversation: dict, completion: str) -> bool:
        return final_number(completion) == final_number(conversation["messages"][-1]["content"][-1]["text"])
