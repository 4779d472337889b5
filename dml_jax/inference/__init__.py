"""Use of a trained network: embedding images, searching, export and model card."""
