"""The documents: those that are generated, the rules for their text, and that what they name is there."""
