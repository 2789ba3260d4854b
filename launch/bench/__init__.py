"""What `pikv bench` times, and the targets it is held to."""
