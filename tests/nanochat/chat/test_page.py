"""The page in a real browser. NANOCHAT_SCREENSHOTS names a folder for pictures of it."""

import os
import shutil
import time
from pathlib import Path
from typing import ClassVar

import pytest

from tests.nanochat.chat.serving import Says, serving, words

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
LONG = "word " * 200


class Talks(Says):
    """A model that says what the question asks for."""

    ANSWERS: ClassVar = {
        "shells": ("4 bags with 6: ", "[4*6]", " and 17 more: ", "[17+24]", "\n#### 41"),
        "long": (LONG,),
        "markup": ("<img src=x onerror=alert(1)> **bold** 네, héllo ✓",),
    }

    def answer(self, prompt: str) -> list[int]:
        question = prompt.rpartition("<|user_start|>")[2]
        said = (f"You said: {question.partition('<|')[0]} ({prompt.count('user_start')})",)
        return words(self.tokenizer, *next((parts for word, parts in self.ANSWERS.items() if word in question), said))


@pytest.fixture(scope="module")
def server(world):
    with serving(world, Talks, shape=(1, 32, 1, 1, 512), delay=0.004) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser, request):
    options = getattr(request, "param", {})
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
    page = context.new_page()
    page.set_default_timeout(15_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    page.goto(server.url)
    until(page, "document.activeElement.id === 'question'")
    yield page
    context.close()
    assert not errors


def ask(page, text: str) -> None:
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")


def until(page, condition: str) -> None:
    """Wait for a JavaScript expression to be true; the page's policy forbids that it waits by itself."""
    deadline = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition} is not true: {page.content()}"
        page.wait_for_timeout(10)


def answered(page) -> None:
    until(page, "!document.body.classList.contains('busy')")


def texts(page, role: str) -> list[str]:
    return page.locator(f"article.{role} .text").all_inner_texts()


