"""`nanochat chat`: a chat in the terminal, or the answer to one prompt."""

from collections.abc import Iterable, Iterator

from nanochat.checkpoint import load_model
from nanochat.inference.engine import Engine
from nanochat.inference.session import Event, Forgotten, Session, ToolCall, ToolResult
from nanochat.options.chat import ChatOptions
from nanochat.platform.console import console, say
from nanochat.platform.distributed import start_runtime
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths


def chat(options: ChatOptions, paths: Paths) -> None:
    """Chat with the newest model of a stage until the user leaves, or answer the prompt of --prompt."""
    with start_runtime(options.device) as runtime:
        model, tokenizer, _ = load_model(paths, options.source, runtime, options.impl)
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    session = Session(Engine(model, tokenizer), options.max_tokens, **sampling)
    if options.prompt:
        print_answer(session, options.prompt)
        return
    say(f"nanochat ({options.source}); `clear` starts a new conversation, `quit` leaves")
    while True:
        try:
            text = console.input("[bold]you:[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if text.lower() in ("quit", "exit"):
            return
        if text.lower() == "clear":
            session.clear()
            say("(a new conversation)")
        elif text:
            try:
                print_answer(session, text)
            except UserError as error:  # the question alone is too long for the model
                say(str(error))


def print_answer(session: Session, text: str) -> None:
    """Print the answer to a message while it is generated."""
    console.print("[bold]nanochat:[/bold] ", end="")
    for piece in shown(session.ask(text)):
        console.print(piece, end="", markup=False)
    say("")


def shown(events: Iterable[Event]) -> Iterator[str]:
    """The text to print for each event; a calculator call and its result become [expression → result]."""
    call = None  # an expression that is not shown yet, because its result may follow
    for event in events:
        if isinstance(event, ToolResult):
            yield f" [{call} → {event.text}] " if call is not None else f" [→ {event.text}] "
            call = None
            continue
        if call is not None:
            yield f" [{call}] "
            call = None
        if isinstance(event, ToolCall):
            call = event.text
        elif isinstance(event, Forgotten):
            yield f"(the {event.turns} oldest turns of this conversation no longer fit and are forgotten)\n"
        else:
            yield event.text
    if call is not None:
        yield f" [{call}] "
