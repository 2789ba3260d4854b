"""The page record: layouts, the formats that kernels know, bounds in one byte. What is refused."""
