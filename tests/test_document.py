"""Reports: the Markdown and the page of one structure hold the same, and the page is safe to open."""

import html
import re

from semantic_aug.evaluation.document import (
    Cell,
    Report,
    Table,
    code,
    items,
    link,
    subset_links,
    write,
)

NASTY = '<b>fox</b> & "jay" | 1'


def report(folder):
    rows = [
        ["real-only", Cell("51.00 ± 1.41", "95 % interval: 38.29 to 63.71"), ""],
        [NASTY, "52.00", Cell("**+1.00 [0.50, 1.50]**", NASTY)],
    ]
    blocks = [
        f"*Percent* of `{NASTY}`, 3 * 4 * 5.",
        "![scores](report.png)",
        Table(["method", "top1", "top1 - real-only"], rows),
        "## Runs",
        items(
            [link("a run", folder / "a run #1", folder), *subset_links([folder / "seen", folder / "unseen"], folder)]
        ),
        code("python x.py < y"),
    ]
    return Report(f"Comparison on {NASTY}", blocks)


def texts(page: str, tag: str) -> list[str]:
    """The texts of a page's elements, without what is shown on hover."""
    page = re.sub(r'<span role="tooltip".*?</span>', "", page)
    result = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", text)).strip() for text in result]


def test_markdown_and_page_hold_the_same(tmp_path):
    for name in ("a run #1", "seen/gallery", "unseen"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "seen/gallery/index.html").touch()
    write(report(tmp_path), tmp_path / "report.md")
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [[cell.replace("\\|", "|") for cell in re.split(r" (?<!\\)\| ", line[2:-2])] for line in lines]
    assert [[text.strip("*") for text in row] for row in cells] == [
        texts(row, "t[hd]") for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)
    ]
    assert texts(page, "h1") == [f"Comparison on {NASTY}"] and texts(page, "h2") == ["Runs"]
    assert texts(page, "p") == [f"Percent of {NASTY}, 3 * 4 * 5."] and texts(page, "em") == ["Percent"]
    assert texts(page, "code") == [NASTY, "python x.py < y"] and "<b>" not in page
    paths = re.findall(r'<a href="([^"]+)"', page)
    assert paths == ["a%20run%20%231/", "seen/", "seen/gallery/index.html", "unseen/"]
    assert all(f"]({path})" in markdown for path in paths)
    described = re.findall(r'aria-describedby="([^"]+)"', page)
    tips = dict(re.findall(r'role="tooltip" id="([^"]+)">(.*?)</span>', page))
    assert [html.unescape(tips[name]) for name in described] == ["95 % interval: 38.29 to 63.71", NASTY]
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
