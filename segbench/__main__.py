"""``python -m segbench`` is the command ``segbench``."""

from segbench.cli import main

if __name__ == "__main__":
    main()
