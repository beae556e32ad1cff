"""Docstrings are written to be read in an editor; this makes Markdown of them.

A line `name: meaning` or `name, other: meaning` becomes an item of a list, also below a line like
"Arguments, by their official names:", and `::` at the end of a paragraph announces code.
"""

import re

import griffe

# What the parser itself makes lists of.
_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Attributes):")
_ITEM = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)((?: \([^)]*\))?): +(\S.*)")


def to_markdown(text: str) -> str:
    """The docstring `text`, without its common indentation, as Markdown."""
    lines: list[str] = []
    inside_item = inside_group = False
    for line in text.splitlines():
        if line.startswith("    ") and inside_group:
            line = line[4:]
        elif line.strip():
            inside_group = re.fullmatch(r"[A-Z].*[^:]:", line) is not None
        item = None if _SECTION.match(line) else _ITEM.fullmatch(line)
        if item:
            if lines and lines[-1].strip() and not inside_item:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            line = f"- {names}{item[2]}: {item[3]}"
        inside_item = bool(item) or (inside_item and line.startswith(" "))
        inside_group = inside_group and not _SECTION.fullmatch(line)
        if line.endswith("::"):
            line = line[:-1] if line[:-2].strip() else ""
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
