"""The report of a version as files of the project, which git ignores: `twinloop report` writes them again.

reports/<model>-<version>.html, .md
"""

from __future__ import annotations

from pathlib import Path

from twinloop.common.files import write_whole
from twinloop.report.kept import Figures
from twinloop.report.pages import html_page, model_card
from twinloop.report.story import Story

REPORTS = "reports"


def write_report(project: Path, story: Story, figures: Figures) -> list[Path]:
    """The page and the model card of a version, in this order."""
    folder = project / REPORTS
    folder.mkdir(exist_ok=True)
    name = f"{story.model}-{story.version}"
    pages = {folder / f"{name}.html": html_page(story, figures), folder / f"{name}.md": model_card(story)}
    for path, text in pages.items():
        write_whole(path, text.encode())
    return list(pages)
