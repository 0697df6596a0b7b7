"""One search by several processes."""
