"""What the browser tests share: a page that is watched, and what to read on it."""

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WATCH = "document.addEventListener('securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective))"


class Opened:
    """A page, and what it should not have done."""

    def __init__(self, page, file):
        self.page, self.file = page, file
        self.complaints, self.requests = [], []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.add_init_script(WATCH)

    def go(self, hash_=""):
        self.page.goto(f"{self.file.as_uri()}{hash_}")
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def check(self):
        assert self.complaints == []
        own = self.file.as_uri()
        assert [url for url in self.requests if not url.startswith((own, "data:"))] == []


def until(page, expression):
    """Wait for a JavaScript expression (Playwright's own waiting evaluates text, which the policy forbids)."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {expression}")


def words(locator):
    return " ".join(locator.inner_text().split())


def count(page):
    return page.inner_text("#count")


def title(page):
    return page.inner_text("#turn-title")
