"""Studies: equal searches for every method, then many seeds and statistics."""
