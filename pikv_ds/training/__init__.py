"""Learned parts: what they are, what they learn from, the loop that trains them. No host and no cache; engines are given from outside."""
