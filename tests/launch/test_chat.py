"""`pikv chat`: turns that continue what is in the cache, commands, what is shown; on one rank and on two."""

import io
import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.launch.chat.loop import Chat
from pikv_ds.launch.chat.screen import Screen
from pikv_ds.launch.chat.spec import ChatSpec
from pikv_ds.launch.chat.talk import Talk
from pikv_ds.launch.chat.turns import tokens_of_turn
from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.commands.chat import read_spec
from pikv_ds.launch.serving.control import Control
from tests.dist.launcher import run_commands
from tests.launch.test_ruler import TEMPLATE

SAID = ["The king of the town", "And in 1998", "It was the"]
SMALL = ["--model", str(bundled.model_path()), "--max-new-tokens", "12", "--chunk", "8"]


def spec(**changes) -> ChatSpec:
    made = read_spec(build_parser().parse_args(["chat", *SMALL]))
    return ChatSpec(**(json.loads(made.to_json()) | changes))


def chat(run: ChatSpec, *lines: str) -> tuple[Chat, str]:
    talk, shown = Talk(run), io.StringIO()
    made = Chat(run, talk, Control(60), io.StringIO("".join(f"{line}\n" for line in lines)), shown)
    try:
        made.run()
    finally:
        talk.close()
    return made, shown.getvalue()


def test_answers_are_those_of_the_whole_conversation_run_anew():
    made, shown = chat(spec(block={}), *SAID)
    model, tokenizer = bundled.load()
    ids: list[int] = []
    for said, message in zip(SAID, made.messages[1::2], strict=True):
        ids += tokenizer(said, add_special_tokens=False)["input_ids"]
        given = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False)[0].tolist()
        assert message["content"] == tokenizer.decode(out[len(ids) :], skip_special_tokens=True) and message["content"] in shown
        ids = out
    assert made.tokens == ids and shown.count("[KV ") == 3 and "on 1 rank" in shown
    assert [row["tokens"] for row in made.rows] == sorted(row["tokens"] for row in made.rows) and made.rows[-1]["tokens"] == len(ids)
    assert all(row["kv_bytes_per_rank"][0] > 0 for row in made.rows)


def test_commands(tmp_path):
    file = tmp_path / "chat.json"
    made, shown = chat(spec(), "Hello", "/stats", f"/save {file}", "/fly", "/reset", "Again", "/quit", "not read")
    document = json.loads(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and document["messages"][0] == {"role": "user", "content": "Hello"}
    assert document["config"]["compression"]["method"] == "int8" and len(document["answers"]) == 1
    assert "rank 0: {" in shown and "kv_bytes_allocated" in shown and "/fly is no command" in shown and f"saved to {file}" in shown
    assert len(made.rows) == 2 and len(made.messages) == 2 and made.messages[0]["content"] == "Again" and "not read" not in shown
    assert made.rows[1]["tokens"] < made.rows[0]["tokens"] + 8, "the second conversation is no longer than one"


def test_a_conversation_that_is_full_says_so():
    _, shown = chat(spec(max_length=24), "The king of the town " * 8, "/quit")
    assert "the model has 24 positions: /reset begins anew" in shown


def test_turns_continue_the_tokens_that_are_there():
    _, tokenizer = bundled.load()
    tokenizer.chat_template = TEMPLATE
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    first = [{"role": "user", "content": "Hi"}]
    ids = tokens_of_turn(tokenizer, first, [])
    assert tokenizer.decode(ids) == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    second = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So"}]
    new = tokens_of_turn(tokenizer, second, ids + encode("Yes."))
    assert tokenizer.decode(ids + encode("Yes.") + new) == tokenizer.apply_chat_template(second, tokenize=False, add_generation_prompt=True)
    end = encode("<|end|>\n")
    assert tokens_of_turn(tokenizer, second, ids + encode("Yes.") + end[:1]) == new[1:], "the answer has ended its turn itself"
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    assert tokens_of_turn(tokenizer, second, ids) is None, "earlier turns are written otherwise"


def test_a_terminal_keeps_a_line_for_the_status(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("COLUMNS", "40")
    shown = Terminal()
    screen = Screen(shown)
    screen.write("text")
    screen.status("KV 1.00 MiB " + "x" * 80)
    assert "\x1b[1;23r" in shown.getvalue() and "\x1b[24;1H" in shown.getvalue() and "x" * 40 not in shown.getvalue()
    screen.close()
    assert "\x1b[r" in shown.getvalue()
    plain = io.StringIO()
    for stays in (False, True):
        Screen(plain).status("KV", stays=stays)
    assert plain.getvalue() == "[KV]\n"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(660)
def test_two_ranks_share_experts_and_cache_and_say_what_one_says(tmp_path):
    one, _ = chat(spec(block={"page_size": 4}), *SAID[:2])
    saved, rows = tmp_path / "chat.json", tmp_path / "rows.json"
    lines = "".join(f"{line}\n" for line in (*SAID[:2], "/stats", f"/save {saved}"))
    (tmp_path / "in.txt").write_text(lines)
    words = [*SMALL, "--config", '{"page_size": 4}', "--ranks", "2", "--json", str(rows)]
    command = [sys.executable, "-c", _WITH_STDIN, str(tmp_path / "in.txt"), "chat", *words]
    result = run_commands([command], ranks=1, timeout_s=600)
    assert result.returncode == 0, result.describe()
    assert json.loads(saved.read_text())["messages"] == one.messages and "on the fullest of 2 ranks" in result.output
    last = json.loads(Path(rows).read_text())["rows"][-1]
    assert max(last["kv_bytes_per_rank"]) < 0.75 * last["kv_bytes_dense"] and "rank 1: {" in result.output


_WITH_STDIN = "import sys; sys.stdin = open(sys.argv[1]); from pikv_ds.launch.cli import main; sys.exit(main(sys.argv[2:]))"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0: legal is 1 or more"),
        (["--temperature", "-1"], "--temperature -1.0: legal is 0 or more"),
        (["--config", '{"storage": {"requests": "distinct"}}'], "the ranks of a chat hold one conversation"),
        (["--model", "no_such_folder"], "no_such_folder"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    assert main(["chat", *SMALL, *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_model_the_command_that_makes_one_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PIKV_REAL_MODEL", str(tmp_path))
    assert main(["chat"]) == 2
    assert "make it with `python -m pikv_ds.launch.real_model`" in capsys.readouterr().err
