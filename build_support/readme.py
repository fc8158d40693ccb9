"""The README as a package index shows it, which has none of the files that it links to."""

from __future__ import annotations

import re

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*([^)\s]+)\s*\)")
BLOCK = re.compile(r"(^```.*?^```[^\n]*)", re.MULTILINE | re.DOTALL)


def for_index(text: str, site: str = "", files: str = "") -> str:
    """Links into the repository lead to it, and without an address for them become their words;
    pictures likewise, which without one are left out. Those inside of the page and of the web stay.

    Args:
        site: where files can be read, such as ``https://.../blob/v0.1.0/``; empty: nowhere.
        files: where they can be loaded from as they are, for pictures.
    """

    def replaced(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        words = LINK.sub(replaced, words)
        if re.match(r"[a-z][a-z+.-]*:|#", target):
            return f"{picture}[{words}]({target})"
        base = files if picture else site
        return f"{picture}[{words}]({base}{target})" if base else "" if picture else words

    # Only blocks of code are left alone: words that are a link may be code themselves.
    parts = BLOCK.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)
