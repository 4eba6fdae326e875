"""The page, in a browser: a conversation, the live pyramid, errors, keyboard, phone, dark."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pyramidinfer.lab.screenshot import missing, take
from tests.server.browser import Server, Tab, serving, until

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PHONE = (360, 740)

#: Remembers what stands on the page, at every change of it while an answer streams.
RECORD = """() => { window.seen = []; new MutationObserver(() => {
  const text = document.querySelector(".answer:last-child .text")?.textContent ?? "";
  if (document.body.dataset.state === "streaming")
    seen.push([text.length, document.querySelector("#pyramid").dataset.kept ?? ""]);
}).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""


def fact_asked_for(text: str) -> str:
    """The sentence of the example document that its question is about."""
    asked = re.search(r"Where is the (\w+ of \w+ \w+) \?$", text)
    assert asked, text[-80:]
    found = re.search(rf"The {asked[1]} is in \w+ \d+ \.", text)
    assert found, asked[0]
    return found[0]


def test_a_conversation_streams(server: Server, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    server.paced.pause = 2.0  # time to look, on a busy machine too
    tab.page.evaluate(RECORD)
    tab.ask()
    tab.wait("streaming")
    assert tab.page.is_visible("#stop") and not tab.page.is_visible("#send")
    server.paced.pause = 0.05
    tab.wait()
    document = tab.text(".user p")
    assert 250 < len(document.split()) < 400
    assert tab.text(".answer .text").strip() == fact_asked_for(document)
    lengths, pyramids = zip(*tab.page.evaluate("seen"), strict=True)
    assert len(set(lengths)) > 3 and list(lengths) == sorted(lengths)
    assert len(set(pyramids)) > 3

    kept, seen = tab.kept, tab.seen
    assert len(kept) == 12 and max(kept) <= seen and sum(kept) < 0.7 * seen * 12
    counts = tab.page.locator("#plot .layer .count").all_inner_texts()
    assert [int(each) for each in counts[::-1]] == kept or [int(each) for each in counts] == kept
    widths = tab.page.evaluate(
        "[...document.querySelectorAll('#plot .in')].map((bar) => bar.offsetWidth)"
    )
    full = tab.page.evaluate("document.querySelector('#plot .of').offsetWidth")
    assert [width / full for width in widths] == pytest.approx(
        [count / seen for count in kept], abs=0.02
    )
    shown = re.fullmatch(r"KV ([\d.]+ \w+) of ([\d.]+ \w+) full · (\d+) %", tab.text("#kv"))
    assert shown and shown[1] != shown[2] and 0 < int(shown[3]) < 70
    for name in ("rate", "ttft", "answered", "prompted", "cached", "skipped"):
        assert re.match(r"\d", tab.text(f"#{name}")), name
    assert "tokens/s" in tab.text(".note") and "pyramid, keep 45 %" in tab.text(".note")
    assert f"of {seen}" in tab.page.get_attribute("#pyramid", "aria-label")
    assert fact_asked_for(document) in tab.page.text_content("#live")


def test_layers_and_heads(server: Server, open_tab: Callable[..., Tab]) -> None:
    """What each head needs, by the model's profile, and what it keeps, told where one points."""
    tab = open_tab()
    told = "[...document.querySelectorAll('#%s i')].map((each) => [each.title, each.offsetHeight])"
    needs = dict(tab.page.evaluate(told % "needed"))
    (model,) = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
    heads = model["heads"]
    assert len(needs) == sum(map(len, heads)) == 24 and min(needs.values()) > 0
    for layer, row in enumerate(heads):
        for head, need in enumerate(row):
            # JavaScript rounds halves up
            wanted = int(100 * need + 0.5)
            assert f"layer {layer}, head {head}: needs {wanted} % of a text" in needs
    assert tab.page.evaluate(told % "held") == []
    tab.ask()
    tab.wait()
    held = tab.page.evaluate(told % "held")
    kept = [
        re.fullmatch(r"layer (\d+), head (\d+): keeps (\d+) of (\d+) \(\d+ %\)", title)
        for title, _ in held
    ]
    assert len(kept) == 24 and all(kept) and {int(each[4]) for each in kept} == {tab.seen}
    by_layer: dict[int, list[int]] = {}
    for each in kept:
        by_layer.setdefault(int(each[1]), []).append(int(each[3]))
    means = [sum(by_layer[layer]) / 2 for layer in range(12)]
    assert means == pytest.approx(tab.kept, abs=0.51) and len({*map(tuple, by_layer.values())}) > 2
    tab.page.click("#new")
    assert tab.page.evaluate(told % "held") == []
    assert len(tab.page.evaluate(told % "needed")) == 24


def test_why_nothing_is_cut_and_which_rule_is_in_use(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.page.fill("#max-tokens", "3")
    tab.ask("Where is the harp ?")
    tab.wait()
    assert tab.text("#kv").endswith("100 %")
    told = r"pyramid cuts texts below 64 tokens \(min_context\) less, and this one has \d+\."
    assert re.fullmatch(f"Nothing is cut: {told}", tab.text("#why"))
    tab.page.click("#new")
    assert not tab.page.is_visible("#why")
    tab.ask()
    tab.wait()
    assert not tab.page.is_visible("#why")
    assert tab.text("#rule").startswith("pyramid goes by what each head needs, as measured on")
    tab.page.select_option("#policy", "snapkv")
    assert tab.text("#rule").startswith("snapkv: ")
    tab.page.select_option("#policy", "full")
    assert tab.text("#rule") == "full: the full cache."


def test_a_lossless_server(server: Server, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.ask()
    tab.wait()
    assert not tab.page.is_visible("#accepted")  # this one is not
    with serving({"lossless": True, "draft_tokens": 2}) as other:
        tab = open_tab(url=other.url)
        rule = "Lossless: nothing is dropped, and pyramid chooses what is read to guess ahead. "
        assert tab.text("#rule").startswith(f"{rule}pyramid goes by ")
        tab.ask()
        tab.wait()
        assert tab.kept == [tab.seen] * 12 and not tab.page.is_visible("#why")
        assert re.fullmatch(r"\d+ \(\d+ %\)", tab.text("#accepted"))
        assert 1 <= float(tab.text("#verified")) <= 3
        assert "% of drafts accepted" in tab.text(".note").replace("\u00a0", " ").replace(" %", "%")


def test_full_keeps_everything(open_tab: Callable[..., Tab]) -> None:
    """The same question again under another policy stands below the first answer."""
    tab = open_tab()
    names = tab.page.locator("#policy option").all_inner_texts()
    assert {"pyramid", "full", "snapkv"} <= set(names)
    assert tab.text("#rule").startswith("pyramid goes by what each head needs, as measured on")
    tab.ask()
    tab.wait()
    assert min(tab.kept) < tab.seen
    tab.page.select_option("#policy", "full")
    assert tab.page.is_disabled("#keep") and tab.text("#keep-now") == "everything"
    tab.page.click("text=Ask again")
    tab.wait()
    assert tab.kept == [tab.seen] * 12
    assert tab.text("#kv").endswith("100 %")
    first, second = tab.page.locator(".answer .text").all_inner_texts()
    assert first == second
    tab.page.select_option("#policy", "snapkv")
    assert tab.page.is_enabled("#keep")
    tab.page.fill("#keep", "0.2")
    tab.page.click("text=Ask again")
    tab.wait()
    assert "snapkv, keep 20 %" in tab.text(".note")
    assert sum(tab.kept) < 0.35 * tab.seen * 12


def test_the_settings_are_sent(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    bodies: list[dict[str, Any]] = []
    tab.page.on("request", lambda each: each.post_data and bodies.append(each.post_data_json))
    tab.page.fill("#max-tokens", "3")
    tab.page.fill("#temperature", "0.5")
    tab.page.click("text=System prompt")
    tab.page.fill("#system", "the old baker")
    tab.ask("The storm touched the bridge .")
    tab.wait()
    assert tab.text("#answered") == "3" and "ended at the token limit" in tab.text(".note")
    answer = tab.page.evaluate("state.turns[0].answers[0].said")
    tab.page.fill("#system", "")
    tab.page.select_option("#policy", "full")
    tab.ask("Where is the harp ?")
    tab.wait()
    first, second = bodies
    assert first["messages"] == [
        {"role": "system", "content": "the old baker"},
        {"role": "user", "content": "The storm touched the bridge ."},
    ]
    assert first["temperature"] == 0.5 and first["max_tokens"] == 3
    assert first["compression"] == {"policy": "pyramid", "keep": 0.45}
    assert first["stream_options"] == {"include_usage": True, "include_kv": True}
    assert second["compression"] == {"policy": "full"}
    assert [each["role"] for each in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == answer
    tab.page.fill("#max-tokens", "0")
    tab.ask("once more")
    assert len(bodies) == 2 and tab.page.input_value("#input") == "once more"
    tab.page.click("#new")
    assert tab.page.is_visible("#welcome") and tab.page.locator(".turn").count() == 0
    assert tab.page.get_attribute("#pyramid", "data-kept") is None
    assert tab.page.input_value("#input") == "once more"


@pytest.mark.parametrize("how", ["button", "escape", "new chat"])
def test_stop(how: str, server: Server, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    server.paced.pause = 0.3
    tab.ask()
    tab.until("document.querySelector('.text')?.textContent.length > 2")
    if how == "escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.click("#stop" if how == "button" else "#new")
    tab.wait()
    if how == "new chat":
        assert tab.page.locator(".turn").count() == 0
    else:
        fact, said = fact_asked_for(tab.text(".user p")), tab.text(".answer .text").strip()
        assert fact.startswith(said) and 2 < len(said) < len(fact)
        assert "stopped" in tab.text(".note")
    assert tab.page.is_visible("#send") and not tab.page.is_visible("#stop")
    metrics = "fetch('/metrics').then((each) => each.text())"
    running = r"vllm:num_requests_running\S* 0(\.0)?\n"
    until(lambda: re.search(running, tab.page.evaluate(metrics)) is not None)
    server.paced.pause = 0.0
    tab.ask()
    tab.wait()
    assert tab.text(".answer .text").strip() == fact_asked_for(tab.text(".user p"))


def test_errors_are_lines_with_a_way_on(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(errors=True)
    route = "**/v1/chat/completions"
    text = "Where is the harp ?"

    def answer(**options: Any) -> None:
        tab.page.unroute(route)
        tab.page.route(route, lambda each: each.fulfill(**options))

    busy = json.dumps({"error": {"message": "the queue is full", "code": "queue_full"}})
    answer(status=429, headers={"Retry-After": "2"}, body=busy)
    tab.ask(text)
    tab.page.wait_for_selector("button:disabled:text('Retry in')")
    assert tab.text(".trouble p") == "the queue is full"

    piece = {"choices": [{"index": 0, "delta": {"content": "The harp"}, "finish_reason": None}]}
    broken = f'data: {json.dumps(piece)}\n\ndata: {{"error":{{"message":"it broke"}}}}\n\n'
    answer(content_type="text/event-stream", body=broken)
    tab.page.click("button:text-is('Retry')")
    tab.page.wait_for_selector("text=it broke")
    assert tab.text(".answer .text") == "The harp" and tab.page.locator(".answer").count() == 1

    answer(content_type="text/event-stream", body=f"data: {json.dumps(piece)}\r\n\r\n")
    tab.page.click("button:text-is('Retry')")
    tab.page.wait_for_selector("text=ended before the answer was complete")
    answer(status=502, body="<h1>Bad gateway</h1>")
    tab.page.click("button:text-is('Retry')")
    tab.page.wait_for_selector("text=The server answered 502")

    tab.page.unroute(route)
    tab.page.route(route, lambda each: each.abort())
    tab.page.click("button:text-is('Retry')")
    tab.page.wait_for_selector("text=The server cannot be reached")
    tab.page.fill("#input", "a draft")
    tab.page.click("text=Edit")
    assert tab.page.input_value(".editor textarea") == text
    tab.page.unroute(route)
    tab.page.press(".editor textarea", "Enter")
    tab.wait()
    assert tab.page.input_value("#input") == "a draft"
    assert tab.page.locator(".trouble").count() == 0 and tab.text(".answer .text")


def test_an_unanswered_text_is_not_lost(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(errors=True)
    tab.page.route("**/v1/chat/completions", lambda each: each.abort())
    tab.ask("Where is the harp ?")
    tab.page.wait_for_selector(".trouble")
    tab.page.reload()
    assert tab.page.input_value("#input") == "Where is the harp ?"
    tab.ask("Where is the harp ?")
    tab.page.wait_for_selector(".trouble")
    tab.page.fill("#input", "a draft")
    tab.page.reload()
    assert tab.page.input_value("#input") == "Where is the harp ?\n\na draft"


def test_markup_stays_text(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    text = '<img src="x"><b>bold</b>'
    piece = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n"
    stream = {"content_type": "text/event-stream", "body": body}
    tab.page.route("**/v1/chat/completions", lambda each: each.fulfill(**stream))
    tab.ask(text)
    tab.wait()
    assert tab.text(".user p") == tab.text(".answer .text") == text
    assert tab.page.locator("#log img, #log b").count() == 0


def test_api_key(open_tab: Callable[..., Tab]) -> None:
    with serving(api_keys=("sesame",)) as server:
        tab = open_tab(url=server.url, errors=True)
        tab.ask("Where is the harp ?")
        tab.page.wait_for_selector("text=The server asks for an API key")
        tab.until("document.activeElement.id === 'key'")
        tab.page.keyboard.type("wrong")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("#hint:text('API key')")
        tab.page.fill("#key", "sesame")
        tab.page.press("#key", "Enter")
        tab.page.wait_for_selector(".note:has-text('tokens')")
        assert tab.page.locator(".trouble").count() == 0
        assert "12 layers" in tab.text("#model")
        kept = tab.page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
        assert "sesame" in kept[0] and kept[1] == []


def test_keyboard_alone(server: Server, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    keys = tab.page.keyboard
    assert tab.focused == "input"
    keys.type("Where is")
    keys.press("Shift+Enter")
    keys.type("the harp ?")
    assert tab.page.input_value("#input") == "Where is\nthe harp ?"
    keys.press("Control+a")
    keys.press("Delete")

    back = []  # from the message box to the beginning: what a keyboard comes by, and sees
    for _ in range(11):
        keys.press("Shift+Tab")
        name = tab.page.evaluate(
            "document.activeElement.id || document.activeElement.textContent.trim()"
        )
        back.append(name)
        outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or name == "input", name
    assert back == [
        "API key",
        "System prompt",
        "temperature",
        "max-tokens",
        "keep",
        "policy",
        "view-tokens",
        "view-layers",
        "log",
        "new",
        "Skip to the message box",
    ]
    tab.page.focus(".skip")
    keys.press("Enter")
    assert tab.focused == "input"

    for _ in range(6):
        keys.press("Shift+Tab")
    assert tab.focused == "policy"
    keys.press("End")
    chosen = tab.page.input_value("#policy")
    assert chosen == tab.page.locator("#policy option").last.inner_text()
    for _ in range(12):
        if tab.focused == "input":
            break
        keys.press("Tab")
    keys.press("Tab")
    assert tab.focused == "example"
    keys.press("Enter")
    assert tab.focused == "input"
    server.paced.pause = 0.3
    keys.press("Enter")
    tab.wait("streaming")
    assert tab.focused == "input"
    keys.type("next")
    keys.press("Enter")  # not before this one is over
    assert tab.page.input_value("#input") == "next" and "Escape" in tab.text("#hint")
    keys.press("Escape")
    tab.wait()
    assert chosen in tab.text(".note") and "stopped" in tab.text(".note")
    assert tab.page.input_value("#input") == "next" and tab.focused == "input"


@pytest.mark.parametrize("size", [PHONE, (320, 568), (740, 360)])
def test_phone(size: tuple[int, int], open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(size=size, has_touch=True, is_mobile=True)

    def fits() -> bool:
        return bool(
            tab.page.evaluate(
                "[document.documentElement,"
                " ...document.querySelectorAll('body, main, #log, aside')]"
                ".every((each) => each.scrollWidth <= each.clientWidth)"
                " && document.documentElement.scrollHeight <= innerHeight"
            )
        )

    assert fits()
    tab.page.tap("#example")
    assert fits()
    tab.page.tap("#send")
    tab.page.wait_for_selector(".note:has-text('tokens')")
    assert fits()
    assert not tab.page.is_visible("#plot")
    assert re.match(r"KV \d+ %", tab.text("#brief"))
    tab.page.tap("#show-cache")
    assert tab.page.is_visible("#plot") and fits()
    tab.page.tap("#show-settings")
    assert tab.page.is_visible("#policy") and not tab.page.is_visible("#plot") and fits()
    assert tab.page.get_attribute("#show-settings", "aria-expanded") == "true"
    tab.page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert fits()
    sizes = tab.page.evaluate(
        "[...document.querySelectorAll('input:not([type=range]), select, textarea')]"
        ".map((each) => parseFloat(getComputedStyle(each).fontSize))"
    )
    assert min(sizes) >= 16


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: list[float]) -> float:
        linear = [
            each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4
            for each in (part / 255 for part in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(scheme: str, open_tab: Callable[..., Tab]) -> None:
    """Dark is dark, and every text can be read in both."""
    tab = open_tab(color_scheme=scheme)

    def colour(selector: str, name: str) -> list[float]:
        value = tab.page.evaluate(
            "([at, name]) => getComputedStyle(document.querySelector(at))[name]", [selector, name]
        )
        return [float(each) for each in re.findall(r"[\d.]+", value)[:3]]

    tab.ask()
    tab.wait()
    page, panel = colour("body", "backgroundColor"), colour("aside", "backgroundColor")
    assert (sum(page) < 150) == (scheme == "dark")
    for at, on in (
        ("body", page),
        (".note", page),
        ("#model", page),
        ("#new", page),
        (".acts button", page),
        ("#kv", panel),
        (".layer .count", panel),
        ("#ticks", panel),
        ("#hint", panel),
        (".user p", colour(".user", "backgroundColor")),
        (".user button", colour(".user", "backgroundColor")),
        ("#send", colour("#send", "backgroundColor")),
    ):
        assert contrast(colour(at, "color"), on) >= 4.5, at
    bar = colour(".track .in", "backgroundColor")
    assert contrast(bar, panel) >= 3 and contrast(bar, colour(".track .of", "backgroundColor")) >= 3
    assert contrast(colour(".box", "borderTopColor"), page) >= 3


def test_screenshot(server: Server, tmp_path: Any) -> None:
    """The README's picture, in a process of its own: playwright allows one loop a thread."""
    server.paced.pause = 0.0
    thread = threading.Thread(target=take, args=(server.url, tmp_path / "images" / "page.png"))
    thread.start()
    thread.join()
    picture = (tmp_path / "images" / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
