"""What is drawn, where it is merged, and what it scores."""
