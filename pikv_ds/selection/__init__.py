"""The "routing" block at work: which pages a query reads."""
