"""The voice-search page in a real Chromium, with a fake microphone that plays a clip."""
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import chromium

from voicelab.audio import read_audio, write_wav
from voicelab.core import write_jsonl
from voicelab.evaluate import counts
from voicelab.export import toy_tones
from voicelab.importers import import_corpus
from voicelab.requestlog import RequestLog
from voicelab.server import server
from voicelab.synth import make_voicesearch
from voicelab.text import normalize

playwright = pytest.importorskip("playwright.sync_api")
SAID = "a bad cab"


@pytest.fixture(scope="module")
def url(toy_home, tmp_path_factory):
    "A server with the toy model."
    docs = write_jsonl(tmp_path_factory.mktemp("docs") / "docs.jsonl", [
        dict(id="1", title="A bad cab", url="https://example.org/cab", text="A bad cab is a cab that does not come."),
        dict(id="2", title="<b>Bead</b> café", url="javascript:alert(1)", text="A bad café with <script>alert(1)</script> beads.")])
    with server(env=dict(VOICELAB_HOME=str(toy_home), VOICELAB_SEARCH_DOCS=str(docs))) as url: yield url


@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    "A clip for the fake microphone: it begins to play when the page opens the microphone, and again when it is over."
    return write_wav(tmp_path_factory.mktemp("mic") / "clip.wav", np.r_[np.zeros(8000), toy_tones(SAID), np.zeros(16000 * 4)].astype(np.float32))


@pytest.fixture(scope="module")
def browser(chromiums, microphone):
    "Chromium whose microphone plays the clip."
    browser = chromium(chromiums, microphone)
    yield browser
    browser.close()


@pytest.fixture
def page(browser, url):
    "The page, phone-sized; the test fails if the page reports an error or loads anything from elsewhere."
    context = browser.new_context(viewport=dict(width=390, height=844), permissions=["microphone"])
    page, bad = context.new_page(), []
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.on("console", lambda m: bad.append(m.text) if m.type == "error" and "503" not in m.text else None)
    page.on("request", lambda r: bad.append(r.url) if not r.url.startswith((url, url.replace("http", "ws"), "blob:", "data:")) else None)
    page.goto(url)
    yield page
    context.close()
    assert bad == []


def shows(page, what, words):
    "Wait until an element shows some words."
    playwright.expect(page.locator(what)).to_contain_text(words, timeout=30_000)


def speak(page, how="key", ms=2700):
    "Push, wait, let go."
    if how == "key": page.keyboard.down("Space")
    else:
        page.locator("#talk").scroll_into_view_if_needed()
        box = page.locator("#talk").bounding_box()
        page.mouse.move(box["x"] + 40, box["y"] + 40)
        page.mouse.down()
    page.wait_for_selector("[data-state=recording]")
    page.wait_for_timeout(ms)
    page.keyboard.up("Space") if how == "key" else page.mouse.up()


@pytest.mark.parametrize("how", ["key", "mouse"])
def test_speak_and_find(page, how):
    "Push to talk with the space bar and with the button: words with their confidence, results, nothing kept."
    speak(page, how)
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID
    words = page.locator("#transcript .w")
    assert all("% sure" in words.nth(i).get_attribute("title") for i in range(words.count()))
    assert page.inner_text("#results li:first-child a") == "A bad cab"
    assert page.inner_text("#kept") == "Nothing was kept"
    assert page.locator("#answer").is_visible() and page.locator("#problem").is_hidden()
    for link in page.locator("#results a").all(): assert not (link.get_attribute("href") or "").startswith("javascript")     # a document's text is only text
    assert page.locator("#results script, #results b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"


def test_tap_starts_and_tap_stops(page):
    page.click("#talk", delay=30)
    page.wait_for_selector("[data-state=recording]")
    page.wait_for_timeout(2700)
    level = float(page.evaluate("getComputedStyle(document.getElementById('level')).getPropertyValue('--level')"))
    assert 0 <= level <= 1
    page.click("#talk", delay=30)
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID


def test_escape_cancels(page):
    sent = []
    page.on("request", lambda r: sent.append(r.url) if "/v1/search" in r.url else None)
    page.keyboard.down("Space")
    page.wait_for_selector("[data-state=recording]")
    page.wait_for_timeout(800)
    page.keyboard.press("Escape")
    assert page.inner_text("#status") == "Cancelled"
    page.keyboard.up("Space")
    page.wait_for_timeout(500)
    assert page.get_attribute("body", "data-state") == "idle" and sent == []


def test_hands_free(page):
    "The page listens by itself, sends the query when the speaker pauses, and goes on listening; silence is not sent."
    clips = []
    page.on("request", lambda r: clips.append(len(r.post_data_buffer or b"")) if "/v1/search" in r.url else None)
    page.check("#handsfree")
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID
    shows(page, "#status", "Speak when you like")
    page.wait_for_timeout(1500)                                                 # the clip is followed by four seconds of silence
    seconds = len(toy_tones(SAID)) / 16000
    assert len(clips) == 1 and clips[0] / 32000 < seconds + 2, clips
    page.uncheck("#handsfree")
    assert page.get_attribute("body", "data-state") == "idle"


def noise(seconds, db, colour="white", seed=0):
    "Noise of that level against full scale; pink has the same power in every octave above 20 Hz, as a fan or a street does."
    n = int(16000 * seconds)
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=n))
    if colour == "pink": spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(n, 1 / 16000), 20))
    x = np.fft.irfft(spectrum, n)
    return (10 ** (db / 20) * x / x.std()).astype(np.float32)


