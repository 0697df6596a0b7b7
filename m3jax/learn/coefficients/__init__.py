"""What is learned: coefficients, their groups and bounds, and how to replay them."""
