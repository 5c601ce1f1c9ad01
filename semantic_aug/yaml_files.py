"""YAML files that people edit: read with every name as it is written, and extended without losing a comment.

YAML takes ``yes``, ``on``, ``12:30``, ``2024``, ``007`` and ``1e3`` for truth values and numbers. As names of data sets, keys
and classes they are text here, exactly as written. An empty value, ``~`` or ``null`` is "not set" (None); quoted, it is text.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path

NULLS = ("", "~", "null", "Null", "NULL")
_PLAIN = re.compile(r"([A-Za-z_./]|[0-9]+[g-np-wyzG-NP-WYZ])[\w./+-]*", re.ASCII)
_WORDS = re.compile(r"y|n|yes|no|on|off|true|false|null|\.nan|\.inf|[._]*", re.IGNORECASE)
_NUMBERS = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"true|True|TRUE"), lambda _: True),
    (re.compile(r"false|False|FALSE"), lambda _: False),
)
_MERGE = "<<"


def read_text(path: Path) -> str | None:
    """The text of a YAML file without a byte-order mark, or None where there is no such file.

    Raises:
        UserError: not UTF-8, not a file, or not readable.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}): save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a YAML file") from None


def parse(text: str, path: Path, typed: bool = False) -> dict[str, Any]:
    """The mapping that a YAML text holds; an empty text is an empty mapping.

    Args:
        text: of the file.
        path: of the file, for errors.
        typed: plain scalars that are numbers or ``true`` and ``false`` become such values; names stay text.

    Raises:
        UserError: damaged, not a mapping, or a name written twice in one mapping; names the file and the line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        node = YAML(pure=True).compose(text)
        content = None if node is None else _Values(path, typed).of(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem or error.context}): correct the file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a file of settings: correct the file") from None
    except (YAMLError, ValueError) as error:  # a character that YAML forbids, for one
        position = getattr(error, "position", None)
        line = "" if position is None else f", line {text.count(chr(10), 0, position) + 1}"
        reason = getattr(error, "reason", None) or str(error)
        raise UserError(f"{path}{line}: not valid YAML ({reason}): correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {kind_of(content)}, expected a mapping of names: correct the file")
    return content


def read(path: Path, typed: bool = False) -> dict[str, Any]:
    """The mapping of a YAML file; an absent or empty file is an empty one. See :func:`parse`."""
    text = read_text(path)
    return parse(text, path, typed) if text else {}


def kind_of(value: Any) -> str:
    """What a value read from YAML is, for errors."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"'{value}'"


