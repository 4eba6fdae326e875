"""smolagents: its loop requires a call in every step, and ends with the call of a last one."""

from __future__ import annotations

from common import GREETING, QUESTION, SHORT, Calls, expect, main
from smolagents import OpenAIModel, ToolCallingAgent, tool


def model_at(url: str, model: str) -> OpenAIModel:
    return OpenAIModel(
        model_id=model, api_base=url, api_key="none", max_tokens=SHORT, temperature=0.0
    )


def tools(url: str, model: str) -> str:
    """The model may choose between ``add`` and the call that ends the loop; two steps at most."""
    calls = Calls()

    @tool
    def add(a: int, b: int) -> int:
        """Add two whole numbers.

        Args:
            a: the first number
            b: the second number
        """
        return calls.add(a, b)

    agent = ToolCallingAgent(
        tools=[add], model=model_at(url, model), max_steps=2, verbosity_level=0
    )
    answer = agent.run(QUESTION)
    steps = [each for each in agent.memory.steps if getattr(each, "tool_calls", None)]
    made = [call.name for each in steps for call in each.tool_calls]
    assert made and set(made) <= {"add", "final_answer"}, made
    return f"{', '.join(made)}; {expect(str(answer))}"


def streaming(url: str, model: str) -> str:
    agent = ToolCallingAgent(
        tools=[], model=model_at(url, model), max_steps=2, verbosity_level=0, stream_outputs=True
    )
    events = list(agent.run(GREETING, stream=True))
    kinds = [type(each).__name__ for each in events]
    assert kinds.count("ChatMessageStreamDelta") > 1 and kinds[-1] == "FinalAnswerStep", kinds
    return f"{len(events)} events; {expect(str(events[-1].output))}"


if __name__ == "__main__":
    main("smolagents", {"tool loop": tools, "streaming": streaming})
