"""The engine inside other tools; import the one you need, each has its own requirements."""
