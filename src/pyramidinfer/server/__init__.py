"""The OpenAI API on top of the engine."""
