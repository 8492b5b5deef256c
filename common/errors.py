"""What the user can mend, told apart from what is our own mistake."""

import sys
from collections.abc import Callable


class KitError(Exception):
    """A mistake of the user: the message says the value, the rule and the way out."""


def run(main: Callable[[], None]) -> None:
    """Exits 0 after `main`; a KitError becomes one message on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
