"""Open the page: python app.py [--model NAME_OR_FOLDER]."""

import sys

from llava_app.flags import parse


def main() -> None:
    flags = parse(sys.argv[1:])
    from llava_app.errors import UserError
    from llava_app.ui.page import open_page

    try:
        open_page(**vars(flags))
    except UserError as error:
        raise SystemExit(f"app.py: {error}") from None


if __name__ == "__main__":
    main()
