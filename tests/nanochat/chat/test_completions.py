"""OpenAI's API, by OpenAI's client."""

import math

import openai
import pytest

from nanochat.chat.completions import Choice
from nanochat.inference.engine import Engine, Token
from tests.nanochat.chat.serving import Says, load, serving, words

SCRIPT = ("It is ", "[2+3]", ". One two three ✓ END four")
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, who are you?"}]


def client_of(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(world):
    with serving(world, frozen=True) as server:
        yield client_of(server)


@pytest.fixture(scope="module")
def scripted(world):
    """A model that calculates, and then says words."""
    with serving(world, Says, *SCRIPT, frozen=True) as server:
        yield client_of(server)


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; there is 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=TALK)


def test_an_answer_and_its_usage(client, world, tokenizer):
    found = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=12, temperature=0)
    [choice] = found.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason in ("length", "stop")
    usage = found.usage
    merged = [tokenizer.bos, tokenizer.special("user_start"), *tokenizer.encode("Be brief.\n\nHello, who are you?")]
    prompt = [*merged, tokenizer.special("user_end"), tokenizer.special("assistant_start")]
    assert usage.prompt_tokens == len(prompt) and usage.total_tokens == len(prompt) + usage.completion_tokens
    [alone] = load(world.tokenizer, Engine)().generate([prompt], 12, temperature=0.0)
    assert usage.completion_tokens == len(alone)


def test_a_stream_has_the_same_answer(client):
    options = {"model": "tiny", "messages": TALK, "max_completion_tokens": 20, "temperature": 1.1, "seed": 7, "n": 3}
    whole = client.chat.completions.create(**options)
    texts, reasons, usages = {0: "", 1: "", 2: ""}, {}, []
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after the end"
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices} and len(set(texts.values())) == 3
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usages[-1] == whole.usage and not any(usages[:-1])


def test_a_seed_repeats_an_answer_and_none_does_not(client):
    def ask(**options):
        found = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=16, temperature=1, **options)
        return found.choices[0].message.content

    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert len({ask() for _ in range(3)}) == 3
    assert ask(seed=5, extra_body={"top_k": 1}) == ask(seed=6, extra_body={"top_k": 1})


def test_log_probabilities(client):
    options = {
        "model": "tiny",
        "messages": TALK,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    [choice] = client.chat.completions.create(**options).choices
    found = choice.logprobs.content
    for entry in found:
        assert entry.logprob == max(likely.logprob for likely in entry.top_logprobs) and len(entry.top_logprobs) == 3
        assert 0 < sum(math.exp(likely.logprob) for likely in entry.top_logprobs) <= 1 + 1e-5
        assert entry.token == entry.top_logprobs[0].token == bytes(entry.bytes).decode("utf-8", "replace")
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += logprobs.content if logprobs else []
    assert streamed == found
    options |= {"logprobs": False, "top_logprobs": None}
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_tokens_of_the_calculator_have_no_log_probabilities_and_are_used(scripted, tokenizer):
    """Which the model did not choose."""
    [choice] = (found := scripted.chat.completions.create(model="tiny", messages=TALK, logprobs=True)).choices
    chosen = words(tokenizer, *SCRIPT)
    assert [entry.bytes for entry in choice.logprobs.content] == [
        list(tokenizer.decode_bytes([token])) for token in chosen
    ]
    result = [tokenizer.special("output_start"), *tokenizer.encode("5"), tokenizer.special("output_end")]
    assert found.usage.completion_tokens == len(chosen) + len(result)


class Uneven(Says):
    """Answers of 3 and of 11 tokens."""

    def answer(self, prompt: str) -> list[int]:
        return words(self.tokenizer, "x") * (3 + 8 * bool(self.left))


@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_the_tokens_of_every_choice(world, stream):
    """However long each is."""
    options = {"model": "tiny", "messages": TALK, "n": 2, "stream": stream}
    if stream:
        options["stream_options"] = {"include_usage": True}
    with serving(world, Uneven) as server:
        found = client_of(server).chat.completions.create(**options)
        usage = [chunk.usage for chunk in found][-1] if stream else found.usage
    assert usage.completion_tokens == 14 and usage.total_tokens == 14 + usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (None, "It is  [2+3 → 5] . One two three ✓ END four", "stop"),
        ("END", "It is  [2+3 → 5] . One two three ✓ ", "stop"),
        (["three ✓", "two t"], "It is  [2+3 → 5] . One ", "stop"),
        (["→ 5"], "It is  [2+3 ", "stop"),
        (["five"], "It is  [2+3 → 5] . One two three ✓ END four", "stop"),
    ],
)
def test_stop(scripted, stream, stop, text, reason):
    found = scripted.chat.completions.create(model="tiny", messages=TALK, stop=stop, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in found]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == text and chunks[-1].finish_reason == reason
    else:
        assert found.choices[0].message.content == text and found.choices[0].finish_reason == reason


