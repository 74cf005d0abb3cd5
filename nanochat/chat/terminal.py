"""`nanochat chat`: a chat in the terminal, or the answer to one prompt."""

import contextlib
import sys
from collections.abc import Iterator

from nanochat.checkpoint import load_model
from nanochat.inference.engine import Engine
from nanochat.inference.session import Session, shown
from nanochat.options.chat import NO_PROMPT, ChatOptions
from nanochat.platform.console import console, say
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths

HELP = (
    "/clear starts a new conversation, Ctrl-C ends an answer, the arrow keys recall questions, /quit or Ctrl-D leaves"
)


def chat(options: ChatOptions, paths: Paths) -> None:
    """Chat with the newest model of a stage until the user leaves, or answer the prompt of --prompt."""
    with start_runtime(options.device) as runtime:
        model, tokenizer, _ = load_model(paths, options.source, runtime, options.impl)
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    session = Session(Engine(model, tokenizer, frozen=True), options.max_tokens, **sampling)
    if options.prompt != NO_PROMPT:
        if not options.prompt.strip():
            raise UserError("the prompt is empty; give a text, or leave --prompt out to chat")
        if not print_answer(session, options.prompt):
            raise KeyboardInterrupt  # the command ends as any other that is interrupted
        return
    say(f"nanochat ({options.source} of the run {paths.run_name}); /help names the commands, /quit leaves")
    for text in questions(paths):
        command = text.lower().removeprefix("/")
        if command in ("quit", "exit"):
            return
        if command == "clear":
            session.clear()
            say("(a new conversation)")
        elif text.lower() == "/help":
            say(HELP)
        elif text.startswith("/"):
            say(f"there is no command {text}; {HELP}")
        elif text:
            try:
                print_answer(session, text)
            except UserError as error:  # the question alone is too long for the model
                say(str(error))


def questions(paths: Paths) -> Iterator[str]:
    """What the user types, until the end of the input. In a terminal lines can be edited, recalled, and pasted with line ends."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        while (line := sys.stdin.readline()) != "":
            console.print("[bold]you:[/bold] ", end="")
            yield line.strip()
        say("")
        return
    from prompt_toolkit import PromptSession, formatted_text, history  # slow to import

    class History(history.FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk ends no chat
                super().store_string(string)

    prompts = PromptSession(history=History(paths.chat_history))
    while True:
        try:
            yield prompts.prompt(formatted_text.HTML("<b>you:</b> ")).strip()
        except KeyboardInterrupt:  # drops the line that is typed
            continue
        except EOFError:
            return


def print_answer(session: Session, text: str) -> bool:
    """Print the answer to a message while it is generated; return whether it came to its end.

    An interrupt (Ctrl-C) ends the answer, not the chat.
    """
    whole = True
    answer = session.ask(text)
    pieces, name = shown(answer), "[bold]nanochat:[/bold] "
    try:
        for piece in pieces:
            console.print(name, end="")  # only now: a message that is too long has no answer
            console.print(piece, end="", markup=False)
            name = ""
    except KeyboardInterrupt:
        console.print(name, end="")
        whole = False
        with contextlib.suppress(KeyboardInterrupt):
            answer.throw(
                KeyboardInterrupt
            )  # unless it was raised in there: what has been said stays in the conversation
        console.print(" (stopped)", end="")
    say("")
    return whole
