"""The small trained model that comes with the package, and prompts that measure recall. Sources: PROVENANCE.md."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from pikv_ds.bundled.recall import sentence_ends

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HERE = Path(__file__).resolve().parent
_FACT = " The pass key is {v}. Remember it. {v} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


def model_path() -> Path:
    """Folder of the checkpoint: Qwen3-MoE format, 4 layers, 8 experts, 3.25 million parameters."""
    return _HERE / "model"


def trained_path(part: str = "kv_gate") -> Path:
    """File of a part that was trained for the bundled model. Raises: FileNotFoundError for one that does not come with the package."""
    file = _HERE / f"{part}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"no trained {part!r} comes with the package, only {', '.join(p.stem for p in _HERE.glob('*.safetensors'))}"
        )
    return file


def haystack() -> str:
    """About 40 kB of English prose that the model was not trained on."""
    return (_HERE / "haystack.txt").read_text(encoding="utf-8")


def evaluation_text() -> str:
    """300 kB of English prose that the model was not trained on, about 100,000 of its tokens; `haystack` is its beginning."""
    return (_HERE / "wikitext2_test.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """160 kB of English prose that the model was not trained on, and of which nothing is in `evaluation_text`."""
    return (_HERE / "wikitext2_valid.txt").read_text(encoding="utf-8")


def load(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode on the CPU, and its tokenizer; dtype None means float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, depth: float = 0.5) -> tuple[list[int], str]:
    """A prompt of exactly `length` tokens that hides a five-digit pass key in prose and asks for it at the end.

    Args:
        length: tokens of the whole prompt.
        seed: chooses the pass key and the place where the prose begins.
        depth: where the key stands, 0 = at the beginning, 1 = right before the question (rounded to a sentence end).

    Returns:
        The token ids, and the pass key as the model should continue: its decoded text, stripped, starts with it.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth}: legal is 0 to 1, a fraction of the prompt")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    rng = random.Random(seed)
    key = "".join(rng.choice("0123456789") for _ in range(5))
    fact, question, prose = encode(_FACT.format(v=key)), encode(_QUESTION), encode(haystack())
    room = length - len(fact) - len(question)
    if not 0 < room <= len(prose):
        shortest = len(fact) + len(question) + 1
        raise ValueError(f"length = {length}: legal is {shortest} to {shortest - 1 + len(prose)} tokens")
    start = rng.randrange(len(prose) - room + 1)
    filler = prose[start : start + room]
    at = min([0, *sentence_ends(tokenizer, filler), len(filler)], key=lambda end: abs(end - depth * room))
    return filler[:at] + fact + filler[at:] + question, key
