"""``python -m nextscale``: the command line, where the ``nextscale`` script is not on the path."""
from nextscale.cli.main import main

if __name__ == "__main__":
    main()
