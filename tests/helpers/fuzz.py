"""Hypothesis strategies for damaged files."""

from hypothesis import strategies as st

CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 2), st.binary(max_size=8)), max_size=6
)
"""Lists of changes (position, operation, bytes); see `apply_changes`."""


def apply_changes(content, changes):
    """Returns the content with bytes inserted, overwritten or removed at some positions."""
    for position, operation, new in changes:
        start = position % (len(content) + 1)
        removed = (0, len(new), position % 97)[operation]
        content = content[:start] + new + content[start + removed :]
    return content


def damaged(content):
    """Returns a strategy for damaged versions of a file's content, or arbitrary bytes."""
    changed = CHANGES.map(lambda changes: apply_changes(content, changes))
    return st.one_of(changed, st.binary(max_size=64))
