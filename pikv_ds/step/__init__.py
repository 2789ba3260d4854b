"""One forward: what a rank brings, what all ranks agree on, what passes between the parts of a step."""
