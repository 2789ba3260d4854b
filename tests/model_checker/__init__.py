"""A model checker for the cache: drawn lives of caches on 1 to 4 simulated ranks against the loop reference, step by step."""
