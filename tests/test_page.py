"""The voice-search page in a real Chromium, with a fake microphone that plays a clip."""
import os, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import numpy as np
import pytest
from conftest import CHROMIUM, chromium, connect

from voicelab.audio import read_audio, wav_bytes, write_wav
from voicelab.core import write_jsonl
from voicelab.evaluate import counts
from voicelab.export import toy_tones
from voicelab.importers import import_corpus
from voicelab.keys import Keys
from voicelab.recognizer import load_recognizer
from voicelab.registry import Registry
from voicelab.requestlog import RequestLog
from voicelab.server import server
from voicelab.synth import make_voicesearch
from voicelab.text import normalize

playwright = pytest.importorskip("playwright.sync_api")
SAID = "a bad cab"
LEVEL = "document.getElementById('level').getBoundingClientRect().width / document.querySelector('.meter').getBoundingClientRect().width"


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
    return write_wav(tmp_path_factory.mktemp("mic") / "clip.wav", np.r_[np.zeros(16000), toy_tones(SAID), np.zeros(16000 * 4)].astype(np.float32))


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


def speak(page, how="key", ms=3500):
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


def becomes(page, condition, seconds=20):
    "Wait until JavaScript says so; playwright's own way is an eval in the page, which its content-security policy forbids."
    end = time.time() + seconds
    while not page.evaluate(condition):
        assert time.time() < end, condition
        page.wait_for_timeout(30)


def test_tap_starts_and_tap_stops(page):
    "A short click starts and the next one stops; in between the level meter rises with the speech and falls after it."
    page.click("#talk", delay=30)
    page.wait_for_selector("[data-state=recording]")
    becomes(page, f"({LEVEL}) > .5")                                            # the tones
    page.wait_for_timeout(2500)
    becomes(page, f"({LEVEL}) === 0")                                           # and the silence after them
    assert page.get_attribute("body", "data-state") == "recording"
    page.click("#talk", delay=30)
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID


def test_touch(browser, url, toy_home, monkeypatch):
    "A phone: a finger ticks a choice, starts and stops; the log knows that it was a finger."
    monkeypatch.setenv("VOICELAB_HOME", str(toy_home))
    context = browser.new_context(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, device_scale_factor=2, permissions=["microphone"])
    page = context.new_page()
    page.goto(url)
    page.tap("input[value=metrics]")
    page.tap("#talk")
    page.wait_for_selector("[data-state=recording]")
    page.wait_for_timeout(3500)
    page.tap("#talk")
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID and page.inner_text("#kept") == "Kept: measurements"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and RequestLog().rows().iloc[-1].device == "touch"
    page.tap("#forget")
    shows(page, "#consent-state", "Deleted: 1 search")
    context.close()


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
    return page.evaluate(LEVEL)


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


def test_yes(page, toy_home, monkeypatch):
    "Yes by keyboard is one answer, kept with its search; the question goes away."
    monkeypatch.setenv("VOICELAB_HOME", str(toy_home))
    page.check("input[value=transcript]")
    speak(page, "mouse")
    shows(page, "#kept", "Kept: the words")
    sent = outgoing(page)
    page.focus("#right")
    page.keyboard.press("Enter")
    shows(page, "#thanks", "Your answer was kept")
    row = RequestLog().rows().iloc[-1]
    assert len(sent) == 1 and page.locator("#feedback").is_hidden() and (row.text, bool(row.correct)) == (SAID, True)
    page.click("#forget")
    shows(page, "#consent-state", "Deleted: 1 search")


def test_refused_microphone(chromiums, microphone, url):
    "The browser refuses the microphone: the page says what to do; once it is allowed the same button records."
    browser = chromiums.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--deny-permission-prompts", "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}"])
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.click("#talk", delay=30)
    shows(page, "#problem-text", "The microphone is blocked. Allow it")
    assert page.inner_text("#status") == "Ready"
    context.grant_permissions(["microphone"])
    speak(page)
    page.wait_for_selector("#transcript .w")
    assert page.inner_text("#transcript") == SAID and page.locator("#problem").is_hidden()
    browser.close()


def test_no_microphone(chromiums, url):
    browser = chromiums.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_context(permissions=["microphone"]).new_page()
    page.goto(url)
    if page.evaluate("navigator.mediaDevices.enumerateDevices().then((all) => all.some((d) => d.kind === 'audioinput'))"): pytest.skip("this machine has a microphone")
    page.click("#talk", delay=30)
    shows(page, "#problem-text", "No microphone was found")
    assert page.inner_text("#status") == "Ready"
    browser.close()


