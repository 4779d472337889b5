"""Support code without any knowledge of metric learning."""
