"""Blueprints, and the table of what combines."""
