"""From the source digest of a result to the commits that have it, and back.

python tests/programs/source_digest.py            # this tree: digest, commit, changed files
python tests/programs/source_digest.py COMMIT     # the digest of a commit
python tests/programs/source_digest.py DIGEST     # the commits that have it
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from samebit.recipes.run.provenance import (
    ROOT,
    committed_files,
    head,
    program_files,
    run_git,
    source,
    source_digest,
)


def commits_of(digest: str, root: Path) -> list[str]:
    """Return the commits in the history at `root` whose program has this digest, newest first."""
    commits = run_git(root, "rev-list", "--all", "HEAD").decode().split()
    return [c for c in commits if source_digest(committed_files(c, root)) == digest]


def main(asked: str | None = None, *, root: Path = ROOT) -> int:
    """Print what the tree at `root` is, a commit's digest, or the commits of a digest."""
    if asked is None:
        print(json.dumps(source(root, program_files(root)), indent=1))
        return 0
    if head(root) is None:
        print(f"{root} holds no history to look for '{asked}' in", file=sys.stderr)
        return 1
    if re.fullmatch("[0-9a-f]{64}", asked):
        found = commits_of(asked, root)
        print("\n".join(found) or f"no commit has the source digest {asked}")
        return 0 if found else 1
    try:
        print(source_digest(committed_files(asked, root)))
    except subprocess.CalledProcessError as error:
        print(f"'{asked}' is no commit: {error.stderr.decode().strip()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
