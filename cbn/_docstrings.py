"""Docstrings in numpydoc's form, of which each says once what several would say."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import cleandoc
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])

# In numpydoc's order.
SECTIONS = (
    "Parameters", "Attributes", "Returns", "Raises", "Warns", "Notes", "References", "Examples",
)  # fmt: skip
HEADING = re.compile(rf"\n\n({'|'.join(SECTIONS)})\n-+\n")
ENTRY = re.compile(r"\n(?=\S)")


def documented_by(*sources: Callable[..., Any]) -> Callable[[Documented], Documented]:
    """Take from other docstrings what that of a function or a class leaves out.

    That is the entries of its arguments, which then stand in the order of the signature, whole
    sections other than the examples and, of a class, what follows the summary where nothing does.
    Where several sources have it, the first counts.
    """

    def document(target: Documented) -> Documented:
        if not target.__doc__:  # python -OO has none
            return target
        lead, sections, entries = _parsed(target)
        own = tuple(entries)  # one that is not in the signature stays, for all to see
        for source in sources:
            other_lead, other_sections, other_entries = _parsed(source)
            if isinstance(target, type) and "\n" not in lead:
                lead += other_lead[len(other_lead.partition("\n")[0]) :]
            other_sections.pop("Examples", None)
            sections, entries = other_sections | sections, other_entries | entries
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        code = function.__code__
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        # An entry of several arguments stands where the first of them does.
        used = dict.fromkeys(entries[name] for name in (*arguments, *own) if name in entries)
        sections["Parameters"] = "\n".join(used)
        target.__doc__ = lead + "".join(
            f"\n\n{title}\n{'-' * len(title)}\n{sections[title]}"
            for title in SECTIONS
            if title in sections
        )
        return target

    return document


def _parsed(source: Callable[..., Any]) -> tuple[str, dict[str, str], dict[str, str]]:
    """The lead of a docstring, its sections by title, and the entries of its arguments."""
    lead, *parts = HEADING.split(cleandoc(source.__doc__ or ""))
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    entries = {
        name: entry
        for entry in filter(None, ENTRY.split(sections.get("Parameters", "")))
        for name in entry.partition(" : ")[0].partition("\n")[0].split(", ")
    }
    return lead, sections, entries
