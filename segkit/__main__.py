"""`python -m segkit`, which is also what `torchrun -m segkit` starts."""

from segkit.cli import main

if __name__ == "__main__":
    main()
