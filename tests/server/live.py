"""What tests of the server stand on: a live one in a thread, and a look into its engine."""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue
from typing import Any, TypeVar

import httpx
import openai
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pyramidinfer import LLM
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.engine import Engine
from pyramidinfer.server.app import build_app
from pyramidinfer.server.run import Patient
from pyramidinfer.server.service import Service
from pyramidinfer.server.settings import ServerSettings
from tests.tiny import tiny_model

T = TypeVar("T")
#: What a prompt of the shipped model may be made of.
STORY = "The old baker walked to the market . The storm touched the bridge . "
#: The shipped model's name and its tokens that end a text.
MODEL, END = "demo-model", 3


@dataclass
class Live:
    """A server that answers at ``url``, and its engine."""

    url: str
    service: Service
    http: httpx.Client

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """A client that does not try again by itself."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            timeout=60.0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
            **options,
        )

    def complete(self, prompt: Any = STORY, **body: Any) -> httpx.Response:
        """``POST /v1/completions``; greedy and short unless told otherwise."""
        return self.http.post(
            "/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
        )

    def chat(self, *texts: str, **body: Any) -> httpx.Response:
        """``POST /v1/chat/completions`` with turns of user and assistant."""
        turns = [
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(texts)
        ]
        return self.http.post(
            "/v1/chat/completions",
            json={"messages": turns, "max_tokens": 4, "temperature": 0, **body},
        )

    @property
    def engine(self) -> Engine:
        return self.service.llm.engine

    def inside(self, look: Callable[[], T]) -> T:
        """What ``look`` finds in the engine's thread, between two steps."""
        found: Queue[T] = Queue()
        self.service.worker.tell(lambda: found.put(look()))
        return found.get(timeout=60)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the engine makes no step."""
        begun, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            go_on.wait(60)

        self.service.worker.tell(wait)
        assert begun.wait(60)
        try:
            yield
        finally:
            go_on.set()

    def settle(self) -> None:
        """Wait until nothing is asked for, let all conversations go, and miss no page."""
        until(lambda: self.service.worker.is_idle)

        def empty() -> tuple[int, int]:
            self.engine.conversations.clear()
            self.engine.check()
            return len(self.engine.pool.tables), self.engine.ledger.bytes

        assert self.inside(empty) == (0, 0)


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=60)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def post(line: socket.socket, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    line.sendall(head.encode() + content)


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def serving(
    llm: LLM, settles: bool = True, send_buffer: int = 0, **settings: Any
) -> Iterator[Live]:
    """A server in a thread, on a free port; afterwards nothing may be left in its engine (unless
    it does not ``settle``, for it was killed)."""
    app = build_app(llm, ServerSettings(**settings))
    config = uvicorn.Config(app, http=Patient, ws="none", log_level="warning", server_header=False)
    with socket.socket(proto=socket.IPPROTO_TCP) as line:  # asyncio sends at once then
        line.bind(("127.0.0.1", 0))
        if send_buffer:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            assert server.started
            url = f"http://127.0.0.1:{line.getsockname()[1]}"
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
                live = Live(url, app.state.service, http)
                yield live
                if settles:
                    live.settle()
        finally:
            server.should_exit = True
            thread.join()


def beside(llm: LLM, **options: Any) -> LLM:
    """The same model with an engine of its own."""
    other = copy.copy(llm)
    config = EngineConfig(**{"kv_memory": "16MiB", **options})
    other.engine = Engine(llm.engine.runner, llm.policy, config, llm.tokenizer)
    return other


SENTENCES = [
    'The name is "Ada" and the number is 12.',
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true, "none": null}',
    "A list of words, numbers 0123456789 and signs: {}[]()<>!?+-*/=_.,;",
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Any:
    """A byte-level BPE, which can write anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def tiny_llm(policy: str = "pyramid", keep: float | None = 0.5, **options: Any) -> LLM:
    """A random model that can write JSON, if it is made to."""
    tokenizer = byte_tokenizer()
    model = tiny_model(
        "llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=2048
    )
    return LLM(
        model,
        policy,
        keep=keep,
        tokenizer=tokenizer,
        **{"kv_memory": "8MiB", "page_size": 4, **options},
    )


def gather(*works: Any) -> list[Any]:
    """What coroutines give, all at once."""

    async def run() -> list[Any]:
        return list(await asyncio.gather(*works))

    return asyncio.run(run())
