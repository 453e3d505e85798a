"""The errors and warnings of cbn that are no built-in ones, and how it warns."""

from __future__ import annotations

import sys
import warnings

__all__ = ["SmallBatchWarning", "StateFileError"]


class StateFileError(ValueError):
    """A state file is damaged, foreign, or of another class or model; the message says which."""


class SmallBatchWarning(UserWarning):
    """A layer was called in training on fewer than 4 values per channel; given once per layer.

    For an instance norm, per channel of a sample. Statistics of so few values are mostly noise, in
    the output and in the running statistics. The warning comes before anything is computed: where
    a filter makes it an error, the call changes nothing, and so it is at every such call. Python's
    own filter shows warnings with equal text from one line once, so that of several layers called
    by one line, as in a loop, one may speak for all.
    """


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn the line that called cbn, however many frames above it is."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
