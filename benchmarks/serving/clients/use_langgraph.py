"""LangGraph's loop of a model and tools, with LangChain's client of chat completions."""

from __future__ import annotations

from typing import Any

from common import GREETING, PERSON, QUESTION, SHORT, Calls, expect, main
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def chat_at(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=url,
        api_key="none",
        max_completion_tokens=SHORT,
        temperature=0,
        max_retries=0,
        timeout=600,
    )


def tools(url: str, model: str) -> str:
    calls = Calls()
    chat = chat_at(url, model)
    first = chat.bind_tools([calls.add], tool_choice="required")
    then = chat.bind_tools([calls.add], tool_choice="none")

    def answer(state: MessagesState) -> dict[str, Any]:
        told = state["messages"][-1].type == "tool"
        return {"messages": [(then if told else first).invoke(state["messages"])]}

    def way(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    graph = StateGraph(MessagesState)
    graph.add_node("model", answer)
    graph.add_node("tools", ToolNode([calls.add]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", way)
    graph.add_edge("tools", "model")
    result = graph.compile().invoke({"messages": [("user", QUESTION)]})
    return f"{calls.words()}; {expect(result['messages'][-1].content)}"


def streamed_calls(url: str, model: str) -> str:
    calls = Calls()
    chat = chat_at(url, model).bind_tools([calls.add], tool_choice="required")
    whole: Any = None
    parts = 0
    for part in chat.stream(QUESTION):
        whole, parts = part if whole is None else whole + part, parts + 1
    assert whole.tool_calls and parts > 1
    for call in whole.tool_calls:
        calls.add(**call["args"])
    return f"{parts} parts; {calls.words()}"


def streaming(url: str, model: str) -> str:
    parts = [part.content for part in chat_at(url, model).stream(GREETING) if part.content]
    assert len(parts) > 1
    return f"{len(parts)} parts; {expect(''.join(parts))}"


def structured(url: str, model: str) -> str:
    found = []
    for method in ("json_schema", "function_calling", "json_mode"):
        schema = Person if method != "json_mode" else None
        reader = chat_at(url, model).with_structured_output(schema, method=method)
        found.append(reader.invoke(f"{PERSON} Answer in JSON."))
    assert isinstance(found[0], Person) and isinstance(found[1], Person)
    assert isinstance(found[2], dict)
    return repr(found)


if __name__ == "__main__":
    main(
        "langgraph",
        {
            "tool loop": tools,
            "streamed calls": streamed_calls,
            "streaming": streaming,
            "structured output": structured,
        },
    )
