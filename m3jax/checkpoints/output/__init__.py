"""What a merge writes: a folder that appears when it is complete."""
