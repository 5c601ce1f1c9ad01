"""YAML files that people edit: read with every name as it is written, and extended without losing a comment.

YAML takes ``yes``, ``on``, ``12:30``, ``2024``, ``007`` and ``1e3`` for truth values and numbers. As names of data sets, keys
and classes they are text here, exactly as written. An empty value, ``~`` or ``null`` is "not set" (None); quoted, it is text.
"""

import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from semantic_aug.errors import UserError
from semantic_aug.files import atomic_path

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_PLAIN = re.compile(r"([A-Za-z_./]|[0-9]+[g-np-wyzG-NP-WYZ])[\w./+-]*", re.ASCII)
_KEYWORDS = re.compile(r"y|n|yes|no|on|off|true|false|null|\.nan|\.inf|[._]*", re.IGNORECASE)


def read_text(path: Path) -> str | None:
    """The text of a YAML file without a byte-order mark, or None where there is no such file. Raises UserError: not UTF-8, not
    a file, or not readable."""
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


def parse(text: str, path: Path) -> dict[str, Any]:
    """The mapping that a YAML text holds; an empty text is an empty mapping.

    Raises:
        UserError: damaged, not a mapping, or a name written twice in one mapping; names the file and the line.
    """
    try:
        loader = _TextLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        content = None if node is None else loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem or error.context}): correct the file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a file of settings: correct the file") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids, for one
        position = getattr(error, "position", None)
        line = "" if position is None else f", line {text.count(chr(10), 0, position) + 1}"
        reason = getattr(error, "reason", None) or str(error)
        raise UserError(f"{path}{line}: not valid YAML ({reason}): correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {kind_of(content)}, expected a mapping of names: correct the file")
    return content


def read(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; an absent or empty file is an empty one. See :func:`parse`."""
    text = read_text(path)
    return parse(text, path) if text else {}


def kind_of(value: Any) -> str:
    """A description of a value read from YAML, for errors."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"'{value}'"


def as_list(value: Any) -> list:
    """A list as it is, anything else as the only entry of one."""
    return value if isinstance(value, list) else [value]


def as_read(value: Any) -> Any:
    """A value to be written as it will be read: all text, or None."""
    if isinstance(value, Mapping):
        return {str(key): as_read(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_read(item) for item in value]
    return None if value is None else str(value)


class _TextLoader(yaml.SafeLoader):
    """Takes every scalar for text but plain nulls, and every name for text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"{self.name}, line {line}: a list or mapping as a name, expected text: correct the file"
                )
            if key.value in lines and key.tag != _MERGE:
                raise UserError(
                    f"{self.name}: '{key.value}' is written twice, in line {lines[key.value]} and in line {line}: join the two"
                )
            lines[key.value] = line
        self.flatten_mapping(node)  # merged mappings come first
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


# ------------------------------------------------------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some YAML reader would take for something else."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and not _KEYWORDS.fullmatch(text)
    style = None if plain else "'" if text.isprintable() else '"'  # with escapes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text_node)


def to_text(block: Mapping, flow: bool = False) -> str:
    """A block of YAML that reads back as it is, here and with every YAML library; ``flow`` writes it in braces."""
    options = {"default_flow_style": flow, "sort_keys": False, "allow_unicode": True, "width": float("inf")}
    return yaml.dump(as_read(block), Dumper=_Dumper, **options)


def extended(text: str, path: Path, section: str, key: str, entry: Any) -> str:
    """A YAML text with one entry more; comments, order and the spelling of everything else stay.

    Args:
        text: of the file; may be empty.
        section: mapping at the top level, made where absent or empty.
        key: name in the section; must not exist yet.
        entry: text, or a mapping or list of texts; None for "not set".

    Raises:
        UserError: the text cannot be extended so that it reads back as it should.
    """
    wanted = parse(text, path)
    wanted[section] = {**(wanted.get(section) or {}), key: as_read(entry)}
    text = text if not text or text.endswith("\n") else text + "\n"
    root = yaml.compose(text, yaml.SafeLoader)
    values = {name.value: value for name, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    value = values.get(section)
    if value is None and values and root.flow_style:
        extension = _inserted(text, root, {section: {key: entry}})
    elif value is None:  # below the comments at the end
        column = root.start_mark.column if values else 0
        extension = text + textwrap.indent(to_text({section: {key: entry}}), column * " ")
    elif isinstance(value, yaml.MappingNode):
        extension = _inserted(text, value, {key: entry})
    else:  # an empty section
        start, end = value.start_mark.index, value.end_mark.index
        column = root.value[0][0].start_mark.column + 2
        line_end = text.index("\n", end) + 1
        block = textwrap.indent(to_text({key: entry}), column * " ")
        extension = text[:start] + text[end:line_end] + block + text[line_end:]
    try:
        complete = parse(extension, path) == wanted
    except UserError:
        complete = False
    if not complete:
        line = to_text({key: entry}, flow=True).strip()[1:-1]  # an error is one line
        raise UserError(
            f"{path} cannot be extended without changing other entries: add to its section {section} by hand: {line}"
        )
    return extension


def _inserted(text: str, mapping: yaml.MappingNode, block: Mapping) -> str:
    """A text with further entries at the end of one of its mappings."""
    if mapping.flow_style:
        end = mapping.end_mark.index - 1  # the closing brace
        return text[:end] + (", " if mapping.value else "") + to_text(block, flow=True).strip()[1:-1] + text[end:]
    last = mapping.value[-1][1]
    while isinstance(last, yaml.CollectionNode) and not last.flow_style:  # its own end lies behind comments
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    end = last.end_mark.index
    end = end if text[end - 1] == "\n" else text.index("\n", end) + 1
    return text[:end] + textwrap.indent(to_text(block), mapping.start_mark.column * " ") + text[end:]


def write(path: Path, text: str) -> None:
    """Replaces a YAML file whole or not at all; a link stays a link, line endings and permissions stay."""
    path = path.resolve()
    old = path.read_bytes() if path.exists() else b""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\r\n" if b"\r\n" in old else "\n")
        if old:
            shutil.copymode(path, temporary)
