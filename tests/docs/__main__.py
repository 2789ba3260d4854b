"""python -m tests.docs [--check] [NAME ...]: write the generated documents, or say which are not what would be written."""

import argparse
import sys

from .generated import DOCUMENTS, ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description="Write the generated documents.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(DOCUMENTS)}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when one is out of date")
    args = parser.parse_args()
    if unknown := set(args.names) - set(DOCUMENTS):
        parser.error(f"no document {', '.join(sorted(unknown))}; legal are {', '.join(DOCUMENTS)}")
    stale = []
    for name in args.names or DOCUMENTS:
        target, written = DOCUMENTS[name]
        text = written()
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            stale.append(target.relative_to(ROOT))
            if not args.check:
                target.write_text(text, encoding="utf-8")
    for file in stale:
        print(f"{file} {'is out of date: python -m tests.docs' if args.check else 'written'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
