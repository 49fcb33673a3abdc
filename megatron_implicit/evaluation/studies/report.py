"""One page of all studies: Markdown beside its images, and HTML with the images inside."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

from megatron_implicit.evaluation.studies.study import StudyResult, Table

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #15181c); color: light-dark(#1b1f24, #e6e9ec); }
h1, h2 { line-height: 1.25; } h2 { margin-top: 3rem; }
.claim { color: light-dark(#57606a, #9aa4ae); } .finding { font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.92rem; }
caption { text-align: left; font-weight: 600; padding: 0.4rem 0; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid light-dark(#d8dee4, #343a41); text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.2rem 0; } figcaption { font-size: 0.9rem; color: light-dark(#57606a, #9aa4ae); }
img { max-width: 100%; background: #fff; border-radius: 4px; }
"""


@dataclass(frozen=True)
class Chapter:
    """A study as the report shows it."""

    name: str
    title: str
    claim: str
    result: Optional[StudyResult]
    """None where it has not been run."""
    seconds: float


def write_report(root: Path, title: str, chapters: Sequence[Chapter]) -> list[Path]:
    """Writes report.md and report.html into the folder of all studies and returns their paths."""
    paths = [root / "report.md", root / "report.html"]
    paths[0].write_text(_markdown(title, chapters), encoding="utf-8")
    paths[1].write_text(_html(root, title, chapters), encoding="utf-8")
    return paths


def _markdown(title: str, chapters: Sequence[Chapter]) -> str:
    parts = [f"# {title}"]
    for chapter in chapters:
        parts += [f"## {chapter.title}", f"*{chapter.claim}*"]
        if chapter.result is None:
            parts.append(f"Not run: `python tools/evaluate.py {chapter.name}`")
            continue
        parts += [f"**{chapter.result.finding}** ({_duration(chapter.seconds)})"]
        parts += [_markdown_table(table) for table in chapter.result.tables]
        parts += [f"![{f.caption}]({chapter.name}/{f.file})\n\n{f.caption}" for f in chapter.result.figures]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.rows]
    return f"{table.title}\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _html(root: Path, title: str, chapters: Sequence[Chapter]) -> str:
    body = "\n".join(_html_chapter(root, chapter) for chapter in chapters)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def _html_chapter(root: Path, chapter: Chapter) -> str:
    parts = [
        f'<section id="{chapter.name}"><h2>{html.escape(chapter.title)}</h2>',
        f'<p class="claim">{html.escape(chapter.claim)}</p>',
    ]
    if chapter.result is None:
        parts.append(f"<p>Not run: <code>python tools/evaluate.py {chapter.name}</code></p>")
    else:
        parts.append(f'<p class="finding">{html.escape(chapter.result.finding)}</p>')
        parts.append(f'<p class="claim">{_duration(chapter.seconds)}</p>')
        parts += [_html_table(table) for table in chapter.result.tables]
        for figure in chapter.result.figures:
            image = base64.b64encode((root / chapter.name / figure.file).read_bytes()).decode()
            caption = html.escape(figure.caption)
            shown = f'<img alt="{caption}" src="data:image/png;base64,{image}">'
            parts.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return "".join(parts) + "</section>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f'<div class="wide"><table><caption>{html.escape(table.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} s"
