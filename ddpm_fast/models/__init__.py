"""The shipped models. How each was trained is in docs/models.md and in the file's metadata."""
