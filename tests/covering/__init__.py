"""A pairwise covering array over the settings of the "pikv" block: every pair runs on a tiny cache, or is refused by the rule named."""
