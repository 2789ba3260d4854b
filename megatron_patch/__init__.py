"""Megatron-Core integration. It holds nothing yet: `enable_pikv` arrives with the Megatron work. Importing it patches nothing."""
