"""The forward pass of the Llama family, on a checkpoint's own parameter names."""