def tabbed(page, n):
    "What the Tab key visits, in order: an element's id, or a choice's name."
    seen = []
    for _ in range(n):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(e => e.id || e.value || e.tagName)(document.activeElement)"))
    return seen


def test_keyboard_reaches_everything(page):
    "Tab visits everything in the order of the page; the space bar on a choice ticks it and does not record; the correction box is reached and sent by keys alone."
    page.focus("#talk")
    assert tabbed(page, 5) == ["handsfree", "metrics", "transcript", "audio", "training"]
    page.focus("input[value=metrics]")
    page.keyboard.press("Space")
    assert page.is_checked("input[value=metrics]") and page.get_attribute("body", "data-state") == "idle"
    page.focus("#talk")
    speak(page)
    shows(page, "#kept", "Kept: measurements")
    page.focus("#talk")
    assert tabbed(page, 10) == ["handsfree", "right", "wrong", "A", "metrics", "transcript", "audio", "training", "forget", "BODY"]
    page.focus("#wrong")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "correction"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    shows(page, "#thanks", "kept, without the words")
    page.focus("#forget")
    page.keyboard.press("Space")
    shows(page, "#consent-state", "Deleted: 1 search")
    assert page.get_attribute("body", "data-state") == "idle"


@pytest.mark.parametrize("path,words", [("ops", "voicesearch@1"), ("docs", "POST /v1/audio/transcriptions")])
def test_other_pages(page, url, path, words):
    page.goto(f"{url}/{path}")
    shows(page, "body", words)


@pytest.fixture(scope="module")
def base(base_home):
    "(address, API key) of a server with the base model, over the built-in documents, which has place for two clips and one stream."
    key = Keys(base_home / "keys" / "api.json").add("page")
    with server(env=dict(VOICELAB_HOME=str(base_home), VOICELAB_LOG_LEVEL="off", VOICELAB_QUEUE="1", VOICELAB_BATCH="1", VOICELAB_STREAMS="1")) as url: yield url, key


def opened(browser, base, **more):
    "The page of a server that wants keys, with one; phone-sized, unless a viewport is given."
    url, key = base
    page = browser.new_page(**{"viewport": dict(width=390, height=844), **more})
    page.set_default_timeout(60_000)
    page.add_init_script(f"sessionStorage.setItem('key', '{key}')")
    page.goto(url)
    return page