def as_read(value: Any) -> Any:
    """A value to be written as it will be read: all text, or None."""
    if isinstance(value, Mapping):
        return {str(key): as_read(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_read(item) for item in value]
    return None if value is None else str(value)


class _Values:
    """Values of the nodes of one file; aliases share theirs."""

    def __init__(self, path: Path, typed: bool):
        self.path, self.typed = path, typed
        self.made: dict[int, Any] = {}
        self.open: set[int] = set()

    def of(self, node: Any) -> Any:
        from ruamel.yaml.nodes import MappingNode, ScalarNode

        if isinstance(node, ScalarNode):
            return self._scalar(node)
        if id(node) in self.open:
            raise UserError(
                f"{self.path}, line {node.start_mark.line + 1}: an alias that contains itself: correct the file"
            )
        if id(node) not in self.made:
            self.open.add(id(node))
            mapping = isinstance(node, MappingNode)
            self.made[id(node)] = self._mapping(node) if mapping else [self.of(item) for item in node.value]
            self.open.remove(id(node))
        return self.made[id(node)]

    def _scalar(self, node: Any) -> Any:
        if node.style is not None:  # quoted, or a block of text
            return node.value
        if node.value in NULLS:
            return None
        for pattern, convert in _NUMBERS if self.typed else ():
            if pattern.fullmatch(node.value):
                return convert(node.value)
        return node.value

    def _mapping(self, node: Any) -> dict[str, Any]:
        from ruamel.yaml.nodes import ScalarNode

        out, lines, merged = {}, {}, {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise UserError(
                    f"{self.path}, line {line}: a list or mapping as a name, expected text: correct the file"
                )
            if key.style is None and key.value == _MERGE:
                for part in _as_list(self.of(value)):
                    merged = {**(part if isinstance(part, dict) else {}), **merged}
                continue
            if key.value in lines:
                raise UserError(
                    f"{self.path}: '{key.value}' is written twice, in line {lines[key.value]} and in line {line}: join the two"
                )
            lines[key.value] = line
            out[key.value] = self.of(value)
        return {**merged, **out}


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------------------------------- writing


def to_text(block: Mapping) -> str:
    """A block of YAML that reads back as it is, here and with every YAML library."""
    out = io.StringIO()
    _round_trip().dump(_quoted(block), out)
    return out.getvalue()


def extended(text: str, path: Path, section: str, key: str, entry: Any) -> str:
    """A YAML text with one entry more; comments, order and the spelling of everything else stay.

    Args:
        text: of the file; may be empty.
        path: of the file, for errors.
        section: mapping at the top level, made where absent or empty.
        key: name in the section; must not exist yet.
        entry: text, or a mapping or list of texts; None for "not set".

    Raises:
        UserError: the text cannot be extended so that it reads back as it should.
    """
    from ruamel.yaml.comments import CommentedMap

    wanted = parse(text, path)
    wanted[section] = {**(wanted.get(section) or {}), key: as_read(entry)}
    yaml = _round_trip()
    content, header = yaml.load(text), ""
    if content is None:  # only comments, or nothing: the section is written below them
        header = text if not text or text.endswith("\n") else text + "\n"
        content = CommentedMap()
    if content.get(section) is None:
        content[section if section in content else _quoted(section)] = CommentedMap()
    content[section][_quoted(key)] = _quoted(entry)
    out = io.StringIO(header)
    out.seek(0, io.SEEK_END)
    yaml.dump(content, out)
    if parse(out.getvalue(), path) != wanted:
        raise UserError(
            f"{path} cannot be extended without changing other entries: add {section}/{key} by hand ({to_text({key: entry})})"
        )
    return out.getvalue()


def write(path: Path, text: str) -> None:
    """Replaces a YAML file whole or not at all; a link stays a link, line endings and permissions stay."""
    path = path.resolve()
    old = path.read_bytes() if path.exists() else b""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\r\n" if b"\r\n" in old else "\n")
        if old:
            shutil.copymode(path, temporary)


def _round_trip() -> Any:
    """ruamel's loader and dumper that keep comments, and take every scalar but an empty one for text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import ScalarNode
    from ruamel.yaml.resolver import VersionedResolver

    class TextResolver(VersionedResolver):
        def resolve(self, kind: type, value: Any, implicit: Any) -> Any:
            if kind is ScalarNode and implicit[0] and value not in ("", _MERGE):
                return super().resolve(kind, "text", implicit)
            return super().resolve(kind, value, implicit)

    yaml = YAML()
    yaml.Resolver = TextResolver
    yaml.preserve_quotes, yaml.width, yaml.allow_unicode = True, 4096, True
    return yaml


def _quoted(value: Any) -> Any:
    """Texts that some YAML reader would take for something else in quotes; nothing set as ``null``."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString, SingleQuotedScalarString

    if isinstance(value, Mapping):
        return {_quoted(str(k)): _quoted(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_quoted(v) for v in value]
    if value is None:
        return "null"  # as text that is not quoted
    text = str(value)
    if not text.isprintable():  # with escapes
        return DoubleQuotedScalarString(text)
    return text if _PLAIN.fullmatch(text) and not _WORDS.fullmatch(text) else SingleQuotedScalarString(text)
