"""Memory: pages of records, their tables, and what moves them. Knows the formats of codecs, not routers or policies."""