def picture(page, name: str) -> None:
    if folder := os.environ.get("NANOCHAT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_conversation(page, server):
    """Sent by Enter and by the button, with calls of the calculator, and there again after a reload."""
    until(page, "document.querySelector('#model').innerText === 'tiny'")
    ask(page, "How many shells?")
    answered(page)
    assert texts(page, "assistant") == ["4 bags with 6: 4*6 → 24 and 17 more: 17+24 → 41\n#### 41"]
    assert page.locator("article.assistant code.call").all_inner_texts() == ["4*6 → 24", "17+24 → 41"]
    page.locator("#question").fill("two\nlines")
    page.locator("#send").click()
    answered(page)
    assert (
        texts(page, "user") == ["How many shells?", "two\nlines"]
        and texts(page, "assistant")[1] == "You said: two\nlines (2)"
    )
    picture(page, "conversation")
    before = texts(page, "assistant")
    page.reload()
    assert texts(page, "assistant") == before and page.locator("code.call").count() == 2
    page.locator("#new").click()
    assert texts(page, "user") == [] and page.locator(".welcome").is_visible()
    page.reload()
    assert texts(page, "user") == []


def test_an_answer_streams_and_stops(page, server):
    ask(page, "a long one")
    until(page, "document.querySelector('article.assistant .text').textContent.length > 20")
    first = len(texts(page, "assistant")[0])
    assert page.locator("#send").inner_text() == "Stop"
    until(page, f"document.querySelector('article.assistant .text').textContent.length > {first + 40}")
    picture(page, "streaming")
    page.keyboard.press("Escape")
    answered(page)
    [stopped] = texts(page, "assistant")
    assert 60 < len(stopped) < len(LONG) and page.locator(".note", has_text="Stopped.").is_visible()
    server.wait_until(lambda: server.request("/stats")[1]["workers"][0]["running"] == 0)
    ask(page, "long again")
    until(page, "document.querySelectorAll('article.assistant .text')[1]?.textContent.length > 5")
    page.locator("#send").click()  # Stop
    answered(page)
    assert len(texts(page, "assistant")[1]) < len(LONG)


def test_edit_regenerate_and_copy(page):
    for text in ("first", "second"):
        ask(page, text)
        answered(page)
    page.locator("article.assistant").nth(1).get_by_text("Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "You said: second (2)"
    page.locator("article.assistant").nth(0).get_by_text("Regenerate").click()
    answered(page)
    assert texts(page, "user") == ["first"] and texts(page, "assistant") == ["You said: first (1)"]
    page.locator("article.user").nth(0).get_by_text("Edit").click()
    assert page.locator("#question").input_value() == "first" and texts(page, "user") == []
    page.locator("#question").fill("changed")
    page.keyboard.press("Enter")
    answered(page)
    assert texts(page, "assistant") == ["You said: changed (1)"]
    page.locator("#question").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#question").input_value() == "changed"


def test_settings_are_sent_and_kept(page):
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/chat") else None)
    page.locator("#temperature").fill("1.3")
    page.locator("#top_k").fill("7")
    ask(page, "hi")
    answered(page)
    assert {"temperature": 1.3, "top_k": 7}.items() <= sent[0].items()
    page.reload()
    until(page, "document.querySelector('#model').textContent")
    assert page.locator("#temperature").input_value() == "1.3"
    page.locator("#temperature").fill("9")
    ask(page, "not sent")
    assert len(sent) == 1 and texts(page, "user") == ["hi"]


def test_an_answer_is_text_and_nothing_else(page):
    ask(page, "markup")
    answered(page)
    assert texts(page, "assistant") == ["<img src=x onerror=alert(1)> **bold** 네, héllo ✓"]
    assert page.locator("article img").count() == 0


def test_errors_are_told_and_another_question_works(page, server):
    page.route("**/chat", lambda route: route.abort(), times=1)
    ask(page, "lost")
    answered(page)
    assert page.locator("[role=alert]").inner_text() == "The server does not answer."
    picture(page, "error")
    ask(page, "after it")
    answered(page)
    assert texts(page, "user") == ["after it"] and texts(page, "assistant") == ["You said: after it (1)"]
    page.evaluate("question.removeAttribute('maxlength')")
    ask(page, "x" * 8001)
    answered(page)
    assert page.locator("[role=alert]").inner_text() == "message 2 has 8,001 characters; there may be 8,000"


def test_the_keyboard_alone(page):
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert texts(page, "user") == ["one\ntwo"]
    page.locator("main").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question" and page.locator("#question").input_value() == ""
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"send", "temperature", "top_k", "theme", "new", "Copy", "Edit", "Regenerate"} <= seen
    page.keyboard.press("Alt+n")
    assert texts(page, "user") == []


@pytest.mark.parametrize(
    "page", [{"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}], indirect=True
)
def test_a_narrow_window(page):
    ask(page, "How many shells?")
    answered(page)
    ask(page, "x" * 300)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("#send", "#temperature", "#top_k", "#new", "#theme"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640, name
    picture(page, "mobile")


@pytest.mark.parametrize(
    "page", [{"color_scheme": "dark"}, {"color_scheme": "light"}], indirect=True, ids=["dark", "light"]
)
def test_dark_and_light(page, request):
    """As the system has it, and changed by the button, which is kept."""
    back = "getComputedStyle(document.body).backgroundColor"
    colours = {True: "rgb(22, 24, 28)", False: "rgb(255, 255, 255)"}
    dark = "dark" in request.node.callspec.id
    ask(page, "How many shells?")
    answered(page)
    assert page.evaluate(back) == colours[dark]
    picture(page, "dark" if dark else "light")
    page.locator("#theme").click()
    assert page.evaluate(back) == colours[not dark]
    page.reload()
    assert page.evaluate(back) == colours[not dark]
    page.locator("#theme").click()
    assert page.evaluate(back) == colours[dark]


def test_a_reload_keeps_what_has_come_of_an_answer(page):
    ask(page, "long")
    until(page, "document.querySelector('article.assistant .text')?.textContent.includes('word word')")
    page.reload()
    until(page, "document.querySelector('article.assistant .note')?.textContent === 'Stopped.'")
    text = page.locator("article.assistant .text").text_content()
    assert text.startswith("word word") and len(text) < len(LONG)
    ask(page, "hello")
    until(page, "document.querySelectorAll('article.assistant').length === 2")
    answered(page)
    assert "You said: hello" in page.locator("article.assistant .text").last.text_content()


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        ("[null]", []),
        ("{}", []),
        ("[", []),
        ('[3, {"role": "user"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": [null]}]', ["a"]),
        ('[{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]', ["b"]),
    ],
)
def test_broken_storage_does_not_break_the_page(page, kept, shown):
    page.evaluate("kept => localStorage.setItem('nanochat.messages', kept)", kept)
    page.reload()
    until(page, "document.getElementById('model').textContent === 'tiny'")
    assert page.locator("article .text").all_text_contents() == shown


def turns(count: int, answer: str = "b") -> list[dict]:
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return pair * count


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (turns(4, "b" * 7994), 9),  # 31,993 characters
        (turns(5, "b" * 7999), 7),
        (turns(4, "😀" * 7994), 9),  # as the server counts: half of what they are in UTF-16
        (turns(1, "b" * 9000), 3),
        (turns(1, "b" * 40_000), 1),
        (turns(260), 499),
        (turns(1)[1:], 1),
        ([*turns(1)[1:], *turns(2)], 5),
        ([*turns(1)[:1], *turns(1)], 3),
    ],
)
def test_a_long_conversation_goes_on_without_its_oldest_turns(page, kept, left):
    """Or one whose beginning cannot be sent: each question gets an answer, and what was left out is told."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/chat") else None)
    page.evaluate("kept => localStorage.setItem('nanochat.messages', JSON.stringify(kept))", kept)
    page.reload()
    until(page, "document.getElementById('model').textContent === 'tiny'")
    ask(page, "last question")
    answered(page)
    assert page.locator("[role=alert]").count() == 0
    assert texts(page, "assistant")[-1].startswith("You said: last question")
    assert sent[0]["messages"] == [*kept, {"role": "user", "content": "last question"}][-left:]
    dropped = -(-(len(kept) + 1 - left) // 2)
    note = page.locator("article.assistant").last.locator(".note").all_inner_texts()
    assert bool(dropped) <= len(note) and (not dropped or "forgotten" in note[0])
    assert len(texts(page, "user")) == len([message for message in kept if message["role"] == "user"]) + 1


def test_an_answer_tells_both_that_turns_are_forgotten_and_that_it_was_stopped(page):
    page.evaluate("kept => localStorage.setItem('nanochat.messages', JSON.stringify(kept))", turns(1, "b" * 40_000))
    page.reload()
    until(page, "document.getElementById('model').textContent === 'tiny'")
    ask(page, "long")
    until(page, "document.querySelectorAll('article.assistant .text')[1]?.textContent.length > 5")
    page.keyboard.press("Escape")
    answered(page)
    assert page.locator(".note").nth(0).inner_text() == "Stopped. The oldest turn no longer fits and is forgotten."


def test_a_setting_that_is_typed_before_the_defaults_come_stays(page):
    def late(route):
        typed = page.locator("#top_k")
        typed.fill("7")
        route.continue_()

    page.route("**/stats", late)
    page.reload()
    until(page, "document.getElementById('model').textContent === 'tiny'")
    assert page.locator("#top_k").input_value() == "7" and page.locator("#temperature").input_value() == "0.6"


def test_an_answer_is_drawn_once_per_frame(page):
    """Frames that do not come: one is asked for, and the whole answer is there at the end."""
    page.evaluate("window.asked = 0; window.requestAnimationFrame = f => f?.name === 'redraw' ? ++window.asked : 0")
    ask(page, "shells")
    until(page, "document.getElementById('talk').getAttribute('aria-busy') === 'true'")
    answered(page)
    assert page.evaluate("window.asked") == 1
    assert "4*6 → 24" in page.locator("article.assistant .text").text_content()
    assert page.locator("#talk").get_attribute("aria-busy") == "false"
