"""The report stage: results.json for programs, report.html for people.

Both are made anew from the run's files, whatever exists of them; what does not is named on the page. Charts are
inline SVG and the page is one file that asks nothing of the network.
"""

from typing import TYPE_CHECKING, Any

from distill.files import write_atomic, write_json_atomic
from distill.recipe import Recipe

if TYPE_CHECKING:
    from distill.runfolder import RunFolder


def run(recipe: Recipe, run: "RunFolder") -> dict[str, Any]:
    """Write results.json and report.html. Raises UserError naming file and line if one of the run's files is broken."""
    from distill import results
    from distill.report.page import render

    found = results.build(recipe, run.folder, run.manifest.data)
    page = render(recipe, run.folder, found)
    write_json_atomic(run.path("results.json"), found)
    write_atomic(run.path("report.html"), page)
    return {"tokens": 0, "page_bytes": len(page), "missing": len(found["missing"])}
