"""A prompt of exactly so many tokens and what its answer must say; how prompts are written as a chat."""

from __future__ import annotations

from typing import Any, NamedTuple

from pikv_ds.bundled.recall import Prose


class Asked(NamedTuple):
    """kind: of the prompt, for the detail of a row. depth: where the asked fact begins, as a fraction of the prompt; None: it is spread.
    question_tokens: of ids, at the end, all that an eviction without the question does not see. starts: the text must begin with the only
    answer; else it must contain the answers."""

    kind: str
    ids: list[int]
    answers: tuple[str, ...]
    depth: float | None
    question_tokens: int
    new_tokens: int
    starts: bool = False

    def score(self, text: str) -> float:
        """Share of the answers that are found, 0 to 1."""
        if self.starts:
            return float(text.strip().startswith(self.answers[0]))
        return sum(answer.lower() in text.lower() for answer in self.answers) / len(self.answers)


class Frame:
    """What stands around a prompt: the turns of the tokenizer's chat template, or only what it puts before every text."""

    MARK = "\x02"

    def __init__(self, prose: Prose, template: bool | None) -> None:
        """template: None = where the tokenizer has one."""
        self.prose = prose
        self.is_chat = bool(getattr(prose.tokenizer, "chat_template", None)) if template is None else template
        self.head, self.tail = prose.prefix, list[int]()
        if self.is_chat:
            turn = [{"role": "user", "content": self.MARK}]
            before, _, after = prose.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).partition(self.MARK)
            self.head, self.tail = prose.encode(before), prose.encode(after)

    def ask(self, before: str, body: list[int], question: str, answer_begins: str) -> tuple[list[int], int]:
        """Tokens of the whole prompt, and how many of them follow the body: the question, the template's turn, what begins the answer."""
        begins = answer_begins.lstrip() if self.is_chat else answer_begins
        end = self.prose.encode(question) + self.tail + self.prose.encode(begins)
        return self.head + self.prose.encode(before) + body + end, len(end)

    def room(self, length: int, before: str, question: str, answer_begins: str) -> int:
        """Tokens that are left for the body."""
        return length - len(self.ask(before, [], question, answer_begins)[0])


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Up to the end of the text, if that is in it."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
