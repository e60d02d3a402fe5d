"""``python -m cerebellum``."""

from cerebellum.cli import main

if __name__ == "__main__":
    main()
