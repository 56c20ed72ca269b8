"""Rewards that are given secrets, for test_secrets.py; named as module:function."""


def strict(text, problem, *, api_key, other):
    """Scores if the secrets came through."""
    assert api_key.startswith("sk-named")
    assert other.startswith("from-the-environment")
    return float(len(text))


def failing(text, problem, *, api_key, other):
    """Tells its secrets."""
    raise ValueError(f"wrong key {api_key}, {other}")
