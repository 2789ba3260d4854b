"""The "scheduling" block at work: which pages stay."""
