"""``python -m pyramidinfer``."""

from pyramidinfer.cli.app import main

if __name__ == "__main__":
    main()
