"""What a cache holds of its rows, as tensors of their own: for a fork into another cache, and for a file that other ranks read."""
