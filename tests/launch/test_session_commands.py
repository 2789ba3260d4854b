"""`pikv generate --session` and `pikv chat --session`: a conversation goes on where a file was saved."""

import json
import stat

from pikv_ds.launch.cli import main
from tests.launch.test_chat import chat, spec

SAID = ["The king of the town", " And in 1998"]
COMMON = ["generate", "--max-new-tokens", "8"]


def test_generate_goes_on_from_a_file(tmp_path, capsys):
    both, file = tmp_path / "both.json", tmp_path / "story.session"
    assert main([*COMMON, "--session", str(tmp_path / "both.session"), "--prompt", *SAID, "--json", str(both)]) == 0
    rows = []
    for prompt in SAID:
        assert main([*COMMON, "--session", str(file), "--prompt", prompt, "--json", str(tmp_path / "one.json")]) == 0
        rows += json.loads((tmp_path / "one.json").read_text())["rows"]
    expected = json.loads(both.read_text())["rows"]
    assert [row["text"] for row in rows] == [row["text"] for row in expected]
    assert rows[1]["session_bytes"] == file.stat().st_size and stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_bytes(file.read_bytes()[:-9])
    assert main([*COMMON, "--session", str(file), "--prompt", "x"]) == 2 and "cut short" in capsys.readouterr().err
    assert main([*COMMON, "--session", str(tmp_path / "no" / "x"), "--prompt", "x"]) == 2


def test_a_chat_goes_on_from_a_file(tmp_path):
    file = tmp_path / "talk.session"
    whole, _ = chat(spec(), *SAID)
    first, shown = chat(spec(session=str(file)), SAID[0], "/quit")
    assert f"saved to {file}" in shown
    second, shown = chat(spec(session=str(file)), SAID[1], f"/save {tmp_path / 'again'}", "/reset", f"/load {tmp_path / 'again'}", "/quit")
    assert "loaded" in shown and second.messages == whole.messages and second.tokens == whole.tokens
    _, shown = chat(spec(), f"/load {tmp_path / 'nowhere'}")
    assert "not loaded" in shown and "can't be read" in shown
