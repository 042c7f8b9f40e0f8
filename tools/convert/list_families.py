#!/usr/bin/env python3
"""Print the table of model families that can be converted, or write it to a file (docs/families.md).

python tools/convert/list_families.py [docs/families.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose inspect.py would hide Python's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="written instead of printed")
    args = parser.parse_args(argv)
    from nemo_dpo.convert.families.overview import overview

    if args.file:
        args.file.write_text(overview(), encoding="utf-8")
    else:
        print(overview(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
