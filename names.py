"""Names that somebody else chose, of files and of classes, shown as the text that they are: a name is never markup."""

import re

TEST = ("test", "valid", "val", "validation")  # what the folder of test images is called; the first one counts


def printable(text: str) -> str:
    """`text` for a terminal: a file's name can hold what moves its cursor, or what no terminal can show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(name: str, length: int = 14) -> str:
    """`name`, its end replaced by … where it is longer."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def markdown(text: str) -> str:
    """`text` on one line of Markdown: what would make a link, a picture, a formula or HTML of it is escaped."""
    return re.sub(r"[!-+:-@\[-`{-~]|(?<=www)\.", r"\\\g<0>", printable(text), flags=re.IGNORECASE)
