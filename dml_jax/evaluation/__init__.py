"""Embedding the images of a run and scoring them."""
