"""Tests on real models, which ``make models`` fetches: ``make test-real``."""
