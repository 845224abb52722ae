"""Run segkit from a checkout: `python cli.py VERB ...`; the installed command is `segkit`."""

from segkit.cli import main

if __name__ == "__main__":
    main()
