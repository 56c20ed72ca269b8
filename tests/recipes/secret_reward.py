"""A reward that is given secrets, for test_secrets.py; named as module:function."""

import os


def strict(text, problem, *, api_key, other):
    """Scores if the secrets came through, and no other one did."""
    assert "SAMEBIT_SECRET" not in os.environ
    assert api_key.startswith("sk-named")
    assert other.startswith("from-the-environment")
    return float(len(text))
