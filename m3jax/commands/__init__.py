"""One module per command: flags, messages and progress; no arithmetic."""
