"""Collectives of a step: counted, bounded in time, with the byte layout of their buffers."""
