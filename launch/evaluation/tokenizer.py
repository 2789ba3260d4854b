"""The tokenizer of a run: of the model's transformers folder, or one that was named beside a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pikv_ds.errors import ConfigError

_OPENED = ("tokenizer.json", "tokenizer_config.json", "config.json")


def tokenizer_path(given: str) -> Path:
    """The path of --tokenizer. Raises: FileNotFoundError; ConfigError for what transformers would not open, or would take for another."""
    path = Path(given).expanduser().resolve()
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {given!r}; --tokenizer is a folder of a transformers tokenizer, or a tokenizer.json")
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    if path.is_dir() and not names & set(_OPENED) or path.is_file() and path.suffix != ".json":
        # A bare sentencepiece file is opened, and gives other tokens than sentencepiece does.
        raise ConfigError(
            f"--tokenizer {given!r} ({', '.join(sorted(names)[:6])}): legal is a folder with one of {', '.join(_OPENED)}, or such a .json; "
            f"save other formats (sentencepiece, tiktoken, vocab and merges) with save_pretrained of their transformers class first"
        )
    return path


def open_tokenizer(path: str | Path) -> Any:
    """Raises: ConfigError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"transformers can't open the tokenizer at {str(path)!r}: {error}") from error


def check_vocabulary(tokenizer: Any, rows: int, source: str) -> None:
    """Raises ConfigError when the tokenizer has ids that the embedding, of so many rows, has not."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ConfigError(f"{source} is of another model: it has ids up to {largest}, the embedding {rows} rows (padded_vocab_size)")
