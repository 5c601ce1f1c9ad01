"""A report as one structure, written as Markdown and as a page that a browser opens from disk; so the two cannot differ.

A block is a table or Markdown text: a paragraph, a heading (``## ``), a list (lines of ``- ``), a picture
(``![text](file)``) or code (between lines of three backticks). Within texts there are `` `code` ``, ``**strong**``,
``*emphasis*`` and ``[text](path)``. The page adds the details of cells (an interval, the values behind a mean), shown on
hover and on focus. It runs no script and loads only the charts beside it.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from semantic_aug import files, registry
from semantic_aug.console import markdown_table

PAGE_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("document.html.j2")
_INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*|\*([^*\s](?:[^*]*[^*\s])?)\*|(!?)\[([^\[\]]+)\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with a detail that the page shows on hover and on focus."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: headings.
        rows: of texts or :class:`Cell`, as many as columns.
        texts: how many of the first columns hold texts; the others hold numbers, and are set to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: int = 1

    @property
    def cells(self) -> list[list[Cell]]:
        """All rows as cells."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """As Markdown, without the details."""
        return markdown_table(self.columns, [[cell.text for cell in row] for row in self.cells], self.texts)


Block = str | Table


@dataclass(frozen=True)
class Report:
    """A title and what follows it."""

    title: str
    blocks: Sequence[Block]

    def markdown(self) -> str:
        """The report as Markdown."""
        blocks = [block if isinstance(block, str) else block.markdown() for block in self.blocks]
        return "\n\n".join([f"# {self.title}", *blocks]) + "\n"

    def page(self) -> str:
        """The report as HTML."""
        return render(TEMPLATE, title=self.title, blocks=self.blocks)


def items(texts: Iterable[str]) -> str:
    """A list of texts as a block."""
    return "\n".join(f"- {text}" for text in texts)


def code(text: str, language: str = "bash") -> str:
    """Commands or settings as a block."""
    return f"```{language}\n{text.rstrip()}\n```"


def render(template: Path, **values: Any) -> str:
    """A page or a Markdown text from its Jinja template; in pages the values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(template.parent)
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=".html" in template.name, **options)
    environment.filters["inline"] = inline
    return environment.get_template(template.name).render(**values)


def inline(text: str):
    """A text's Markdown as HTML, everything else escaped."""
    from markupsafe import Markup, escape

    def element(match: re.Match) -> str:
        code, strong, emphasis, picture, label, path = match.groups()
        if code:
            return f"<code>{code}</code>"
        if strong:
            return f"<strong>{_INLINE.sub(element, strong)}</strong>"
        if emphasis:
            return f"<em>{_INLINE.sub(element, emphasis)}</em>"
        if picture:
            return f'<img src="{path}" alt="{label}">'
        return f'<a href="{path}">{_INLINE.sub(element, label)}</a>'

    return Markup(_INLINE.sub(element, str(escape(text))))


def link(text: str, path: Path, base: Path) -> str:
    """A text that leads to a file or folder, relative to the report's folder."""
    return f"[{text}]({quote(os.path.relpath(path, base).replace(os.sep, '/'))}{'/' if path.is_dir() else ''})"


def gallery_of(subset: Path) -> Path:
    """The page of a subset's gallery, where reports look for it."""
    return subset / "gallery" / "index.html"


def subset_links(folders: Iterable[Path], base: Path) -> list[str]:
    """A link to each subset's folder, and to its gallery where the folder holds one."""
    texts = []
    for folder in folders:
        gallery = f" ({link('gallery', gallery_of(folder), base)})" if gallery_of(folder).is_file() else ""
        texts.append(link(folder.name, folder, base) + gallery)
    return texts


def gallery_hint(flags: Mapping[str, Any], subset: Path) -> list[Block]:
    """The command that makes a subset's gallery where reports link it.

    Args:
        flags: that choose the data set and its setting; those without a value are left out, True is a switch.
        subset: its folder, a ``#variant`` included.
    """
    name = registry.shown_path(subset)
    flags = {**flags, "syndata_dir": name, "output_dir": f"{registry.part_variant(name)[0]}/gallery"}
    given = {f"--{flag}": value for flag, value in flags.items() if value is not None}
    arguments = [str(part) for flag, value in given.items() for part in ([flag] if value is True else [flag, value])]
    text = "A gallery is linked here once it exists in the folder of its subset and the report is written again. To make one:"
    return [text, code(f"python -m semantic_aug.evaluation gallery {shlex.join(arguments)}")]


def write(report: Report, file: Path) -> None:
    """Writes a report's Markdown to ``file``, and its page as ``report.html`` beside it."""
    files.write_text(file, report.markdown())
    files.write_text(file.with_name(PAGE_FILE), report.page())
