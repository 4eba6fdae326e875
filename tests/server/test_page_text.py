"""The page's text in a browser: Markdown of a hostile model, edits, copies, reasoning, survival."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from pyramidinfer.lab.screenshot import missing
from tests.server.browser import Tab

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ROUTE = "**/v1/chat/completions"
#: What Markdown may become, and with which attributes.
ALLOWED: dict[str, set[str]] = {
    "A": {"href", "target", "rel", "title"},
    "OL": {"start"},
    "PRE": {"tabindex"},
    "BUTTON": {"class", "type"},
    **{name: {"class"} for name in ("DIV", "TH", "TD")},
    **{name: set() for name in ("P", "STRONG", "EM", "DEL", "CODE", "SPAN", "UL", "LI", "HR")},
    **{name: set() for name in ("BLOCKQUOTE", "TABLE", "THEAD", "TBODY", "TR")},
    **{name: set() for name in ("H3", "H4", "H5", "H6")},
}
#: All elements that a text became, with their attributes.
ELEMENTS = """(text) => { const box = document.createElement("div"); showMarkdown(box, text);
  return [...box.querySelectorAll("*")].map((each) => [each.tagName,
    Object.fromEntries([...each.attributes].map((one) => [one.name, one.value]))]); }"""
HTML = """(text) => { const box = document.createElement("div"); showMarkdown(box, text);
  return box.innerHTML; }"""
#: Whether a text shown piece by piece is what it is when shown at once.
IN_PIECES = """([text, step]) => {
  const [box, whole] = [0, 1].map(() => document.createElement("div"));
  for (let at = step; at < text.length + step; at += step) showMarkdown(box, text.slice(0, at));
  showMarkdown(whole, text); return [box.innerHTML, whole.innerHTML]; }"""
LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


def streams(tab: Tab, *deltas: dict[str, str]) -> None:
    """Every request is answered with these from now on."""
    pieces = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    pieces.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in pieces) + "data: [DONE]\n\n"
    tab.page.unroute(ROUTE)
    tab.page.route(ROUTE, lambda each: each.fulfill(content_type="text/event-stream", body=body))


def test_markdown(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    url = "https://a.org/b_(c)?d=e"
    shown = f'<a href="{url}" {LINK} title="{url}">'
    for text, wanted in (
        ("one\ntwo  three\n\nfour", "<p>one\ntwo  three</p><p>four</p>"),
        (
            "**a** *b* _c_ __d__ ~~e~~ `f*g*`",
            "<p><strong>a</strong> <em>b</em> <em>c</em> <strong>d</strong> <del>e</del> "
            "<code>f*g*</code></p>",
        ),
        (
            "***a*** **b *c* d**",
            "<p><strong><em>a</em></strong> <strong>b <em>c</em> d</strong></p>",
        ),
        ("snake_case_name 2 * 3 * 4 \\*a\\*", "<p>snake_case_name 2 * 3 * 4 *a*</p>"),
        ("`` a`b `` and ` alone", "<p><code>a`b</code> and ` alone</p>"),
        ("# A\n## B #\n###### C\n#no", "<h3>A</h3><h4>B</h4><h6>C</h6><p>#no</p>"),
        ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        (
            "- a\n  - b\n- c\n\n7. d\n8. e",
            "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>"
            '<ol start="7"><li><p>d</p></li><li><p>e</p></li></ol>',
        ),
        (
            "|a|b|\n|-|-:|\n|1|2|",
            '<div class="wide"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
            '<tbody><tr><td>1</td><td class="right">2</td></tr></tbody></table></div>',
        ),
        (
            "```py\nx = 1 < 2\n\n**y**\n```\nz",
            '<div class="code"><div class="bar"><span>py</span>'
            '<button class="link copy" type="button">Copy</button></div>'
            '<pre tabindex="0"><code>x = 1 &lt; 2\n\n**y**</code></pre></div><p>z</p>',
        ),
        (f"[a *b*]({url}) x", f"<p>{shown}a *b*</a> x</p>"),
        (f"See {url}.", f"<p>See {shown}{url}</a>.</p>"),
        (f"<{url}>", f"<p>{shown}{url}</a></p>"),
        (f"![cat]({url})", f"<p>{shown}cat</a></p>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
    ):
        assert tab.page.evaluate(HTML, text) == wanted.replace(" & ", " &amp; "), text


def test_links_lead_nowhere_else(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    addresses = ["/v1/models", "#x", "//b.org", ""]
    for scheme in ("javascript", "JaVaScRiPt", "data", "vbscript", "file", "blob", "ftp"):
        addresses += [
            f"{scheme}:alert(1)",
            f"{scheme}://a.org/x",
            f"\t{scheme}:x",
            f"{scheme}&colon;x",
        ]
    for address in addresses:
        for text in (f"[a]({address})", f"![a]({address})", f"<{address}>", f'[a]({address} "t")'):
            assert [name for name, _ in tab.page.evaluate(ELEMENTS, text)] == ["P"], text


def test_hostile_text(open_tab: Callable[..., Tab]) -> None:
    """Whatever a model writes, elements and attributes are ours, and it is one at any pace."""
    tab = open_tab()
    parts = [
        "<script>alert(1)</script>",
        '<img src=x onerror="alert(1)">',
        "](javascript:alert(1))",
        "](https://a.org/\"onclick='x')",
        'https://a.org/"><svg onload=x>',
        "<!--",
        "&#x3c;",
        "\u202e",
        "\x00",
        *"[]()!<>*_`~|#>-+\\\"'\n\n\n \t:1.ab",
        "**",
        "```",
        "\n> ",
        "\n- ",
        "\n  1. ",
        "|-|-|\n",
        "![",
    ]
    draw = random.Random(5)
    for _ in range(150):
        text = "".join(draw.choices(parts, k=draw.randint(1, 60)))
        for name, attributes in tab.page.evaluate(ELEMENTS, text):
            assert name in ALLOWED and set(attributes) <= ALLOWED[name], text
            assert attributes.get("href", "https:").startswith(("http:", "https:", "mailto:"))
            if name == "A":
                assert attributes["rel"] == "noopener noreferrer nofollow"
        piecewise, whole = tab.page.evaluate(IN_PIECES, [text, draw.randint(1, 9)])
        assert piecewise == whole, text
    for text in (
        "[",
        "![",
        "*a ",
        "**a",
        "_",
        "`",
        "``a`",
        "> ",
        "- ",
        "[a](",
        "https://",
        "|a|\n|-|\n",
    ):
        tab.page.evaluate(HTML, text * 20_000)  # quadratic time would not end


def test_code_is_copied(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    streams(tab, {"content": "So:\n```py\nx = 1\n"}, {"content": "y = 2\n```\n**done**"})
    tab.ask("Write  code")
    tab.wait()
    assert tab.text(".answer pre") == "x = 1\ny = 2"
    for button, wanted in (
        (".code .copy", "x = 1\ny = 2"),
        (".answer > .acts .copy", "So:\n```py\nx = 1\ny = 2\n```\n**done**"),
        (".user .copy", "Write  code"),
    ):
        tab.page.click(button)
        tab.page.wait_for_selector(f"{button}:text('Copied')")
        assert tab.page.evaluate("navigator.clipboard.readText()") == wanted
    denied = "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
    tab.page.evaluate(denied)  # as where the page came over plain HTTP
    tab.page.fill("#input", "")
    tab.page.click(".code .copy")
    tab.page.focus("#input")
    tab.page.keyboard.press("Control+v")
    assert tab.page.input_value("#input") == "x = 1\ny = 2"


def test_a_message_is_edited(open_tab: Callable[..., Tab]) -> None:
    """What came after it goes; the next turn takes up the cache of the new one."""
    tab = open_tab()
    bodies: list[dict[str, Any]] = []
    tab.page.on(
        "request",
        lambda each: each.url.endswith("completions") and bodies.append(each.post_data_json),
    )
    first = "The harp of Ada Holt is in room 472 . Where is the harp of Ada Holt ?"
    for text in (first, "And the map ?"):
        tab.ask(text)
        tab.wait()
    edit = ".turn:first-child .user button:text('Edit')"
    tab.page.click(edit)
    assert tab.focused == "" and tab.page.input_value(".editor textarea") == first
    tab.page.fill(".editor textarea", "something else")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".turn").count() == 2 and len(bodies) == 2
    assert tab.page.locator(".user p").first.inner_text() == first
    tab.page.click(edit)
    changed = first.replace("472", "318")
    tab.page.fill(".editor textarea", changed)
    tab.page.click(".editor button:text('Send')")
    tab.wait()
    assert tab.page.locator(".turn").count() == tab.page.locator(".answer").count() == 1
    assert bodies[-1]["messages"] == [{"role": "user", "content": changed}]
    assert "318" in tab.text(".answer .text") and tab.text(".user p") == changed
    tab.ask("And now ?")
    tab.wait()
    assert int(tab.text("#cached")) > 20
    assert bodies[-1]["messages"][0]["content"] == changed


def test_reasoning_is_folded(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.ask("Where is the harp ?")
    tab.wait()
    assert not tab.page.is_visible(".thought")
    streams(
        tab,
        {"reasoning_content": "A <b>plan</b>,\n"},
        {"reasoning_content": "then"},
        {"content": "**so**"},
    )
    tab.ask("Think")
    tab.wait()
    assert tab.text(".thought summary").startswith("Thought for ")
    thought = tab.page.locator(".thought > div").last
    assert not thought.is_visible() and tab.text(".answer .text") == "so"
    tab.page.locator(".thought summary").last.click()
    assert thought.inner_text() == "A <b>plan</b>,\nthen"
    bodies: list[dict[str, Any]] = []
    tab.page.on("request", lambda each: each.post_data and bodies.append(each.post_data_json))
    tab.ask("On")
    tab.wait()
    assert bodies[0]["messages"][-2] == {"role": "assistant", "content": "**so**"}


def test_which_token_is_held_where(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.page.click("#view-tokens")
    assert tab.text("#survival-told") == "Nothing is held yet"
    assert not tab.page.is_visible("#plot") and not tab.page.is_visible("#survival")
    tab.ask()
    tab.wait()
    tab.page.wait_for_selector("#survival:visible")
    found = tab.page.evaluate("survival.found")
    assert found["tokens"] == tab.seen and found["width"] == 1
    means = [sum(row) / 100 for row in found["layers"]]
    assert means == pytest.approx(tab.kept, abs=0.51)
    document = tab.text(".user p")
    assert document in " ".join(tab.page.text_content("#survival-text").split())
    tab.page.hover("#survival", position={"x": 1, "y": 1})
    assert tab.text("#survival-told") == f"Layer 11, token 0: {found['layers'][11][0]} % held"
    pixels = """() => { const it = document.querySelector("#survival");
      const all = it.getContext("2d").getImageData(0, 0, it.width, it.height).data;
      const at = (x, y) => [...all.slice(4 * (y * it.width + x)).slice(0, 4)].join();
      return [at(it.width - 4, 4), at(it.width >> 1, it.height - 4)]; }"""
    tab.page.mouse.move(0, 0)
    kept, dropped = tab.page.evaluate(pixels)  # the newest token on top; the middle at the bottom
    assert found["layers"][11][-1] == 100 and found["layers"][0][tab.seen // 2] == 0
    assert kept != dropped
    tab.page.focus("#survival")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        tab.page.keyboard.press(key)
    assert tab.text("#survival-told").startswith("Layer 1, token 1: ")
    assert tab.page.locator("#survival-text .on").inner_text().strip() == found["text"][1].strip()
    tab.page.click("#view-layers")
    assert tab.page.is_visible("#plot")
    tab.page.click("#new")
    tab.page.click("#view-tokens")
    assert tab.text("#survival-told") == "Nothing is held yet"


def test_no_cache_is_told(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(errors=True)
    streams(tab, {"content": "An answer that this server never gave"})
    tab.page.click("#view-tokens")
    tab.ask("A question that it never heard")
    tab.wait()
    tab.page.wait_for_selector("#survival-told:text('The server holds no cache of this text.')")


@pytest.mark.parametrize("text", [None, "Where is the harp ?"])
def test_nothing_is_cut_off(text: str | None, open_tab: Callable[..., Tab]) -> None:
    """All of the panel is seen at 800 px, whatever it shows."""
    tab = open_tab()
    over = "[document.querySelector('aside')].map((it) => it.scrollHeight - it.clientHeight)[0]"
    assert tab.page.evaluate(over) <= 0
    tab.ask(text)
    tab.wait()
    assert tab.page.is_visible("#why") == (text is not None)
    for view in ("tokens", "layers"):
        tab.page.click(f"#view-{view}")
        if view == "tokens":
            tab.page.wait_for_selector("#survival:visible")
        assert tab.page.evaluate(over) <= 0, view


def test_a_phone_shows_the_conversation(open_tab: Callable[..., Tab]) -> None:
    """No panel opens by itself, the header can be read, and a note tells why nothing was cut."""
    tab = open_tab(size=(390, 844), has_touch=True, is_mobile=True)
    whole = """[...document.querySelectorAll("#model, h1, #new")].every((each) =>
      each.scrollWidth <= each.clientWidth + 1 && each.scrollHeight <= each.clientHeight + 1)"""
    assert "context 4,096" in tab.text("#model") and tab.page.evaluate(whole)
    tab.page.evaluate("$('max-tokens').value = 3")
    tab.ask("Where is the harp ?")
    tab.wait()
    assert not tab.page.is_visible("#plot") and not tab.page.is_visible("#policy")
    note = tab.text(".note")
    assert "KV 100 % of full" in note and "Nothing is cut: pyramid cuts texts" in note
    tab.page.tap("#show-cache")
    tab.page.tap("#view-tokens")
    tab.page.wait_for_selector("#survival:visible")
