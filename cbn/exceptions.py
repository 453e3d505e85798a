"""The errors and warnings of cbn that are no built-in ones."""

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
