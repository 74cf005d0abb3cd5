"""The short conversation that ends a speedrun."""

from nanochat.chat.terminal import print_answer
from nanochat.checkpoint import load_model
from nanochat.inference.engine import Engine
from nanochat.inference.session import Session
from nanochat.platform.console import say
from nanochat.platform.distributed import start_runtime
from nanochat.platform.paths import Paths

PROMPTS = {
    "cpu": (
        "Hello! Who are you?",
        "Where does Tilda live?",
        "Clara has 17 shells and buys 4 bags with 6 shells each. How many shells are there now?",
        "How many 'o' are in 'bloodool'?",
    ),
}
DEFAULT_PROMPTS = ("Hello! Who are you?", "Why is the sky blue?", "How many 'r' are in 'strawberry'?")


def show_conversation(paths: Paths, preset: str, device: str) -> None:
    """Print the model's answers to a few prompts, each in a conversation of its own, and the command to chat on."""
    with start_runtime(device) as runtime:
        model, tokenizer, _ = load_model(paths, "sft", runtime)
    session = Session(Engine(model, tokenizer), max_tokens=128, temperature=0.0)
    for prompt in PROMPTS.get(preset, DEFAULT_PROMPTS):
        say(f"you: {prompt}")
        print_answer(session, prompt)
        session.clear()
    say(f"\nThe report is {paths.report / 'report.html'}. Chat on with: nanochat chat{paths.as_option}")
