"""What is checked of a report, as a page and as pictures."""

import base64
import re
from html.parser import HTMLParser
from xml.etree import ElementTree


class Html(HTMLParser):
    """Fails where an element is closed out of turn; those left open stay in `open`."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        assert self.open[-1:] != ["p"] or tag in ("b", "code"), f"<{tag}> in a <p>"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> after {self.open}"


def check_html(page: str) -> None:
    """Fail where an element is left open, or closed out of turn."""
    parser = Html()
    parser.feed(page)
    parser.close()
    assert parser.open == []


def pictures_of(page: str) -> list[ElementTree.Element]:
    """The images in the page itself, each a well-formed SVG."""
    found = re.findall("src='data:image/svg[+]xml;base64,([^']+)'", page)
    return [ElementTree.fromstring(base64.b64decode(one)) for one in found]
