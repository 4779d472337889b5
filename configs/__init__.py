"""Configs of the data sets; `get_config(variant)` of each module returns its settings."""
