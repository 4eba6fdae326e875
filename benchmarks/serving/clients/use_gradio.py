"""Gradio's chat page (``gr.load_chat``), driven by its own client."""

from __future__ import annotations

import gradio as gr
from common import GREETING, expect, main
from gradio_client import Client


def page(url: str, model: str) -> str:
    """One turn of the page, which streams it."""
    chat = gr.load_chat(url, model=model, token="none", file_types=None, api_name="chat")
    _, local, _ = chat.launch(prevent_thread_lock=True, quiet=True, share=False)
    try:
        job = Client(local, verbose=False).submit(GREETING, api_name="/chat")
        said = expect(job.result(timeout=600))
        parts = len(job.outputs())
        assert parts > 1, f"{parts} parts"
        return f"{parts} parts; {said}"
    finally:
        chat.close()


if __name__ == "__main__":
    main("gradio", {"chat page": page})
