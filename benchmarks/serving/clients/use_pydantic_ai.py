"""Pydantic AI, over chat completions and over the Responses API."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from common import GREETING, PERSON, QUESTION, SHORT, Calls, Check, expect, main
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, UsageLimitExceeded, UsageLimits
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS: dict[str, Any] = {"max_tokens": SHORT, "temperature": 0.0}


class Person(BaseModel):
    name: str
    age: int


def checks_over(kind: type[OpenAIChatModel | OpenAIResponsesModel]) -> dict[str, Check]:
    def agent_at(url: str, model: str, **options: Any) -> Agent[None, Any]:
        provider = OpenAIProvider(base_url=url, api_key="none")
        return Agent(kind(model, provider=provider), model_settings=SETTINGS, **options)

    def tools(url: str, model: str) -> str:
        """The output is a tool too, so every step requires a call; a small model may never make
        that one, so that the loop ends at its limit."""
        calls = Calls()
        agent = agent_at(url, model, tools=[calls.add], output_type=Person)
        with suppress(UsageLimitExceeded):
            asyncio.run(agent.run(QUESTION, usage_limits=UsageLimits(request_limit=2)))
        return calls.words()

    def tool_output(url: str, model: str) -> str:
        result = asyncio.run(agent_at(url, model, output_type=Person).run(PERSON))
        assert isinstance(result.output, Person)
        return repr(result.output)

    def streaming(url: str, model: str) -> str:
        async def run() -> tuple[list[str], str]:
            async with agent_at(url, model).run_stream(GREETING) as result:
                parts = [part async for part in result.stream_text(delta=True, debounce_by=None)]
                return parts, await result.get_output()

        parts, whole = asyncio.run(run())
        assert len(parts) > 1 and "".join(parts) == whole
        return f"{len(parts)} parts; {expect(whole)}"

    def structured(url: str, model: str) -> str:
        agent = agent_at(url, model, output_type=NativeOutput(Person))
        result = asyncio.run(agent.run(PERSON))
        assert isinstance(result.output, Person)
        return repr(result.output)

    def turns(url: str, model: str) -> str:
        agent = agent_at(url, model)

        async def run() -> str:
            first = await agent.run(GREETING)
            history = first.all_messages()
            return (await agent.run("And once more?", message_history=history)).output

        return expect(asyncio.run(run()))

    return {
        "tool loop": tools,
        "output as a tool": tool_output,
        "streaming": streaming,
        "structured output": structured,
        "next turn": turns,
    }


if __name__ == "__main__":
    named = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}
    main(
        "pydantic-ai-slim",
        {
            f"{name}, {api}": check
            for api, kind in named.items()
            for name, check in checks_over(kind).items()
        },
    )
