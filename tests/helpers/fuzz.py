"""Damage to files: what hypothesis puts in, puts over or cuts away."""

from hypothesis import strategies as st

CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 2), st.binary(max_size=8)), max_size=6
)


def changed(content, changes):
    """Bytes with some put in, put over others, or cut away at places."""
    for place, how, what in changes:
        at = place % (len(content) + 1)
        skip = (0, len(what), place % 97)[how]
        content = content[:at] + what + content[at + skip :]
    return content


def damaged(whole):
    """The content of a file after changes, or something else altogether."""
    return st.one_of(CHANGES.map(lambda changes: changed(whole, changes)), st.binary(max_size=64))
