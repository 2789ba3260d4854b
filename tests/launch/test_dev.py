"""What launch/dev.sh says and returns, and what the commit hook refuses. Both run on copies, in the environment that runs the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("lint", "types", "quick", "full", "docs", "bench", "megatron-newest", "hosts", "hooks")
BADLY_FORMATTED = "x = {  'a':1 }\n"
UNUSED_IMPORT = "import os\n"
# The environment is taken as it is, and found first; no settings of the user's git.
ENV = os.environ | {
    "PIKV_NO_INSTALL": "1",
    "DS_ACCELERATOR": "cpu",
    "VIRTUAL_ENV": sys.prefix,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=280)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A repository with the tools in it and nothing else."""
    for name in ("launch", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for command in (["init", "-q"], ["config", "user.name", "a"], ["config", "user.email", "a@example.org"]):
        run("git", *command, cwd=tmp_path)
    return tmp_path


def commit(clone: Path, **files: str) -> subprocess.CompletedProcess:
    """Stage these texts of NAME.py and commit."""
    for name, text in files.items():
        (clone / f"{name}.py").write_text(text)
        run("git", "add", f"{name}.py", cwd=clone)
    return run("git", "commit", "-q", "-m", "x", cwd=clone)


def test_help_lists_every_command():
    done = run("bash", "launch/dev.sh", "--help", cwd=ROOT)
    assert done.returncode == 0 and tuple(line.split()[0] for line in done.stdout.splitlines()[1:]) == COMMANDS


@pytest.mark.parametrize("words, said", [(["lnt"], "unknown command 'lnt'"), ([], "name one of these"), (["--fast"], "unknown command")])
def test_other_words_are_refused(words, said):
    done = run("bash", "launch/dev.sh", *words, cwd=ROOT)
    assert done.returncode == 2 and said in done.stderr and all(f"  {name} " in done.stderr for name in COMMANDS)


@pytest.mark.parametrize("name, text", [("a.py", BADLY_FORMATTED), ("a.py", UNUSED_IMPORT), ("launch/a.sh", "if true\n")])
def test_lint_fails_on_what_it_checks(clone, name, text):
    good = run("bash", "launch/dev.sh", "lint", cwd=clone)
    assert good.returncode == 0 and "pikv: lint: ruff check" in good.stdout, good.stdout + good.stderr
    (clone / name).write_text(text)
    bad = run("bash", "launch/dev.sh", "lint", cwd=clone)
    assert bad.returncode == 1 or bad.returncode == 2 and name.endswith(".sh"), bad.stdout + bad.stderr
    assert name in bad.stdout + bad.stderr


def test_docs_names_what_was_not_up_to_date(clone):
    (clone / "docs" / "results").mkdir(parents=True)
    (clone / "docs" / "results" / "methods.md").write_text("old\n")
    script = clone / "launch" / "dev.sh"
    text, tables = re.subn(
        r"DOCUMENTS=\(\n.*?\n\)", 'DOCUMENTS=("docs/results/methods.md|echo new > docs/results/methods.md")', script.read_text(), flags=re.S
    )
    assert tables == 1
    script.write_text(text)
    first, second = (run("bash", "launch/dev.sh", "docs", cwd=clone) for _ in range(2))
    assert first.returncode == 1 and "was not up to date: docs/results/methods.md" in first.stdout, first.stderr
    assert second.returncode == 0 and "were up to date" in second.stdout, second.stderr


@pytest.mark.slow
def test_the_files_that_pyproject_names_are_clean_under_mypy():
    pytest.importorskip("mypy", reason="mypy is in the extra 'test'; this environment was made before it was")
    done = run("bash", "launch/dev.sh", "types", cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout.rpartition(" source files")[0].split()[-1]) > 10, done.stdout + done.stderr


@pytest.mark.parametrize("text, said", [(BADLY_FORMATTED, "bad.py is not formatted"), (UNUSED_IMPORT, "F401")])
def test_the_hook_refuses_what_is_staged(clone, text, said):
    assert commit(clone, bad=text).returncode == 0, "off until it is asked for"
    done = run("bash", "launch/dev.sh", "hooks", cwd=clone)
    assert done.returncode == 0, done.stderr
    refused = commit(clone, good="x = 1\n", bad=text + "\n\ny = 2\n")
    assert refused.returncode != 0 and said in refused.stdout + refused.stderr, refused.stdout + refused.stderr
    assert "good.py" not in refused.stdout + refused.stderr
    (clone / "bad.py").write_text("x = 1\n")
    assert run("git", "commit", "-q", "-m", "x", cwd=clone).returncode != 0, "the working tree is not what is committed"
    done = commit(clone, bad="x = 1\n")
    assert done.returncode == 0, done.stderr


def test_the_hook_passes_what_it_does_not_check(clone):
    run("bash", "launch/dev.sh", "hooks", cwd=clone)
    (clone / "notes.txt").write_text(BADLY_FORMATTED)
    (clone / "left.py").write_text(BADLY_FORMATTED)
    run("git", "add", "notes.txt", cwd=clone)
    done = run("git", "commit", "-q", "-m", "x", cwd=clone)
    assert done.returncode == 0, done.stderr
    (clone / "left.py").unlink()
    done = commit(clone, **{"a name": "x = 1\n"})
    assert done.returncode == 0, done.stderr
