"""The OpenAI API in front of the engine."""
