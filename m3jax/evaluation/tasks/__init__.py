"""Tasks: what is asked, of which data, and how an answer is marked."""
