"""Pictures for people: titled grids of images."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 4
TITLE_HEIGHT = 18
INK, PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One image of a grid, PIL RGB, with a caption under it and a coloured frame where wanted."""

    image: Image.Image
    caption: str = ""
    frame: tuple[int, int, int] | None = None


def _fitted(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def grid(
    rows: Sequence[Sequence[Cell | None]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    size: int | None = None,
    title: str = "",
) -> Image.Image:
    """Images in rows and columns on white.

    Args:
        rows: cells; None leaves a gap. Rows may differ in length.
        size: side of a cell in pixels (None: the first image's width).
    """
    first = next(cell for row in rows for cell in row if cell is not None)
    size = size or first.image.width
    font, title_font = ImageFont.load_default(12), ImageFont.load_default(14)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = min(260, int(max(probe.textlength(t, font) for t in row_titles)) + 2 * GAP) if row_titles else GAP
    captions = any(cell is not None and cell.caption for row in rows for cell in row)
    height = size + (TITLE_HEIGHT if captions else 0) + GAP
    top = GAP + (TITLE_HEIGHT + GAP if title else 0) + (TITLE_HEIGHT if column_titles else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (size + GAP), top + len(rows) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((GAP, GAP), _fitted(draw, title, title_font, sheet.width - 2 * GAP), INK, title_font)
    for x, text in enumerate(column_titles):
        draw.text((left + x * (size + GAP), top - TITLE_HEIGHT), _fitted(draw, text, font, size), INK, font)
    for y, row in enumerate(rows):
        if y < len(row_titles):
            text = _fitted(draw, row_titles[y], font, left - 2 * GAP)
            draw.text((GAP, top + y * height + size // 2 - 8), text, INK, font)
        for x, cell in enumerate(row):
            if cell is None:
                continue
            corner = (left + x * (size + GAP), top + y * height)
            sheet.paste(cell.image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), corner)
            if cell.frame:
                draw.rectangle(
                    (*corner, corner[0] + size - 1, corner[1] + size - 1), outline=cell.frame, width=max(2, size // 40)
                )
            if cell.caption:
                draw.text((corner[0], corner[1] + size), _fitted(draw, cell.caption, font, size), INK, font)
    return sheet