def outgoing(page):
    "What leaves the page with sound or words in it: uploads (their bytes) and frames on WebSockets (theirs), as they go."
    sent = []
    page.on("request", lambda r: sent.append(("upload", len(r.post_data_buffer or b""))) if r.method == "POST" else None)
    page.on("websocket", lambda w: (sent.append(("socket", 0)), w.on("framesent", lambda frame: sent.append(("frame", len(frame))))))
    return sent


def level(page):
    "How far the level meter stands, 0 to 1, as it is drawn."
    return page.evaluate("document.getElementById('level').getBoundingClientRect().width / document.querySelector('.meter').getBoundingClientRect().width")


@pytest.mark.parametrize("how", ["push", "hands-free"])
def test_silence_is_not_sent(chromiums, url, how, tmp_path):
    "A microphone that hears nothing: the page says so, and neither a request nor a frame leaves it."
    browser = chromium(chromiums, write_wav(tmp_path / "quiet.wav", np.zeros(16000 * 4, np.float32)))
    page = browser.new_context(permissions=["microphone"]).new_page()
    page.goto(url)
    sent = outgoing(page)
    if how == "push":
        speak(page, ms=1000)
        shows(page, "#status", "nothing was sent")
    else:
        page.check("#handsfree")
        shows(page, "#status", "Speak when you like")
        page.wait_for_timeout(2500)
        page.uncheck("#handsfree")
    assert sent == [] and level(page) == 0
    browser.close()


@pytest.mark.parametrize("db", [-40, -30])
@pytest.mark.parametrize("what", ["white", "pink", "switched on"])
def test_noise_is_not_sent(chromiums, url, what, db, tmp_path):
    "Hands-free beside a fan, and beside one that is switched on and off: the meter shows it, and nothing leaves the page."
    x = np.r_[np.zeros(24000), noise(4, db, "pink"), np.zeros(8000)] if what == "switched on" else noise(6, db, what)
    browser = chromium(chromiums, write_wav(tmp_path / "noise.wav", x.astype(np.float32)))
    page = browser.new_context(permissions=["microphone"]).new_page()
    page.goto(url)
    sent, heard = outgoing(page), 0
    page.check("#handsfree")
    shows(page, "#status", "Speak when you like")
    for _ in range(28):
        page.wait_for_timeout(250)
        heard = max(heard, level(page))
    assert heard > .2 and sent == [] and page.inner_text("#status").startswith("Speak when you like"), (heard, sent[:5])
    browser.close()


def test_consent_is_off_and_means_what_it_says(page, toy_home, monkeypatch):
    "All choices start off; with consent the request is kept, can be corrected, and everything of the visit can be deleted."
    monkeypatch.setenv("VOICELAB_HOME", str(toy_home))
    log = RequestLog()
    before = set(log.rows().request_id)
    assert page.locator(".consent input:checked").count() == 0
    speak(page)
    page.wait_for_selector("#transcript .w")
    assert set(log.rows().request_id) == before
    page.check("input[value=transcript]")
    page.check("input[value=audio]")
    assert page.inner_text("#consent-state") == "From the next search on: the words, your voice."
    speak(page, "mouse")
    shows(page, "#kept", "Kept: the recording")
    row = log.rows()[lambda d: ~d.request_id.isin(before)].iloc[0]
    assert (row.text, row.consent, row.device) == (SAID, "metrics,transcript,audio", "desktop") and Path(row.audio_path).read_bytes()[:4] == b"RIFF"
    page.click("#wrong")
    assert page.input_value("#correction") == SAID
    page.fill("#correction", "a bad cab please")
    page.keyboard.press("Enter")
    shows(page, "#thanks", "was kept")
    assert log.rows().set_index("request_id").correction[row.request_id] == "a bad cab please"
    page.click("#forget")
    shows(page, "#consent-state", "Deleted: 1 search, 1 recording")
    assert set(log.rows().request_id) == before and not Path(row.audio_path).exists()


