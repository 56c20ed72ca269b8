"""SuffixAutomaton: all that stands in several texts, and what came behind it last.

A state stands for some of the strings in the texts, those that end in the same places; its longest
one has `lengths[state]` tokens, and the state behind its link the longest suffix that ends in more
places. A text that goes on costs a few operations a token, amortised, however long the texts are.
Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text".
"""

from collections.abc import Iterable

SHORTEST = 3  # tokens of a match that says something of what is to come
_HOPS = 8  # suffixes, from the longest on, that learn of a newer place


class SuffixAutomaton:
    """States by number; 0 is the empty text's. Texts may begin behind the state of another one.

    Deviation: of a text that repeats itself more than _HOPS times over, the shortest suffixes are
    not told of their newest place: an older one stands for them.
    """

    def __init__(self) -> None:
        self._lengths, self._links, self._places = [0], [-1], [-1]
        self._nexts: list[dict[int, int]] = [{}]

    def read(self, state: int, token_ids: Iterable[int], place: int) -> int:
        """The state of a text of this state and further tokens, the first of which stands at
        `place`, from 0 on, the next one at place + 1. A place is the newest one where the text's
        longest suffixes are gone on with."""
        lengths, links, nexts, places = self._lengths, self._links, self._nexts, self._places
        for token_id in token_ids:
            suffix, left = state, _HOPS
            while left and lengths[suffix] >= SHORTEST:
                places[suffix] = place
                suffix = links[suffix]
                left -= 1
            place += 1
            known = nexts[state].get(token_id)
            if known is None:
                state = self._append(state, token_id)
            elif lengths[known] == lengths[state] + 1:
                state = known
            else:
                state = self._split(state, token_id, known)
        return state

    def longest(self, state: int) -> tuple[int, int]:
        """(length, place) of the longest suffix of a state's text behind which something stands,
        and of what stands there, in the newest place; (0, -1) for none of SHORTEST tokens."""
        lengths, links, places = self._lengths, self._links, self._places
        while lengths[state] >= SHORTEST:
            if places[state] >= 0:
                return lengths[state], places[state]
            state = links[state]
        return 0, -1

    def _append(self, state: int, token_id: int) -> int:
        """A new state for the text of this state and a token that has never followed it."""
        lengths, links, nexts = self._lengths, self._links, self._nexts
        new = len(lengths)
        lengths.append(lengths[state] + 1)
        self._places.append(-1)
        nexts.append({})
        links.append(0)
        while state >= 0:
            known = nexts[state].setdefault(token_id, new)
            if known != new:
                same = lengths[known] == lengths[state] + 1
                links[new] = known if same else self._split(state, token_id, known)
                break
            state = links[state]
        return new

    def _split(self, state: int, token_id: int, whole: int) -> int:
        """A new state for what `whole` has of the strings of `state` with this token, and shorter
        ones: they end in more places than its longest does."""
        part, links, nexts = len(self._lengths), self._links, self._nexts
        self._lengths.append(self._lengths[state] + 1)
        self._places.append(self._places[whole])
        links.append(links[whole])
        nexts.append(nexts[whole].copy())
        links[whole] = part
        while state >= 0 and nexts[state].get(token_id) == whole:
            nexts[state][token_id] = part
            state = links[state]
        return part
