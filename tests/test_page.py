"""The page in a real browser: upload, boxes, stop, regenerate, edit, history; and model text can't become HTML."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DATA
from serving import EchoEngine, echo_shelf, processor_of, serving

from qwenvl_mlx.server.pages import policy_of
from qwenvl_mlx.server.settings import Settings

PLACES = "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(100,200),(500,900)<|box_end|>"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def echo(tiny_chat: Path) -> EchoEngine:
    return EchoEngine(processor_of(tiny_chat), pause=0.005)


@pytest.fixture(scope="module")
def url(echo: EchoEngine) -> Iterator[str]:
    with serving(echo_shelf(echo, name="tiny"), Settings()) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("the page is tested in Chromium, which is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(locale="en-US", viewport={"width": 1100, "height": 800})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if not ours(request.url, url) else None)
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    context.close()
    assert faults == []


def ours(address: str, url: str) -> bool:
    return address.startswith((url, "data:", "blob:"))


def send(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def finished(page: Any) -> Any:
    """The last answer, once it is complete."""
    page.wait_for_selector(".turn.assistant:last-child[aria-busy=false]", timeout=10_000)
    return page.query_selector(".turn.assistant:last-child")


def upload(page: Any, *names: str) -> None:
    page.set_input_files("#files", [str(DATA / "images" / name) for name in names])
    page.wait_for_selector(f"#tray figure:nth-child({len(names)})")


def test_a_picture_gives_an_answer_with_boxes(page: Any, echo: EchoEngine) -> None:
    upload(page, "rgb_97x61.png", "photo_333x217.jpg")
    send(page, f"say:Here: {PLACES}.")
    answer = finished(page)
    assert answer.query_selector(".body").inner_text() == "Here: a dog."
    points = page.wait_for_selector("figure.places polygon", state="attached").get_attribute("points")
    assert points == "33,43 166,43 166,195 33,195"  # pixels of the second picture
    assert page.query_selector(".place-name").inner_text() == "a dog"
    assert len(echo.requests[-1].prompt.media) == 2
    stats = answer.query_selector(".stats").inner_text()
    assert re.search(r"tiny · [\d.]+ tokens/s · \d+ tokens", stats)


def test_places_in_json_are_shown_by_name(page: Any) -> None:
    upload(page, "rgb_97x61.png")
    places = '[{"bbox_2d": [0, 0, 20, 20], "label": "a dog"}, {"bbox_2d": [30, 0, 50, 20], "label": "a <b>cat</b>"}]'
    send(page, f"say:Two: ```json\n{places}\n```")
    body = finished(page).query_selector(".body")
    assert body.inner_text() == "Two: a dog · a <b>cat</b>"
    assert len(body.query_selector_all("mark.ref")) == 2
    send(page, 'say:[{"bbox_2d": [0, 0, 2')  # unfinished: as it stands
    assert finished(page).query_selector(".body").inner_text() == '[{"bbox_2d": [0, 0, 2'


def test_stop_keeps_what_was_said(page: Any, echo: EchoEngine) -> None:
    send(page, "say:" + "word " * 700)
    page.wait_for_selector(".turn.assistant .body")
    page.click("#send.stop")
    answer = finished(page)
    assert "stopped" in answer.query_selector(".stats").inner_text()
    assert len(answer.query_selector(".body").inner_text()) < 3000
    page.wait_for_timeout(200)
    assert echo.requests[-1].cancelled


def test_answer_again_and_edit(page: Any, echo: EchoEngine) -> None:
    send(page, "say:first")
    finished(page).query_selector("[title='Answer again']").click()
    finished(page)
    assert len(page.query_selector_all(".turn")) == 2
    page.hover(".turn.user")
    page.click(".turn.user [title=Edit]")
    page.fill(".edit textarea", "say:second")
    page.press(".edit textarea", "Enter")
    assert finished(page).query_selector(".body").inner_text() == "second"
    assert len(page.query_selector_all(".turn")) == 2


def test_earlier_turns_are_sent_along(page: Any, echo: EchoEngine) -> None:
    send(page, "say:one")
    finished(page)
    send(page, "say:two")
    finished(page)
    text = echo.processor.tokenizer.decode(echo.requests[-1].prompt.input_ids, skip_special=False)
    assert "<|im_start|>assistant\none<|im_end|>" in text


def test_history_survives_a_reload(page: Any) -> None:
    send(page, "say:remember me")
    finished(page)
    page.reload()
    page.click("#chats button.open >> text=remember me")
    assert page.query_selector(".turn.assistant .body").inner_text() == "remember me"
    page.click("#new")
    assert page.query_selector(".turn") is None
    page.hover("#chats li")
    page.click("#chats button.remove")
    page.wait_for_selector("#chats li", state="detached")


def test_text_of_a_model_is_never_html(page: Any) -> None:
    hostile = (
        "<img src=x onerror=alert(1)><script>alert(1)</script> [x](javascript:alert(1)) "
        "![p](https://elsewhere.example/p.png) `<b>` **<i>bold</i>**\n\n```html\n<b>code</b>\n```\n\n"
        "<|object_ref_start|><svg onload=alert(1)><|object_ref_end|>"
    )
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    send(page, f"say:{hostile}")
    body = finished(page).query_selector(".body")
    assert body.query_selector("img, script, svg:not(.icon), b, i") is None
    assert body.query_selector("a[href^=javascript]") is None
    assert "<script>alert(1)</script>" in body.inner_text()
    assert body.query_selector("pre code").inner_text() == "<b>code</b>"
    assert body.query_selector("strong").inner_text() == "<i>bold</i>"


def test_links_may_have_brackets_in_them(page: Any) -> None:
    send(page, "say:see [a](https://example.org/A_(b)), [x](no end")
    body = finished(page).query_selector(".body")
    assert body.query_selector("a").get_attribute("href") == "https://example.org/A_(b)"


def test_settings_reach_the_engine(page: Any, echo: EchoEngine) -> None:
    page.click("#open-settings")
    page.fill("[data-set=seed]", "42")
    page.fill("[data-set=max_tokens]", "3")
    page.fill("[data-set=system]", "Be brief.")
    page.keyboard.press("Escape")
    send(page, "say:" + "x" * 200)
    assert "cut off" in finished(page).query_selector(".stats").inner_text()
    assert echo.requests[-1].options.seed == 42
    text = echo.processor.tokenizer.decode(echo.requests[-1].prompt.input_ids, skip_special=False)
    assert "<|im_start|>system\nBe brief." in text


def test_chinese_dark_and_narrow(browser: Any, url: str) -> None:
    context = browser.new_context(
        locale="zh-CN", color_scheme="dark", viewport={"width": 390, "height": 844}, has_touch=True
    )
    page = context.new_page()
    page.goto(url)
    assert page.query_selector("#welcome h1").inner_text() == "你看到了什么？"
    assert page.query_selector("html").get_attribute("data-theme") == "dark"
    assert not page.is_visible("#side")
    page.click("#menu")
    page.wait_for_selector("#side >> text=新对话")
    page.click("#language")
    assert page.query_selector("#welcome h1").inner_text() == "What do you see?"
    width = page.query_selector("body").bounding_box()["width"]
    assert width <= 390
    context.close()


def test_a_server_with_a_key_asks_for_it(browser: Any, echo: EchoEngine) -> None:
    with serving(echo_shelf(echo, name="tiny"), Settings(api_key="secret")) as url:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(url)
        send(page, "say:x")
        assert "API key" in finished(page).query_selector(".fault").inner_text()
        page.click("#open-settings")
        page.fill("[data-set=key]", "secret")
        page.keyboard.press("Escape")
        send(page, "say:open")
        assert finished(page).query_selector(".body").inner_text() == "open"
        context.close()


def test_only_scripts_of_the_page_itself_may_run() -> None:
    policy = policy_of("<p>x</p><script>run()</script>")
    assert "script-src 'sha256-" in policy
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_the_page_needs_no_other_host() -> None:
    page = (Path(__file__).parent.parent / "server" / "page.html").read_text(encoding="utf-8")
    urls = set(re.findall(r"https?://[\w.-]+", page))
    assert urls <= {"http://www.w3.org"}
