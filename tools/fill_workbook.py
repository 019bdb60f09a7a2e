"""Fill workbook/ with copies of the notebooks for a learner to work on: the same, without the answers.

    python tools/fill_workbook.py      # make lab, which then opens the map of the course there

nbgrader takes the answers out, as it does for a class. A copy that is already there belongs to the learner and is
never overwritten; to get a fresh one, move the old one away.
"""

import argparse
import shutil
from pathlib import Path

import nbformat
from nbgrader.preprocessors import ClearSolutions

import course

WORKBOOK = course.ROOT / "workbook"


def fill(sources: Path, workbook: Path) -> tuple[list[str], list[str]]:
    """Copy notebooks and pages that are not there yet.

    Returns:
        The names of those that were copied, and of those that were left as they are.
    """
    workbook.mkdir(exist_ok=True)
    copied: list[str] = []
    kept: list[str] = []
    for source in sorted([*sources.glob("*.ipynb"), *sources.glob("*.md")]):
        target = workbook / source.name
        if target.exists():
            kept.append(source.name)
            continue
        if source.suffix == ".ipynb":
            notebook, _ = ClearSolutions().preprocess(nbformat.read(source, as_version=4), {})
            nbformat.write(notebook, target)
        else:
            shutil.copyfile(source, target)
        copied.append(source.name)
    return copied, kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    copied, kept = fill(course.NOTEBOOKS, WORKBOOK)
    print(f"workbook: {len(copied)} new, {len(kept)} that were there are left as they are; answers are in notebooks/")
