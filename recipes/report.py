"""`samebit report RUN...`: runs beside each other, in one page that needs nothing else."""

from pathlib import Path

from samebit.recipes.run.metrics import OWNER_ONLY
from samebit.recipes.run.pages import MARK, open_runs, page, page_data, title_of
from samebit.recipes.tools_config import ReportRun
from samebit.weight_sync.disk import write_atomically


def main(run: ReportRun) -> int:
    """Run the command `samebit report`; prints the page's path.

    Raises FileExistsError for a file at `out` that is no such page.
    """
    runs, out = open_runs(run.runs, "runs"), Path(run.out)
    if out.exists() and not _is_page(out):
        raise FileExistsError(f"out is {out}, which is there and is no page of samebit report's")
    write_atomically(out, page(title_of(runs), page_data(runs)), OWNER_ONLY)
    print(out)
    return 0


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(200)
