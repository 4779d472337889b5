"""Embeds the images of a run, saves the embeddings and scores them by retrieval."""
