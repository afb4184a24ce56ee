"""Tables in pages of the docs, between two marks."""


def write_between(page, marks, text):
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(marks[0])
    page.write_text(f"{before}{marks[0]}\n\n{text.strip()}\n\n{marks[1]}{rest.partition(marks[1])[2]}")
