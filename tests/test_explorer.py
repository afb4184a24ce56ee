"""The explorer in a real browser, over a real server: ask, look, filter, re-damp, link, export; keyboard, colours, a phone."""

import json
import shutil
import urllib.request
from urllib.parse import quote

import pytest
from helpers import make_model, make_tokenizer, random_texts, words, write_jsonl
from test_server import Server
from wherefrom import BuildConfig, Client, Query
from wherefrom.ray_jobs.build import build
from wherefrom.store.manifest import Slope
from wherefrom.store.update import record_slope

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    here = tmp_path_factory.mktemp("explorer")
    make_model("gpt2", "float32").save_pretrained(here / "model")
    make_tokenizer().save_pretrained(here / "model")
    texts = random_texts(150, seed=6, shortest=6)
    texts[17] = words(*range(1, 12))
    records = [{"id": f"d{i}", "text": t, "year": 1900 + i, "color": ("red", "green")[i % 2]} for i, t in enumerate(texts)]
    records[18]["text"] += " <script>alert(1)</script>"
    records[21]["text"] = words(*range(1, 60))
    data = write_jsonl(here / "c.jsonl", records)
    options = dict(components=("blocks", "head"), rank=4, hidden=True, shard_rows=60)
    build(BuildConfig(model=str(here / "model"), data=(str(data),), out=str(here / "small.wherefrom"), **options))
    server = Server([here / "small.wherefrom"], {"XDG_RUNTIME_DIR": str(here)})
    server.client = Client(here / "small.wherefrom")
    yield server
    _, output = server.stop()
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    # The policy of the pages would keep the test's own polling from running; one test below does without, under it.
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, color_scheme="light", bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" and "422" not in message.text else None)
    page.goto(server.url)
    page.wait_for_function("document.querySelector('#group').options.length > 1")
    yield page
    context.close()
    assert wrong == []


def ask(page, **fields):
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#go")
    settled(page)


def settled(page):
    page.wait_for_function("document.querySelector('#state').textContent === '' && !document.querySelector('#answer').hidden")


def top(page, kind="proponents"):
    return page.locator(f"#{kind} .card").first.get_attribute("data-row")


def test_ask_and_the_right_document_is_on_top_with_its_heat_map(page, server):
    assert page.is_visible("#empty")
    page.click("#tab-text")
    page.select_option("#mode", "cosine")
    ask(page, text=words(*range(1, 12)))
    assert top(page) == "17"
    assert not page.is_visible("#empty")
    heat = page.locator("#proponents .card").first.locator(".heat-for, .heat-against")
    assert heat.count() > 3
    colours = {heat.nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in range(heat.count())}
    assert len(colours) > 1
    assert page.locator("#query-heat .heat-for, #query-heat .heat-against").count() > 2
    assert page.locator("#histogram svg rect").count() == 60
    assert page.locator("#histogram svg line.mark").count() == page.locator("ol .card").count()
    assert page.locator("#layers-chart svg rect").count() > 2
    assert "exact" in page.inner_text("#certificate")
    shown = [float(s) for s in page.locator("#proponents .score").all_inner_texts()]
    cosine_answer = server.client.query(text=words(*range(1, 12)), mode="cosine")
    assert shown == pytest.approx([a.score for a in cosine_answer.proponents], rel=2e-3)
    assert [float(s) for s in page.locator("#opponents .score").all_inner_texts()] == pytest.approx(
        [a.score for a in cosine_answer.opponents], rel=2e-3
    )


