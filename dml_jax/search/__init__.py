"""Search in an index of embeddings, from the terminal or on a local page."""
