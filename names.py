"""Names of files and classes, chosen by others, made safe to show: a name is never a control sequence or markup."""

import re

TEST = ("test", "valid", "val", "validation")  # names for the folder of test images; the first one found counts


def printable(text: str) -> str:
    """`text` with everything that a terminal would not show as text (control characters, …) escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(name: str, length: int = 14) -> str:
    """`name`, or if it is longer its beginning and …, `length` characters in all."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def markdown(text: str) -> str:
    """`text` on one line of Markdown, with everything escaped that could become a link, image, formula or HTML."""
    return re.sub(r"[!-+:-@\[-`{-~]|(?<=www)\.", r"\\\g<0>", printable(text), flags=re.IGNORECASE)
