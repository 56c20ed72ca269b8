"""The reward of the golden runs, which its worker processes import."""


def score(text, problem):
    """Even digits and right ones count, length costs: a random model gets rewards of many sizes."""
    right = sum(a == b for a, b in zip(text, problem.label, strict=False))
    return right + 0.5 * sum(c in "02468" for c in text) - 0.1 * len(text)
