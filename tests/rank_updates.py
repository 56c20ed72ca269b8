"""What a rank does to the draft of its engine, and what its self-check looks at."""

import os

import torch

from samebit.kernels import selfcheck
from samebit.kernels.cpu import linear
from samebit.rollout.engine import Engine
from samebit.weight_sync.types import WeightSyncError


def updated_draft(one, folder):
    """Versions of a draft: as loaded, of doubled shards, and loaded again after it had broken."""
    shards = {name: 2 * param for name, param in one.draft_control.params.items()}
    versions = [one.draft_version, one.copy_weights(shards, 3, selector="draft")]
    if one.ranks.rank == 1:
        shards["draft.fc.weight"].fill_(torch.inf)
    said = ""
    try:
        one.copy_weights(shards, 4, selector="draft")
    except WeightSyncError as error:
        said = str(error)
    versions.append(one.update_weights_from_disk(folder, 5, "draft"))
    return {"folder": folder, "said": said, "versions": [vars(version) for version in versions]}


def checked_shapes(folder, ranks, cache):
    """Weight shapes that an engine's self-check proves, told by what it does if all fail."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    selfcheck.linear_padded = lambda x, weight: linear.linear_padded(x, weight) + 1
    Engine(folder, device="cpu", ranks=ranks)
    return sorted(linear._blocked_shapes)
