"""A picture of the server's page: the example document with its question and answer.

``python -m pyramidinfer.lab.screenshot --url http://127.0.0.1:8000 --out docs/images/page.png``

Needs Python's ``playwright`` and an installed Chromium; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path

__all__ = ["FLAGS", "SEEDED", "find_chromium", "missing", "take"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: Options for a browser in a container that connects to the page's server only.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

#: Run before the page's own script: the same example document every time.
SEEDED = """(() => { let seed = 7; Math.random = () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0; return seed / 4294967296; }; })()"""


def find_chromium() -> str | None:
    """Path of the browser, or None if it is not on the search path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def missing() -> str | None:
    """The missing program and how to install it, in one line; None if nothing is missing."""
    if importlib.util.find_spec("playwright") is None:
        return "Python's playwright is not installed: pip install playwright"
    if find_chromium() is None:
        return "there is no Chromium on the search path: apt install chromium, or the like"
    return None


def take(url: str, out: Path, *, width: int = 1280, height: int = 800) -> None:
    """Send the example document to the server at ``url``; write a picture of the answer to ``out``.

    ``RuntimeError`` if playwright, Chromium or the server is missing, or no answer came.
    """
    if reason := missing():
        raise RuntimeError(reason)
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="light",
                reduced_motion="reduce",
            )
            page.add_init_script(SEEDED)
            page.goto(url)
            page.click("#example")
            page.press("#input", "Enter")
            page.wait_for_selector(".answer:not(.busy)", timeout=60_000)
            if trouble := page.query_selector(".trouble p"):
                raise RuntimeError(f"no answer came: {trouble.inner_text()}")
            page.mouse.move(0, 0)
            out.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=out)
        except Error as error:
            raise RuntimeError(f"{url}: {error.message.splitlines()[0]}") from error
        finally:
            browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pyramidinfer.lab.screenshot", description="A picture of the server's page."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("docs/images/page.png"))
    arguments = parser.parse_args()
    try:
        take(arguments.url, arguments.out)
    except RuntimeError as error:
        parser.error(str(error))
    print(arguments.out)


if __name__ == "__main__":
    main()
