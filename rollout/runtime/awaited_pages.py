"""AwaitedPages: pages of prompts that running samples are computing, for which others can wait.

A page is found in the prefix cache once the results of its step are in. Samples of one prompt that
are asked for one by one arrive together, so each would compute it for itself. Instead a later
arrival waits for the next page that an earlier one will have, as long as it has that page too: it
computes less, and its decode reads the shared pages once for all.
"""

from samebit.rollout.runtime.running_sample import RunningSample


class AwaitedPages:
    """Of each running sample the next page that the prefix cache will get from it."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._keys: dict[RunningSample, int] = {}
        self._owners: dict[int, RunningSample] = {}

    def begin(self, seq: RunningSample) -> None:
        """A sample computes its context from here on, behind the pages that it has found."""
        self._await(seq, seq.num_computed)

    def found(self, seq: RunningSample, num_tokens: int) -> None:
        """The prefix cache has the full pages of a sample's first tokens."""
        if seq in self._keys:
            self.end(seq)
            self._await(seq, num_tokens)

    def end(self, seq: RunningSample) -> None:
        """Nobody is to wait for this sample."""
        key = self._keys.pop(seq, None)
        if key is not None and self._owners.get(key) is seq:
            del self._owners[key]

    def has_to_wait(self, seq: RunningSample) -> bool:
        """Whether an earlier arrival computes a page that this sample would find."""
        if not self._owners:
            return False
        usable = (len(seq.token_ids) - 1) // self._page_size  # its last token is computed anyway
        owners = map(self._owners.get, self._page_keys(seq)[:usable])
        return any(owner is not None and owner.arrival < seq.arrival for owner in owners)

    def _await(self, seq: RunningSample, num_tokens: int) -> None:
        for key in self._page_keys(seq)[num_tokens // self._page_size :][:1]:
            self._keys[seq] = key
            owner = self._owners.setdefault(key, seq)
            if seq.arrival < owner.arrival:
                self._owners[key] = seq

    def _page_keys(self, seq: RunningSample) -> list[int]:
        """For each full page of a context a number that stands for all tokens up to its end.

        Two contexts may have one by chance; then one of them waits in vain.
        """
        keys, size = seq.page_keys, self._page_size
        for end in range((len(keys) + 1) * size, len(seq.token_ids) + 1, size):
            keys.append(hash((keys[-1] if keys else 0, *seq.token_ids[end - size : end])))
        return keys
