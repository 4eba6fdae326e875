"""Build the CPU kernels ahead of time, for machines that are not known yet.

    python -m pyramidinfer.native.ship FOLDER

makes a library for each kind of CPU that the kernels know; with ``PYRAMIDINFER_KERNELS=FOLDER`` the
best one that a CPU can run is loaded, and no compiler is needed (``native/build.py``).
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from pyramidinfer.native.build import SHIPPED, NoCompilerError, build_for

__all__ = ["main", "ship"]


def ship(folder: Path) -> list[Path]:
    """The libraries, built into ``folder``; ``NoCompilerError`` where that cannot be done."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    names = [name for name, kind in SHIPPED.items() if is_x86 or not kind.needs]
    return [build_for(name, folder) for name in names]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pyramidinfer.native.ship FOLDER")
    try:
        for path in ship(Path(sys.argv[1])):
            print(path)
    except NoCompilerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
