"""A tokenizer for the tiny models: 128 tokens, letters and pairs of letters."""

from functools import cache
from itertools import product
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")


@cache
def letters(size: int = 128, first: int = 0) -> PreTrainedTokenizerFast:
    """size: how many tokens; first: the letter that pairs begin with."""
    pairs = list(product(ascii_lowercase[first : first + 12], repeat=2))[: size - len(SPECIAL) - len(ascii_lowercase)]
    words = [*SPECIAL, *ascii_lowercase, *("".join(pair) for pair in pairs)]
    model = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    model.decoder = decoders.Fuse()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left")
