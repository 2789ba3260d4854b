"""docs/reference/files.md: what each file is for, from the first line of its docstring (of its class where a file is one method).

python -m tests.packaging.file_map            # exit status 1 when the file is not what would be written
python -m tests.packaging.file_map --write
"""

import ast
import sys
from pathlib import Path

from tests.packaging.imports import FILES, ROOT

TARGET = ROOT / "docs" / "reference" / "files.md"
HEAD = """# What each file is for

Made from the first line of each file's docstring by `python -m tests.packaging.file_map --write`. Which folder may import which:
[ARCHITECTURE.md](../ARCHITECTURE.md).
"""


def says(path: Path) -> str:
    """The first sentence of a file, or of its last class."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    for node in tree.body:
        if text is None and isinstance(node, ast.ClassDef):
            text = ast.get_docstring(node)
    return "" if text is None else " ".join(text.split("\n\n")[0].split())


def written() -> str:
    folders: dict[Path, list[Path]] = {}
    for path in FILES:
        folders.setdefault(path.parent.relative_to(ROOT), []).append(path)
    parts = [HEAD]
    for folder, paths in sorted(folders.items()):
        face = next((path for path in paths if path.name == "__init__.py"), None)
        parts.append(f"## {folder.as_posix()}/\n" + (f"\n{says(face)}\n" if face is not None and says(face) else ""))
        rows = [f"| `{path.name}` | {says(path)} |" for path in paths if path.name != "__init__.py"]
        parts.append("\n".join(["| file | what |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def main() -> int:
    if "--write" in sys.argv[1:]:
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        TARGET.write_text(written(), encoding="utf-8")
        return 0
    if TARGET.read_text(encoding="utf-8") != written():
        print(f"{TARGET.relative_to(ROOT)} is out of date: python -m tests.packaging.file_map --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
