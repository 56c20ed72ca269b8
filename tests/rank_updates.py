"""What a rank does to the draft of its engine."""

import torch

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
