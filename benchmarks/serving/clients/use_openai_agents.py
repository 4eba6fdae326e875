"""OpenAI's agents SDK, over the Responses API (its default) and over chat completions."""

from __future__ import annotations

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import GREETING, PERSON, QUESTION, SHORT, Calls, Check, expect, main
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

set_tracing_disabled(True)


class Person(BaseModel):
    name: str
    age: int


def checks_over(kind: type[OpenAIResponsesModel | OpenAIChatCompletionsModel]) -> dict[str, Check]:
    def model_at(url: str, model: str) -> OpenAIResponsesModel | OpenAIChatCompletionsModel:
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        return kind(model=model, openai_client=client)

    def tools(url: str, model: str) -> str:
        calls = Calls()
        agent = Agent(
            name="adder",
            instructions="You add numbers with the tool.",
            model=model_at(url, model),
            tools=[function_tool(calls.add)],
            model_settings=ModelSettings(tool_choice="required", max_tokens=SHORT, temperature=0),
        )
        result = asyncio.run(Runner.run(agent, QUESTION, max_turns=10))
        return f"{calls.words()}; {expect(result.final_output)}"

    def streaming(url: str, model: str) -> str:
        settings = ModelSettings(max_tokens=SHORT, temperature=0)
        agent = Agent(name="greeter", model=model_at(url, model), model_settings=settings)

        async def run() -> tuple[list[str], str]:
            result = Runner.run_streamed(agent, GREETING)
            parts = [
                each.data.delta
                async for each in result.stream_events()
                if each.type == "raw_response_event"
                and isinstance(each.data, ResponseTextDeltaEvent)
            ]
            return parts, result.final_output

        parts, whole = asyncio.run(run())
        assert len(parts) > 1 and "".join(parts) == whole
        return f"{len(parts)} parts; {expect(whole)}"

    def structured(url: str, model: str) -> str:
        settings = ModelSettings(max_tokens=SHORT, temperature=0)
        agent = Agent(
            name="reader",
            model=model_at(url, model),
            output_type=Person,
            model_settings=settings,
        )
        result = asyncio.run(Runner.run(agent, PERSON))
        return repr(result.final_output_as(Person, raise_if_incorrect_type=True))

    def turns(url: str, model: str) -> str:
        settings = ModelSettings(max_tokens=SHORT, temperature=0)
        agent = Agent(name="greeter", model=model_at(url, model), model_settings=settings)

        async def run() -> str:
            first = await Runner.run(agent, GREETING)
            history = [*first.to_input_list(), {"role": "user", "content": "And once more?"}]
            return (await Runner.run(agent, history)).final_output

        return expect(asyncio.run(run()))

    return {
        "tool loop": tools,
        "streaming": streaming,
        "structured output": structured,
        "next turn": turns,
    }


if __name__ == "__main__":
    named = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
    main(
        "openai-agents",
        {
            f"{name}, {api}": check
            for api, kind in named.items()
            for name, check in checks_over(kind).items()
        },
    )