def test_busy_server(page):
    "A 503 is said, waited for and tried again; when it does not end there is a button."
    answers = []
    def refuse(route):
        answers.append(1)
        route.fulfill(status=503, headers={"Retry-After": "1"}, json=dict(error=dict(message="busy"))) if len(answers) <= 4 else route.fallback()
    page.route("**/v1/search", refuse)
    speak(page)
    shows(page, "#status", "busy")
    page.wait_for_selector("#again:visible")
    assert "busy" in page.inner_text("#problem-text") and len(answers) == 4
    page.click("#again")
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID and page.locator("#problem").is_hidden()


@pytest.mark.parametrize("name,words", [("NotAllowedError", "blocked"), ("NotFoundError", "No microphone was found")])
def test_refused_microphone(page, name, words):
    page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', '{name}')) }}")
    page.click("#talk")
    page.wait_for_selector("#problem:visible")
    assert words in page.inner_text("#problem-text") and page.inner_text("#status") == "Ready"


def test_keyboard_reaches_everything(page):
    "Tab visits the button and every consent choice; the space bar there ticks the box and does not record."
    page.focus("#talk")
    seen = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.value || document.activeElement.id"))
    assert {"metrics", "transcript", "audio", "training"} <= set(seen)
    page.focus("input[value=metrics]")
    page.keyboard.press("Space")
    assert page.is_checked("input[value=metrics]") and page.get_attribute("body", "data-state") == "idle"


@pytest.mark.parametrize("path,words", [("ops", "voicesearch@1"), ("docs", "POST /v1/audio/transcriptions")])
def test_other_pages(page, url, path, words):
    page.goto(f"{url}/{path}")
    shows(page, "body", words)


@pytest.fixture(scope="module")
def base_url(base_home):
    "A server with the base model, over the built-in documents."
    with server(env=dict(VOICELAB_HOME=str(base_home), VOICELAB_LOG_LEVEL="off")) as url: yield url


@pytest.mark.parametrize("corpus", ["an4", "voicesearch"])
def test_speech_is_heard(request, chromiums, base_url, corpus, tmp_path):
    "The base model, hands-free: of three clips that it never heard, through browser, resampling and network, most words come; a synthetic query finds pages."
    if corpus == "an4":
        request.getfixturevalue("corpora")
        table = import_corpus("an4").query("split == 'dev' and 1.5 < duration < 4").drop_duplicates("speaker").head(3)
    else: table = make_voicesearch(tmp_path / "corpus", dict(test=40), seed=3).query("1.5 < duration < 4").head(3)
    errors = words = found = 0
    for i, row in enumerate(table.itertuples()):
        clip = write_wav(tmp_path / f"{i}.wav", np.r_[np.zeros(8000), read_audio(row.audio_filepath), np.zeros(16000 * 6)].astype(np.float32))
        browser = chromium(chromiums, clip)
        page = browser.new_page(viewport=dict(width=390, height=844))
        page.goto(base_url)
        page.check("#handsfree")
        page.wait_for_selector("#transcript .w", timeout=60_000)
        c = counts(row.text, normalize(page.inner_text("#transcript")))
        errors, words, found = errors + c["errors"], words + c["words"], found + page.locator("#results li").count()
        browser.close()
    assert len(table) == 3 and errors <= .35 * words, (errors, words)
    assert corpus == "an4" or found


def test_picture(request, chromiums, tmp_path):
    "A picture for the README, when asked for: VOICELAB_PICTURES=reports/pictures. The base model hears a query of the default corpus."
    folder = os.environ.get("VOICELAB_PICTURES")
    if not folder: pytest.skip("set VOICELAB_PICTURES to a folder to get a picture")
    from voicelab.recognizer import load_recognizer
    from voicelab.registry import Registry
    home = request.getfixturevalue("base_home")
    recognizer = load_recognizer(registry=Registry(home / "registry"))
    clips = [(r.text, read_audio(r.audio_filepath)) for r in make_voicesearch(tmp_path / "corpus", dict(test=60), seed=3).itertuples()]
    heard = recognizer.transcribe([x for _, x in clips])
    good = [x for (text, x), h in zip(clips, heard) if text == h["text"] and 5 <= len(h["words"]) <= 7]
    x = (good or [clips[0][1]])[0]
    clip = write_wav(tmp_path / "clip.wav", np.r_[np.zeros(8000), x, np.zeros(64000)].astype(np.float32))
    with server(env=dict(VOICELAB_HOME=str(home))) as url:
        browser = chromium(chromiums, clip)
        page = browser.new_page(viewport=dict(width=860, height=960))
        page.goto(url)
        speak(page, ms=len(x) // 16 + 900)
        page.wait_for_selector("#transcript .w")
        page.screenshot(path=f"{folder}/page.png")
        browser.close()
    assert Path(folder, "page.png").stat().st_size < 200_000