def test_filters_damping_groups_and_baselines_rank_again_at_once(page, server):
    ask(page, prompt="w1 w2 w3", completion=" w4 w5")
    before = page.locator("#proponents .card").all_inner_texts()
    page.fill("#where", 'color == "red"')
    page.press("#where", "Enter")
    settled(page)
    red_answer = server.client.query(prompt="w1 w2 w3", completion=" w4 w5", where='color == "red"')
    assert [int(c.get_attribute("data-row")) for c in page.locator("#proponents .card").all()] == [a.row for a in red_answer.proponents]
    page.fill("#where", "")
    page.fill("#damping", "30")
    page.press("#damping", "Enter")
    settled(page)
    assert page.locator("#proponents .card").all_inner_texts() != before
    page.fill("#damping", "")
    page.select_option("#group", "color")
    page.wait_for_selector("#groups tbody tr")
    settled(page)
    assert {row.split("\t")[0] for row in page.locator("#groups tbody tr").all_inner_texts()} == {"red", "green"}
    page.check("#baselines")
    page.wait_for_selector("#baselines-list .card")
    assert {text.split()[0] for text in page.locator("#baselines-list .card").all_inner_texts()} == {"bm25", "hidden", "norm"}
    page.uncheck("#baselines")
    page.select_option("#group", "")
    settled(page)
    page.check("#certified")
    page.wait_for_function("document.querySelector('#certificate').textContent.includes('with probability 0.99')")
    page.fill("#where", "nothing == 1")
    page.press("#where", "Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "nothing" in page.inner_text("#error")
    assert not page.is_visible("#answer")


def test_reranked_scores_stand_beside_stored_ones_with_the_bound_on_other_rows(page, server):
    page.click("#tab-text")
    ask(page, text=words(*range(1, 12)), rerank="0")
    assert "computed again" not in page.inner_text("#certificate")
    page.fill("#rerank", "20")
    page.press("#rerank", "Enter")
    page.wait_for_function("document.querySelector('#certificate').textContent.includes('computed again')")
    settled(page)
    said = page.inner_text("#certificate")
    answer = server.client.query(text=words(*range(1, 12)), rerank=20)
    assert f"{answer.search.rerank.candidates} candidates computed again" in said
    assert "no other scores above" in said
    assert top(page) == str(answer.proponents[0].row)
    page.fill("#rerank", "2000")
    page.press("#rerank", "Enter")
    page.wait_for_selector("#error:not([hidden])")


def test_a_link_shows_the_same_view_and_back_goes_back(page, server, browser):
    page.select_option("#mode", "cosine")
    page.select_option("#group", "color")
    ask(page, prompt="w1 w2", completion=" w3", k="4")
    first = page.url
    shown = page.locator("ol .card .top").all_inner_texts()
    page.locator("#proponents .card button").nth(1).click()
    settled(page)
    page.wait_for_function("document.querySelector('#tab-row').getAttribute('aria-selected') === 'true'")
    assert page.input_value("#row") != ""
    assert page.url != first
    page.go_back()
    page.wait_for_function("document.querySelector('#completion').value === ' w3'")
    settled(page)
    assert page.locator("ol .card .top").all_inner_texts() == shown
    other = browser.new_page(bypass_csp=True)
    other.goto(first)
    settled(other)
    assert other.locator("ol .card .top").all_inner_texts() == shown
    assert (other.input_value("#mode"), other.input_value("#group"), other.input_value("#k")) == ("cosine", "color", "4")
    twin = other.request.get(server.url + other.get_attribute("#twin", "href")).json()
    assert [str(a["row"]) for a in twin["proponents"]] == [c.get_attribute("data-row") for c in other.locator("#proponents .card").all()]
    other.close()


@pytest.mark.parametrize(
    ("link", "word"),
    [
        ("{}", "Write what the model said"),
        ("[]", "no query"),
        ("null", "no query"),
        ('{"text":"w1 w2","mix":"auto"}', "mix"),
        ('{"text":"w1 w2","index":"retired"}', "retired"),
        ('{"text":"w1 w2","group_by":"nothing"}', "nothing"),
    ],
)
def test_a_link_that_cannot_be_shown_is_said_and_the_page_can_be_used(page, server, link, word):
    page.goto(f"{server.url}/?q={quote(link)}")
    page.wait_for_selector("#error:not([hidden])")
    assert word in page.inner_text("#error")
    ask(page, prompt="w1 w2", completion=" w3") if page.is_visible("#prompt") else page.click("#tab-completion")
    assert page.is_enabled("#go")


def test_numbers_that_are_none_and_other_indexes(page):
    page.fill("#damping", "abc")
    page.fill("#completion", " w3")
    page.click("#go")
    assert "is a number" in page.inner_text("#error")
    ask(page, prompt="w1 w2", damping="0,5", rerank="0")
    assert "computed again" in page.inner_text("#proponents")  # one-bit codes estimate it
    page.fill("#k", "20")
    page.press("#k", "Tab")
    page.wait_for_function("document.querySelectorAll('#opponents .heat-for, #opponents .heat-against').length > 30")
    settled(page)
    assert page.locator("ol .card").count() == page.locator("ol .card:has(.heat-for, .heat-against)").count() == 40


def test_exports(page):
    ask(page, prompt="w1 w2", completion=" w3", k="3")
    files = {}
    page.check("#proponents .card >> nth=1 >> input")
    page.check("#opponents .card >> nth=0 >> input")
    page.click("[data-view=corpus]")
    page.fill("#browse-where", "year == 1940")
    page.click("#browse button[type=submit]")
    page.wait_for_function("document.querySelector('#browse-place').textContent === '1 to 1 of 1'")
    page.check("#browse-list .card input")
    for form, button in (("csv", "[data-export=csv]"), ("jsonl", "[data-export=jsonl]"), ("ids", "#tray-save")):
        page.click("[data-view=ask]")
        with page.expect_download() as download:
            page.click(button)
        files[form] = download.value.path().read_text()
    cards = page.locator("#proponents .card, #opponents .card").count()
    assert len(files["jsonl"].splitlines()) == cards
    assert files["csv"].splitlines()[0] == "kind,rank,row,id,score,source,document,text"
    shown = [json.loads(line) for line in files["jsonl"].splitlines()]
    removed = [json.loads(line) for line in files["ids"].splitlines()]
    chosen = [next(a for a in shown if (a["kind"], a["rank"]) == place) for place in (("proponent", 2), ("opponent", 1))]
    assert [line["id"] for line in removed] == [*(a["id"] for a in chosen), "d40"]
    assert [line["reason"] for line in removed] == ["proponent of rank 2", "opponent of rank 1", "chosen in the corpus"]
    assert (removed[0]["score"], removed[0]["unit"], removed[0]["query"]["completion"]) == (chosen[0]["score"], "nats", " w3")
    page.click("#tray-clear")
    assert not page.is_visible("#tray")
    assert page.locator(".pick input:checked").count() == 0


def test_the_model_completes_and_stored_text_runs_nothing(page, server):
    page.fill("#prompt", "w1 w2 w3")
    page.click("#complete")
    page.wait_for_function("document.querySelector('#completion').value !== ''")
    settled(page)
    assert page.input_value("#completion") == server.client.complete("w1 w2 w3")
    page.goto(f"{server.url}/?q={quote(json.dumps({'row': 18, 'mode': 'cosine', 'index': 'small'}))}")
    settled(page)
    assert "<script>" in page.locator("#proponents .card .text").first.inner_text() or top(page) == "18"
    assert page.locator(".card script").count() == 0


def test_the_keyboard_is_enough(page):
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("w1 w2")
    page.keyboard.press("Tab")
    page.keyboard.type(" w3")
    page.keyboard.press("Control+Enter")
    settled(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("j")
    row = page.evaluate("document.activeElement.dataset.row")
    assert row == page.locator("ol .card").nth(1).get_attribute("data-row")
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelector('#row').value === '{row}'")
    settled(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    assert not page.is_visible("#keys")
    page.focus("#tab-completion")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-text"


CONTRASTS = """() => {
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (c) => c.map((v) => linear(v / 255)).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = (top, under) => { const a = top[3] ?? 1; return top.slice(0, 3).map((v, i) => v * a + under[i] * (1 - a)); };
  const white = [255, 255, 255];
  const ground = (e) => over(parse(getComputedStyle(e).backgroundColor), e.parentElement ? ground(e.parentElement) : white);
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("svg, option")) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "." + e.className + " " + e.textContent.slice(0, 20)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 3);
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_everything_is_labelled_and_can_be_read(page, dark):
    if dark:
        page.click("#theme")
    ask(page, prompt="w1 w2", completion=" w3")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select, button, a, [role=tab]")].filter((e) =>
          !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("[...document.querySelectorAll('svg')].every((s) => s.getAttribute('aria-label'))")
    for contrast, what in page.evaluate(CONTRASTS):
        assert contrast >= 4.5, what
    page.focus("#go")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_a_long_text_is_shown_whole_when_asked(page):
    page.add_style_tag(content=".card .text { max-height: 2em }")
    page.set_viewport_size({"width": 390, "height": 800})
    page.click("#tab-row")
    page.evaluate("document.querySelector('#options').open = true")
    page.select_option("#mode", "cosine")
    ask(page, row="21")
    page.wait_for_selector("#proponents .heat-for")
    card = page.locator("#proponents .card").first
    text, button = card.locator(".text"), card.locator("button.all")
    clipped = text.bounding_box()["height"]
    assert card.get_attribute("data-row") == "21"
    short = [c for c in page.locator("ol .card").all() if not c.locator("button.all").count()]
    assert all(c.locator(".text").bounding_box()["height"] <= clipped for c in short)
    button.click()
    assert button.inner_text() == "Show less"
    assert text.bounding_box()["height"] > 2 * clipped
    button.press("Enter")
    assert text.bounding_box()["height"] == clipped


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(page, server, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    def violations():
        violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        return [(v["id"], [n["html"] for n in v["nodes"]][:3]) for v in violations]

    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert violations() == []  # empty
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.select_option("#group", "color")
    page.check("#baselines")
    ask(page, prompt="w1 w2", completion=" w3")
    assert violations() == []  # answered
    page.add_style_tag(content=".card .text { max-height: 2em }")
    page.click("#tab-row")
    ask(page, row="21")
    assert page.locator("button.all").count() > 0
    assert violations() == []  # long texts
    for view, shown in (("corpus", "#view-corpus"), ("saved", "#view-saved"), ("about", "#about h2")):
        page.click(f"[data-view={view}]")
        page.wait_for_selector(shown)
        assert violations() == [], view
    page.click("[data-view=ask]")
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.fill("#where", "colour ==")
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert violations() == []  # an error
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("h2")
    assert violations() == []


def test_a_phone_shows_all_of_it(page):
    page.set_viewport_size({"width": 375, "height": 740})
    page.select_option("#group", "color")
    ask(page, prompt="w1 w2", completion=" w3")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for selector in ("#go", "#proponents .card", "#opponents .card", "#histogram svg"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
    assert 0 <= page.locator("#proponents .card").first.bounding_box()["y"] < 740  # it is seen without scrolling


def test_a_click_on_a_word_asks_about_it_alone(page, server):
    ask(page, prompt="w1 w2", completion=" w3 w4 w5 w4")
    tokens = page.locator("#query-heat button.token")
    assert [text.strip() for text in tokens.all_inner_texts()] == ["w3", "w4", "w5", "w4"]
    tokens.nth(2).click()
    page.wait_for_function("document.querySelector('#span').value.trim() === 'w5'")
    settled(page)
    span = page.input_value("#span")
    expected = server.client.query(prompt="w1 w2", completion=" w3 w4 w5 w4", span=span)
    assert [c.get_attribute("data-row") for c in page.locator("#proponents .card").all()] == [str(a.row) for a in expected.proponents]
    page.fill("#span", "")
    ask(page)
    tokens.nth(0).click()
    page.wait_for_function("document.querySelector('#span').value.trim() === 'w3'")
    settled(page)
    tokens.nth(2).click(modifiers=["Shift"])
    page.wait_for_function("document.querySelector('#span').value.trim() === 'w3 w4 w5'")
    settled(page)
    tokens.nth(1).click()  # it occurs twice, so a neighbor joins it
    page.wait_for_function("document.querySelector('#span').value.includes('w3 w4')")
    settled(page)


def test_words_that_both_have_are_marked_and_counted(page, server):
    page.click("#tab-text")
    ask(page, text="w60 w3 w4 w5 w6 w61", k="100")  # d17 has w1 to w11
    card = page.locator('ol .card[data-row="17"]')
    assert "4 words verbatim" in card.inner_text()
    assert "".join(card.locator("mark.same").all_inner_texts()).split() == ["w3", "w4", "w5", "w6"]
    assert "verbatim" not in page.locator("#opponents .card").last.inner_text()


def test_scores_say_their_unit_share_and_percentile_and_warnings_come_first(page, server):
    ask(page, prompt="w1 w2", completion=" w3", rerank="0", k="40")
    answer = server.client.query(prompt="w1 w2", completion=" w3", rerank=0, k=40)
    first = page.locator("#proponents .card").first.inner_text()
    assert " nats" in first
    assert f"{100 * answer.proponents[0].share:.1f} % of all for" in first
    assert page.locator("#warnings li").all_inner_texts() == list(answer.reliability.warnings)
    assert "nats that the loss is predicted to rise by" in page.inner_text("#unit")


def test_the_corpus_is_paged_filtered_and_ordered(page, server):
    page.click("[data-view=corpus]")
    page.wait_for_selector("#browse-list .card")
    assert page.inner_text("#browse-place") == "1 to 20 of 150"
    assert page.is_disabled("#browse-back")
    page.click("#browse-next")
    page.wait_for_function("document.querySelector('#browse-place').textContent.startsWith('21')")
    assert page.locator("#browse-list .card").first.get_attribute("data-row") == "20"
    page.fill("#browse-where", "year < 1905")
    page.click("#browse button[type=submit]")
    page.wait_for_function("document.querySelector('#browse-place').textContent === '1 to 5 of 5'")
    page.fill("#browse-where", "")
    page.select_option("#browse-sort", "self-influence")
    page.wait_for_function("document.querySelector('#browse-place').textContent === '1 to 20 of 150'")
    from wherefrom.query.baselines import row_norms

    strongest = str(int(row_norms(server.client.index).argmax()))
    page.wait_for_function(f"document.querySelector('#browse-list .card').dataset.row === '{strongest}'")
    assert "nats a token" in page.locator("#browse-list .card").first.inner_text()
    assert "denser place" in page.locator("#browse-list .card").first.inner_text()
    page.fill("#browse-where", "nothing ==")
    page.click("#browse button[type=submit]")
    page.wait_for_function("document.querySelector('#browse-state').textContent.length > 5")
    page.fill("#browse-where", "")
    page.click("#browse button[type=submit]")
    page.wait_for_selector(f'#browse-list .card[data-row="{strongest}"] button')
    page.click(f'#browse-list .card[data-row="{strongest}"] button')
    settled(page)
    assert top(page) == strongest


def test_queries_are_saved_beside_the_index_and_asked_again(page, server):
    ask(page, prompt="w1 w2", completion=" w7", k="4")
    page.click("#keep")
    page.fill("#keep-name", "sevens <b>")
    page.fill("#keep-note", "look again")
    page.click("#keep-form button[value=save]")
    page.wait_for_function("document.querySelector('#state').textContent.includes('saved')")
    path = server.client.index.path
    (line,) = path.with_name(f"{path.name}.queries.jsonl").read_text().splitlines()
    assert json.loads(line)["query"]["completion"] == " w7"
    ask(page, prompt="w1 w2", completion=" w8")
    page.click("[data-view=saved]")
    page.wait_for_selector("#saved-list .card")
    assert "sevens <b>" in page.inner_text("#saved-list")
    assert "look again" in page.inner_text("#saved-list")
    page.click("#saved-list button >> nth=0")
    settled(page)
    assert (page.input_value("#completion"), page.input_value("#k")) == (" w7", "4")
    page.click("[data-view=saved]")
    page.click("#saved-list button >> nth=1")
    page.wait_for_function("!document.querySelector('#saved-list').children.length")
    assert path.with_name(f"{path.name}.queries.jsonl").read_text() == ""


def test_two_answers_stand_side_by_side(page, server):
    ask(page, prompt="w1 w2", completion=" w3", k="5")
    before = [c.get_attribute("aria-label").split(",")[0] for c in page.locator("#proponents .card").all()]
    page.click("#pin")
    ask(page, prompt="w1 w2 w9", completion=" w3")
    now = [c.get_attribute("aria-label").split(",")[0] for c in page.locator("#proponents .card").all()]
    assert page.inner_text("#pinned-shared") == f"{len(set(before) & set(now))} of 5 proponents are the same."
    rows = page.locator("#pinned tbody tr").all_inner_texts()
    assert [row.split(":")[0] for row in rows] == before
    assert "w3" in page.inner_text("#pinned-title")
    page.click("#pin")
    assert not page.is_visible("#pinned")


def test_a_file_of_queries_is_answered_one_by_one_or_as_their_mean(page, server, tmp_path):
    queries = [{"prompt": "w1 w2", "completion": " w3", "id": "first"}, {"text": words(5, 6, 7), "id": "second"}]
    file = write_jsonl(tmp_path / "q.jsonl", queries)
    page.click("#tab-file")
    page.set_input_files("#file", str(file))
    page.wait_for_function("document.querySelector('#lines').value.includes('second')")
    page.select_option("#group", "color")
    page.click("#go")
    settled(page)
    assert [text.split("\n")[0] for text in page.locator("#several-list .card").all_inner_texts()] == ["first", "second"]
    page.locator("#several-list button").nth(1).click()
    assert top(page) == str(server.client.query(text=words(5, 6, 7)).proponents[0].row)
    assert page.is_visible("#groups")
    page.check("#mean")
    page.click("#go")
    settled(page)
    (mean,) = server.client.query_many([Query(**query) for query in queries], mean=True)
    assert top(page) == str(mean.proponents[0].row)
    page.fill("#lines", "{")
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert "Line 1 of the queries is not JSON" in page.inner_text("#error")


def test_an_empty_page_suggests_queries_and_about_says_what_is_measured(page, server):
    page.wait_for_selector("#suggestions button")
    page.click("#suggestions button >> nth=0")
    settled(page)
    assert page.locator("#proponents .card").count() > 0
    page.click("[data-view=about]")
    page.wait_for_selector("#about h2")
    said = page.inner_text("#about")
    (tracked,) = server.client.index.manifest.build.tracked
    assert f"{tracked.parameters:,} of {tracked.of:,}" in said
    assert "nothing was measured" in said
    assert "Component head" in said
    assert "150" in said


def test_two_indexes_stand_side_by_side_and_what_was_measured_of_one_is_shown(page, server, browser, tmp_path):
    other = tmp_path / "other.wherefrom"
    shutil.copytree(server.client.index.path, other)
    record_slope(
        other, Slope(value=0.5, low=0.4, high=0.6, measured_by="a pack", trainings=9, queries=8, lds=0.61, lds_low=0.5, lds_high=0.7)
    )
    both = Server([f"a={server.client.index.path}", f"b={other}"], {"XDG_RUNTIME_DIR": str(tmp_path)})
    try:
        page.goto(both.url)
        page.wait_for_function("document.querySelector('#group').options.length > 1")
        page.select_option("#index", "a")
        ask(page, prompt="w1 w2", completion=" w3", k="5")
        page.click("#pin")
        page.select_option("#index", "b")
        page.wait_for_function("document.querySelector('#unit').textContent.includes('measured slope 0.5')")
        settled(page)
        assert "(a)" in page.inner_text("#pinned-title")
        assert page.inner_text("#pinned-shared") == "5 of 5 proponents are the same."
        page.click("[data-view=about]")
        page.wait_for_selector("#about h2")
        assert "0.61 (0.5 to 0.7)" in page.inner_text("#about")
        assert "a pack" in page.inner_text("#about")
    finally:
        both.stop()


@pytest.mark.parametrize("width", [1280, 375])
def test_labels_of_the_charts_never_collide(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    for completion in (" w3", " w9 w8", " w40"):
        ask(page, prompt="w1 w2", completion=completion)
        collide = """() => [...document.querySelectorAll('#histogram svg, #layers-chart svg')].flatMap((chart) => {
          const boxes = [...chart.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
            p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom).map(([b]) => `${a} / ${b}`));
        })"""
        assert page.evaluate(collide) == []


def test_baselines_show_their_texts(page, server):
    pytest.importorskip("bm25s")
    page.check("#baselines")
    ask(page, prompt="w1 w2", completion=" w3")
    (bm25,) = [b for b in server.client.query(prompt="w1 w2", completion=" w3", baselines=True).baselines if b.name == "bm25"]
    text = server.client.index.example(bm25.rows[0]).text
    page.wait_for_function(f"document.querySelector('#baselines-list').textContent.includes({json.dumps(text[:40])})")


def test_the_interface_page_lists_every_path(page, server):
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("h2")
    shown = page.inner_text("main")
    for path in ("/v1/query", "/v1/explain", "/healthz", "examples (required)"):
        assert path in shown


def test_the_policy_admits_what_the_page_needs_and_no_more(browser, server):
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(server.url)
    page.fill("#prompt", "w1 w2")
    page.fill("#completion", " w3")
    page.click("#go")
    page.wait_for_selector("#proponents .heat-for")
    page.wait_for_selector("#histogram svg")
    assert said == []
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {src: 'http://127.0.0.1:9/x.js'}))")
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_a_page_on_another_port_cannot_ask(browser, server, tmp_path):
    """The browser itself says that the request comes from elsewhere; without an answer there is no time to measure."""
    import http.server
    import threading
    from functools import partial

    (tmp_path / "index.html").write_text("<p>elsewhere</p>")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    counted = 'wherefrom_responses_total{path="/v1/query",status="200"}'

    def answered():
        metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        return [line for line in metrics.splitlines() if line.startswith(counted)]

    before = answered()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{other.server_port}/")
    url = f"{server.url}/v1/query?q=%7B%22row%22%3A1%7D"
    page.evaluate("url => fetch(url, {mode: 'no-cors'}).then(() => 'done', () => 'refused')", url)
    page.wait_for_timeout(300)
    page.close()
    other.shutdown()
    assert answered() == before
