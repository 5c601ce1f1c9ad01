"""Tables as text (CSV, TSV): their encoding, their separator, their header, and the line a record stands on.

UTF-8 is read, with or without a byte-order mark, and UTF-16 or UTF-32 with one. Text in another encoding is refused by
its line: guessed wrongly, it would give wrong class names. Commas, semicolons, tabs and bars separate cells; the header
tells which.
"""

import codecs
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from semantic_aug.errors import UserError

SEPARATORS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FILES = (
    (b"PK\x03\x04", "an Excel workbook or an archive: export it as CSV, or unpack it"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook: export it as CSV"),
    (b"\x1f\x8b", "compressed: unpack it"),
    (b"PAR1", "a parquet file: give it the ending .parquet"),
)


@dataclass(frozen=True)
class TextTable:
    """A table as text, of which the header has been read.

    Attributes:
        encoding: Python's name.
        columns: names in the header, without spaces around them.
        skipped: lines up to and with the header.
    """

    path: Path
    encoding: str
    separator: str
    columns: tuple[str, ...]
    skipped: int

    def column(self, *names: str) -> int | None:
        """The first column of one of these names, in any letter case; None without one. Raises UserError: two columns have the
        name."""
        folded = [column.casefold() for column in self.columns]
        for name in names:
            if folded.count(name) > 1:
                raise UserError(f"{self.path} has two columns named '{name}': rename one")
            if name in folded:
                return folded.index(name)
        return None

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """The line each record ends on, and its cells; empty lines are passed over. Raises UserError: a line that is not text
        in the encoding, or a record with more or fewer cells than the header."""
        with _open(self.path, self.encoding) as lines:
            for _ in range(self.skipped):
                lines.readline()
            reader, line = _reader(lines, self.separator, strict=True), self.skipped
            try:
                for cells in reader:
                    line = self.skipped + reader.line_num
                    if not "".join(cells).strip():
                        continue
                    if len(cells) != len(self.columns):
                        raise UserError(
                            f"{self.path} line {line}: expected {len(self.columns)} columns, got {len(cells)}: a cell with "
                            f"'{self.separator}' in it stands in double quotes"
                        )
                    yield line, cells
            except UnicodeDecodeError:
                raise not_text(self.path, self.encoding) from None
            except csv.Error as error:
                raise UserError(f"{self.path} line {line + 1}: {error}: correct its double quotes") from None


def read_header(path: Path, wanted: Sequence[str] = ()) -> TextTable:
    """The encoding, separator and columns of a table; the separator is known by the names of ``wanted`` columns, in lower
    case. Raises UserError: no text, or not in a known encoding."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give yourself permission to") from None
    for start, what in _OTHER_FILES:
        if head.startswith(start):
            raise UserError(f"{path} is {what}")
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        raise UserError(f"{path} is no text, or UTF-16 without a byte-order mark: save it as UTF-8")
    header, declared, skipped = "", "", 0
    try:
        with _open(path, encoding) as lines:
            for line in iter(lines.readline, ""):
                skipped += 1
                content = line.strip("\r\n ").casefold()
                if content.startswith("sep=") and len(content) == 5:  # Excel's own first line
                    declared = content[4:]
                elif content.strip():
                    header = line
                    break
    except UnicodeError:
        raise not_text(path, encoding) from None
    best: tuple[str, ...] = ()
    separator = ","
    for candidate in (declared or SEPARATORS) if header else ():
        names = tuple(name.strip() for name in next(_reader(iter([header]), candidate), []))
        fits = [sum(word in map(str.casefold, cells) for word in wanted) for cells in (names, best)]
        if (fits[0], len(names)) > (fits[1], len(best)):
            best, separator = names, candidate
    return TextTable(path, encoding, separator, best, skipped)


def not_text(path: Path, encoding: str) -> UserError:
    """The error for a file that is not text in its encoding; names the first line at fault."""
    name = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
    line = 1
    with open(path, "rb") as file:
        for content in file if name == "UTF-8" else ():
            try:
                content.decode()
            except UnicodeDecodeError as error:
                return UserError(
                    f"{path} line {line}: byte 0x{content[error.start]:02x} is not {name} text: save the list as UTF-8 "
                    "(iconv -f WINDOWS-1252 -t UTF-8, if it comes from Windows)"
                )
            line += 1
    return UserError(f"{path} is not {name} text, as its first bytes say: save it as UTF-8")


def _open(path: Path, encoding: str) -> TextIO:
    return open(path, encoding=encoding, newline="")


def _reader(lines: Iterator[str] | TextIO, separator: str, strict: bool = False):
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # captions of any size; the library's own limit is 128 KiB
    return csv.reader(lines, delimiter=separator, strict=strict)
