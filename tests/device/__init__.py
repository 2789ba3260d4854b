"""What a step does to a device: a device that any machine has, and how often the host stops for it."""