def test_asks_for_a_key(browser, base):
    "A server with keys: the page asks for one, says when it is wrong, and with the right one sends what was said."
    url, key = base
    page = browser.new_context(permissions=["microphone"]).new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    statuses = []
    page.on("response", lambda r: statuses.append(r.status) if "/v1/search" in r.url else None)
    speak(page)
    shows(page, "#problem-text", "This server asks for an API key")
    assert page.evaluate("document.activeElement.id") == "key-text"
    page.keyboard.type("vl-wrong")
    page.keyboard.press("Enter")
    shows(page, "#problem-text", "did not accept this API key")
    page.fill("#key-text", key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer:visible")
    assert statuses == [401, 401, 200] and page.locator("#problem").is_hidden() and page.locator("#key").is_hidden()
    page.context.close()


def test_full_server(browser, base):
    "Other people's long clips fill the server: the page says so and tries again, and in the end leaves it to a button; once there is place it is answered."
    url, key = base
    other, left = wav_bytes(np.tile(toy_tones(SAID), 340)), Event()                      # twelve minutes
    def ask(clip): return httpx.post(f"{url}/v1/search", files=dict(file=clip), headers=dict(Authorization=f"Bearer {key}"), timeout=300).status_code
    def stay():
        while not left.is_set(): ask(other) == 503 and left.wait(.1)
    page, statuses = opened(browser, base, permissions=["microphone"]), []
    page.on("response", lambda r: statuses.append(r.status) if "/v1/search" in r.url else None)
    with ThreadPoolExecutor(4) as people:
        for _ in range(4): people.submit(stay)
        try:
            while ask(wav_bytes(toy_tones(SAID))) != 503: time.sleep(.1)
            for _ in range(5):                                                           # now and then one gets through
                before = len(statuses)
                speak(page, ms=2500)
                while len(statuses) == before: page.wait_for_timeout(50)
                if statuses[before] == 503: break
            shows(page, "#status", "The server is busy. Trying again in")
        finally: left.set()
    page.wait_for_selector("#answer:visible, #again:visible", timeout=120_000)
    if page.is_visible("#again"):
        assert "busy with other people" in page.inner_text("#problem-text")
        page.click("#again")
    page.wait_for_selector("#answer:visible", timeout=60_000)
    assert 503 in statuses and statuses[-1] == 200 and page.locator("#problem").is_hidden()
    page.context.close()


def test_no_stream_left(browser, base):
    "Somebody else has the only live stream: no words while one speaks, and the search works as ever, without a complaint."
    url, key = base
    with connect(f"{url.replace('http', 'ws')}/vosk", subprotocols=["realtime", f"openai-insecure-api-key.{key}"]) as other:
        other.send('{"config": {"sample_rate": 16000}}')
        page = opened(browser, base, permissions=["microphone"])
        sent = outgoing(page)
        speak(page)
        page.wait_for_selector("#answer:visible")
        assert [what for what, _ in sent] == ["socket", "upload"] and page.locator("#problem").is_hidden()
        page.context.close()


@pytest.mark.parametrize("corpus,db", [("an4", None), ("an4", -40), ("voicesearch", None), ("voicesearch", -40)])
def test_speech_is_heard(request, chromiums, base, corpus, db, tmp_path):
    "The base model, hands-free: of three clips that it never heard, through browser, resampling and network, most words come, and noise before and after them stays here; a synthetic query finds pages."
    if corpus == "an4":
        request.getfixturevalue("corpora")
        table = import_corpus("an4").query("split == 'dev' and 1.5 < duration < 4").drop_duplicates("speaker").head(3)
    else: table = make_voicesearch(tmp_path / "corpus", dict(test=40), seed=3).query("1.5 < duration < 4").head(3)
    errors = words = found = 0
    for i, row in enumerate(table.itertuples()):
        x = np.r_[np.zeros(8000 if db is None else 32000), read_audio(row.audio_filepath), np.zeros(16000 * 6)]
        if db: x = np.clip(x + noise(len(x) / 16000, db), -1, 1)
        browser = chromium(chromiums, write_wav(tmp_path / f"{i}.wav", x.astype(np.float32)))
        page = opened(browser, base)
        sent = outgoing(page)
        page.check("#handsfree")
        page.wait_for_selector("#transcript .w")
        uploads, frames = ([n / 32000 for what, n in sent if what == kind] for kind in ("upload", "frame"))
        assert len(uploads) == 1 and max(uploads[0], sum(frames)) < row.duration + 2, (uploads, sum(frames), row.duration)
        c = counts(row.text, normalize(page.inner_text("#transcript")))
        errors, words, found = errors + c["errors"], words + c["words"], found + page.locator("#results li").count()
        browser.close()
    assert len(table) == 3 and errors <= .35 * words, (errors, words)
    assert corpus == "an4" or found


def test_pictures(chromiums, base, base_home, tmp_path):
    "Pictures for the README, when asked for: VOICELAB_PICTURES=reports/pictures. The base model hears a query of the default corpus."
    folder = os.environ.get("VOICELAB_PICTURES")
    if not folder: pytest.skip("set VOICELAB_PICTURES to a folder to get pictures")
    recognizer = load_recognizer(registry=Registry(base_home / "registry"))
    table = make_voicesearch(tmp_path / "corpus", dict(test=60), seed=3)
    clips = [read_audio(f) for f in table.audio_filepath]
    heard = recognizer.transcribe(clips)
    right = [(min(w["confidence"] for w in h["words"]), i) for i, h in enumerate(heard) if h["text"] == table.text[i] and 4 <= len(h["words"]) <= 7]
    x = clips[max(right)[1]]
    clip = write_wav(tmp_path / "clip.wav", np.r_[np.zeros(8000), x, np.zeros(64000)].astype(np.float32))
    browser = chromium(chromiums, clip)
    def take(page, name):
        page.screenshot(path=f"{folder}/{name}.png")
        assert Path(folder, f"{name}.png").stat().st_size < 150_000
    for name, more in dict(page=dict(viewport=dict(width=860, height=900)), phone=dict(has_touch=True, is_mobile=True, device_scale_factor=2)).items():
        page = opened(browser, base, **more)
        speak(page, ms=len(x) // 16 + 900)
        page.wait_for_selector("#transcript .w")
        page.mouse.move(5, 5)
        take(page, name)
        page.close()
    page = opened(browser, base)
    page.set_viewport_size(dict(width=860, height=560))
    page.keyboard.down("Space")
    becomes(page, "document.getElementById('partial').textContent.split(' ').length > 2 && document.getElementById('level').style.getPropertyValue('--level') > .5")
    take(page, "listening")
    page.keyboard.up("Space")
    browser.close()
    browser = chromiums.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--deny-permission-prompts", "--use-fake-device-for-media-stream"])
    page = opened(browser, base)
    page.set_viewport_size(dict(width=860, height=560))
    page.click("#talk", delay=30)
    shows(page, "#problem-text", "The microphone is blocked")
    take(page, "refused")
    browser.close()