def test_text_that_may_be_the_beginning_of_a_stop_is_held_back(tokenizer):
    """And no more of it than that; at the end it comes."""

    def told(*texts: str) -> list[str]:
        choice = Choice(tokenizer, ["abc"])
        tokens = [[Token(token, True, 0.0, []) for token in tokenizer.encode(text)] for text in texts]
        return [choice.add(part, number == len(tokens) - 1)[0] for number, part in enumerate(tokens)]

    assert told("xa", "b", "d", "ab") == ["x", "", "abd", "ab"]
    assert told("ab", "abc", "x")[:2] == ["", "ab"]


def test_what_is_not_supported_is_an_error(client):
    for options, message in (
        ({"top_p": 0.5}, "top_p"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_p": True}, "top_p: Input should be a valid number, got True"),
        ({"presence_penalty": False}, "presence_penalty: Input should be a valid number, got False"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stop": ["a"] * 5}, "stop has 5 strings"),
        ({"stop": ""}, "at least 1 character"),
        ({"n": 17}, "less than or equal to 16"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="tiny", messages=TALK, **options)
    nothing = {
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "store": True,
    }
    nothing |= {
        "parallel_tool_calls": False,
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "top_logprobs": 0,
    }
    found = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=1, **nothing)
    assert found.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        ({"messages": [*TALK, {"role": "assistant", "content": None}]}, "messages.2.content", "valid string, got None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "Field required",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0", "got 'a'"),
        ({"messages": TALK, "stop": ["a", ""]}, "stop.1", "at least 1 character, got ''"),
        ({"messages": TALK, "stop": 5}, "stop", "valid string, got 5"),
        ({"messages": TALK, "stream_options": {"usage": 1}}, "stream_options.usage", "not permitted, got 1"),
        ({"messages": TALK, "str": 1}, "str", "not permitted"),
        ({"messages": "str"}, "messages", "valid array, got 'str'"),
        ({"messages": TALK, "seed": 10**400}, "seed", "less than or equal to"),
        ({"n": 0}, "messages", "Field required"),
    ],
)
def test_a_mistake_is_named_by_its_place_in_the_request(client, body, place, reason):
    with pytest.raises(openai.BadRequestError) as found:
        client.post("/chat/completions", body=body, cast_to=object)
    assert found.value.param == place and found.value.body["message"].startswith(f"{place}: ")
    assert reason in found.value.body["message"]


def test_content_in_parts(client):
    def ask(content):
        talk = [{"role": "user", "content": content}]
        return (
            client.chat.completions.create(model="tiny", messages=talk, max_tokens=8, temperature=0).choices[0].message
        )

    assert ask([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]).content == ask("Hello").content
    with pytest.raises(openai.BadRequestError, match="type"):
        ask([{"type": "image_url", "image_url": {"url": "x"}}])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_is_the_reason_and_not_the_length(scripted, stream):
    """Which ends the row soon after."""
    options = {"model": "tiny", "messages": TALK, "stop": "It", "stream": stream}
    found = scripted.chat.completions.create(**options, max_tokens=2)
    reasons = (
        [part.choices[0].finish_reason for part in found if part.choices]
        if stream
        else [found.choices[0].finish_reason]
    )
    assert reasons[-1] == "stop"
