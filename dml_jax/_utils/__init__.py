"""Utilities that do not depend on metric learning."""
