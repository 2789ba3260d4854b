"""Which shard an entry belongs to, and which rank holds it."""
