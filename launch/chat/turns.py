"""The tokens of a conversation's turns, such that those that are in the cache stay as they were."""

from __future__ import annotations

from typing import Any

Message = dict[str, str]


def tokens_of_turn(tokenizer: Any, messages: list[Message], ids: list[int]) -> list[int] | None:
    """What follows `ids`, the tokens of all turns before, when messages[-1] is said: the end of the last answer, the turn, what begins the
    answer. None: the template writes earlier turns in another way now, so that all of them must be read again.

    Without a chat template the text alone.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    if not getattr(tokenizer, "chat_template", None):
        text = messages[-1]["content"]
        return encode(text) if ids else tokenizer(text)["input_ids"]
    now = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not ids:
        return encode(now)
    before = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
    answer = messages[-2]["content"]
    said = before.rfind(answer)
    if said < 0 or not now.startswith(before):
        return None
    new = encode(now[said + len(answer) :])
    return new[1:] if new and ids[-1] == new[0] else new  # the answer's last token may be the one that ends a turn
