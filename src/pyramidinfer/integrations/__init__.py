"""The engine inside other tools; each module has its own requirements."""
