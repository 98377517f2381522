"""A parsed page of the report, to look at in tests."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting; collects ids, links, attributes and the cells of every table row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.rows = [], [], [], set(), []
        self.resources = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href", "src", "srcset", "action", "data", "poster"):
                (self.links if tag == "a" else self.resources).append(value)
            assert not name.startswith("on")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, first):
        return next(row for row in self.rows if row and row[0].strip() == first)
