"""Which prompts a run with rollout.partial_tokens=2 trains on when, from their samples' lengths."""

PROMPTS, SAMPLES = 3, 2


def stints_of(samples):
    """How many each prompt needs, of whose samples these are all."""
    lens = [len(sample.token_ids) for sample in samples]
    return [-(-max(lens[i : i + SAMPLES]) // 2) for i in range(0, len(lens), SAMPLES)]


def places_of(samples):
    """Places of the samples' prompts in the training order."""
    ids = [sample.sample_id for sample in samples[::SAMPLES]]
    return [PROMPTS * (i >> 32) + (i >> 12 & 7) for i in ids]


def schedule(needed, steps, dropped=()):
    """Of prompts that need so many stints: which each step trains on, and its stints; those at
    some places are never trained on."""
    begun, trained, found = 0, set(), ([], [])
    for _ in range(steps):
        while True:
            begun += 1
            done = [
                place
                for place in range(PROMPTS * begun)
                if place not in trained
                and place // PROMPTS + needed[place] <= begun
                and place not in dropped
            ]
            if len(done) >= PROMPTS:
                break
        found[0].append(done[:PROMPTS])
        found[1].append(begun - sum(found[1]))
        trained |= {*done[:PROMPTS]}
    return found
