"""The short conversation that ends a speedrun."""

from nanochat.chat.terminal import ChatConfig, print_answer
from nanochat.checkpoint import load_model
from nanochat.console import say
from nanochat.engine import Engine
from nanochat.paths import Paths
from nanochat.runtime import start_runtime

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
    """A few prompts with the model's answers, and how to chat on."""
    with start_runtime(device) as runtime:
        model, tokenizer, _ = load_model(paths, "sft", runtime)
    engine, config = Engine(model, tokenizer), ChatConfig(temperature=0.0, max_tokens=128)
    for prompt in PROMPTS.get(preset, DEFAULT_PROMPTS):
        say(f"you: {prompt}")
        print_answer(engine, [{"role": "user", "content": prompt}], config)
    say(f"\nThe report is {paths.report / 'report.html'}. Chat on with: nanochat chat")
