"""The HTML report of finished runs, and tables that compare seeds."""
