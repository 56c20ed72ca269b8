"""Generalized advantage estimation over the tokens that a policy has drawn.

Source: Schulman et al. 2016, arXiv 1506.02438. Tokens that it has not drawn, such as a tool's text
between two turns, are bridged: the state after a drawn token is the one before the next drawn
token. Pure functions in fp64.
"""

import numpy as np


def advantage_estimates(
    rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
    """[tokens trained on] fp64: the sum over k of (gamma lam)^k times delta at k tokens further on.

    rewards and values have the same shape; a value is that of the state before its token is drawn,
    delta = reward + gamma * the next value - value, and a sample ends with a value of 0.
    """
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    found, advantage = np.empty(len(deltas)), 0.0
    for t in range(len(deltas) - 1, -1, -1):
        advantage = deltas[t] + gamma * lam * advantage
        found[t] = advantage
    return found
