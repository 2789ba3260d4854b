"""docs/reference/modes.md, from the rows that tests/adapters/test_modes.py runs."""

from tests.adapters.modes import ROWS

from .tables import MADE, table

SERVED = sum(row.refused is None for row in ROWS)
HEAD = f"""# Modes of torch

{MADE}
Forwards through an attached model, each beside plain transformers: {SERVED} modes are served, with the same logits and gradients, and
{len(ROWS) - SERVED} are refused by an `UnsupportedError`. `bash launch/test.sh --long` runs all of them; the short form leaves the
compilers out.

A cache outlives a forward, so everything it keeps is made outside of inference mode, whichever mode attach, forwards, `reset` and `detach`
run in.

"""
TAIL = """
## Gradients

Backward is right for queries, keys and values of the forward, for the weights that expand a latent, and for sinks: raw pages give what
plain transformers give when the cached tokens were run under `no_grad`. With codes, or with a router, it is the derivative of what was
computed.

While a graph is recorded a layer keeps a copy of the entries that were read, as `DynamicCache` does; backward holds the scores of one layer
at a time. Forwards without a graph pay nothing.

What can't be right is refused when backward is called, so that a forward whose graph nobody uses is served:

| refused | instead |
|---|---|
| cached tokens whose own forward recorded a graph | run it under `no_grad`, or crop, or give all tokens in one forward |
| one token that reads its own entry in codes | two tokens or more, or a raw window (`raw_recent_tokens`) |
| the first token of a request with codec `svd` | two tokens or more |
| entries on several ranks | one rank; a single forward of several tokens is right on any number |
| Megatron's inference contexts | train without a context |
| second derivatives | - |
"""


def written() -> str:
    cells = [(row.mode, "served" if row.refused is None else "refused", row.note) for row in ROWS]
    return HEAD + table(("mode", "", "note or alternative"), cells) + TAIL
