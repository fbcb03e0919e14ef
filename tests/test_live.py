"""The base model behind the real server: live speech through OpenAI's own realtime client and a plain vosk-style one, many streams at once, clients that vanish, long files, recordings of people."""
import asyncio, base64, json, shutil, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import soxr
from conftest import chromium, connect
from rapidfuzz import fuzz
from starlette.testclient import TestClient

from voicelab.audio import read_audio, wav_bytes, write_wav
from voicelab.core import read_json, write_json
from voicelab.evaluate import wer
from voicelab.export import toy_tones
from voicelab.importers import import_corpus
from voicelab.live import add_live
from voicelab.recognizer import Recognizer, load_recognizer
from voicelab.requestlog import RequestLog
from voicelab.serve import Models, Service, build_app
from voicelab.server import server
from voicelab.synth import make_voicesearch


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A dozen queries by voices that no training heard, without their surroundings: text and samples."
    df = make_voicesearch(tmp_path_factory.mktemp("live"), dict(test=12), seed=3).query("split == 'test'")
    return [(t, read_audio(p)) for t, p in zip(df.text, df.audio_filepath)]


@pytest.fixture(scope="module")
def url(base_home):
    with server(env=dict(VOICELAB_HOME=str(base_home), VOICELAB_STREAMS="12")) as url: yield url


def raw(samples) -> bytes: return np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def pieces(samples, rate, ms=100):
    "The clip between a second of faint hiss before and after, in pieces, as a phone sends it."
    hiss = np.random.default_rng(0).normal(0, 1e-3, rate).astype(np.float32)
    x = np.concatenate([hiss, soxr.resample(samples, 16000, rate), hiss])
    step = rate * ms // 1000
    return [raw(x[i:i + step]) for i in range(0, len(x), step)]


def posted(url, samples) -> str:
    return httpx.post(f"{url}/v1/audio/transcriptions", files=dict(file=("a.wav", wav_bytes(samples))), timeout=60).json()["text"]


def realtime(url, samples, rate=24000, turns=True, **ours):
    "The events that OpenAI's client receives for one clip."
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    events = []
    with client.realtime.connect(model="gpt-4o-transcribe", extra_query=dict(intent="transcription")) as c:
        session = dict(type="transcription", audio=dict(input=dict(format=dict(type="audio/pcm", rate=rate), transcription=dict(model="whisper-1", language="en"))))
        if not turns: session["audio"]["input"]["turn_detection"] = None
        c.session.update(session=session | (dict(voicelab=ours) if ours else {}))
        for p in pieces(samples, rate) if turns else [raw(soxr.resample(samples, 16000, rate))]: c.input_audio_buffer.append(audio=base64.b64encode(p).decode())
        if not turns: c.input_audio_buffer.commit()
        for e in c:
            events.append(e)
            assert e.type != "error", e
            if e.type.endswith(("completed", "failed")): return events


def test_openai_realtime(url, clips):
    "The words come while the person speaks, add up to the transcript, and that is the transcript of the HTTP route."
    texts, same, whole = [], [], 0
    for text, samples in clips[:6]:
        events = realtime(url, samples)
        kinds = [e.type for e in events]
        assert kinds[:2] == ["session.created", "session.updated"]
        order = [kinds.index(f"input_audio_buffer.{k}") for k in ("speech_started", "speech_stopped", "committed")]
        assert order == sorted(order)
        done = events[-1]
        whole += "".join(e.delta for e in events if e.type.endswith("delta")) == done.transcript
        assert done.usage.type == "duration" and done.item_id == events[order[0]].item_id
        texts.append(done.transcript)
        same.append(posted(url, samples))
    assert whole >= 4                                                          # a word that two partials agreed on may still be another in the end
    assert wer(same, texts) < .15, (same, texts)
    assert wer([t for t, _ in clips[:6]], texts) < .35


def test_realtime_async_client(url, clips):
    async def talk():
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        async with client.realtime.connect(model="gpt-4o-transcribe", extra_query=dict(intent="transcription")) as c:
            await c.session.update(session=dict(type="transcription", audio=dict(input=dict(format=dict(type="audio/pcm", rate=24000), turn_detection=None))))
            await c.input_audio_buffer.append(audio=base64.b64encode(raw(soxr.resample(clips[0][1], 16000, 24000))).decode())
            await c.input_audio_buffer.commit()
            async for e in c:
                if e.type.endswith("completed"): return e.transcript
    assert asyncio.run(talk())


def talked(connection, samples, rate, turns) -> str:
    "What OpenAI's protocol gives for a stream that the client commits at its last sample, with or without detection of turns."
    turn = {} if turns else dict(turn_detection=None)
    connection.send(json.dumps(dict(type="session.update", session=dict(audio=dict(input=dict(format=dict(type="audio/pcm", rate=rate), **turn))))))
    for i in range(0, len(samples), rate // 10): connection.send(json.dumps(dict(type="input_audio_buffer.append", audio=base64.b64encode(raw(samples[i:i + rate // 10])).decode())))
    for last in ("commit", "clear"): connection.send(json.dumps(dict(type=f"input_audio_buffer.{last}")))
    texts = []
    while (e := json.loads(connection.recv()))["type"] != "input_audio_buffer.cleared":
        assert e["type"] != "error", e
        if e["type"].endswith("completed"): texts.append(e["transcript"])
    return " ".join(t for t in texts if t)


def talked_to_vosk(connection, samples, rate) -> str:
    "The same for vosk's, ended by eof at the last sample."
    connection.send(json.dumps(dict(config=dict(sample_rate=rate))))
    texts = []
    for i in range(0, len(samples), rate // 4):
        connection.send(raw(samples[i:i + rate // 4]))
        texts.append(json.loads(connection.recv()).get("text", ""))
    connection.send('{"eof" : 1}')
    return " ".join(t for t in [*texts, json.loads(connection.recv())["text"]] if t)


def lost(cut, calm) -> bool:
    "Is the end missing? A letter of a word that is guessed anyway may come out otherwise."
    return fuzz.ratio(*(t.split()[-1] if t else "" for t in (cut, calm))) < 60 or len(cut.replace(" ", "")) < len(calm.replace(" ", "")) - 2


@pytest.mark.parametrize("way,rate", [("commit", 8000), ("commit", 16000), ("commit", 48000), ("turns", 16000), ("turns", 24000), ("vosk", 8000), ("vosk", 16000)])
def test_last_words_are_not_lost(url, clips, way, rate):
    "Speech up to the last sample, committed by the client or ended by eof, with detection and without: of twelve texts none loses its end, and they are those that come when a silence follows."
    def heard(samples):
        with connect(url.replace("http", "ws") + ("/vosk" if way == "vosk" else "/v1/realtime")) as ws:
            return talked_to_vosk(ws, samples, rate) if way == "vosk" else talked(ws, samples, rate, way == "turns")
    pairs = []
    for _, samples in clips:
        loud = np.flatnonzero(np.abs(samples) > .05 * np.abs(samples).max())
        cut = soxr.resample(samples[:loud[-1] + 1], 16000, rate)
        pairs.append((heard(cut), heard(np.concatenate([cut, np.zeros(int(.4 * rate), np.float32)]))))
    assert len(pairs) == 12 and not [p for p in pairs if lost(*p)], pairs
    assert sum(a == b for a, b in pairs) >= (8 if rate == 8000 else 10), [p for p in pairs if p[0] != p[1]]


def test_last_tone_is_not_lost(toy_home, tmp_path, monkeypatch):
    "The same with sounds whose text is known to the letter: twelve, each cut at the last sample of its last tone, come out whole."
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path))
    bundle = toy_home / "registry" / "voicesearch" / "1"
    service = Service(Models(lambda: (bundle, "toy@1"), lambda folder, label: Recognizer(folder, label=label)), RequestLog())
    rng, client = np.random.default_rng(0), TestClient(add_live(build_app(service), service))
    texts = [" ".join("".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(rng.integers(1, 5))) for _ in range(12)]
    for rate in (16000, 48000):
        for text in texts:
            samples = toy_tones(text)
            cut = soxr.resample(samples[:np.flatnonzero(np.abs(samples) > .05)[-1] + 1], 16000, rate)
            with client.websocket_connect("/v1/realtime") as ws: assert talked(SimpleNamespace(send=ws.send_text, recv=ws.receive_text), cut, rate, turns=False) == text


def test_a_stream_under_a_policy_reads_what_the_file_reads(base_bundle, clips, tmp_path, monkeypatch):
    "A model with an audio policy: a soft clip between seconds of hiss, streamed, is cut as it comes; as a file it is cut when it is whole. Both have the same words, and those of the query."
    monkeypatch.setenv("VOICELAB_HOME", str(tmp_path))
    bundle = shutil.copytree(base_bundle, tmp_path / "bundle")
    write_json(bundle / "config.json", read_json(bundle / "config.json") | dict(policy=dict(level=True, trim=True)))
    service = Service(Models(lambda: (bundle, "policy@1"), lambda folder, label: Recognizer(folder, label=label)), RequestLog())
    client, pairs, rng = TestClient(add_live(build_app(service), service)), [], np.random.default_rng(0)
    def soft(x): return (.05 * np.concatenate([rng.normal(0, 2e-3, 24000), x, rng.normal(0, 2e-3, 24000)])).astype(np.float32)
    for samples in (soft(x) for _, x in clips):
        with client.websocket_connect("/v1/realtime") as ws: streamed = talked(SimpleNamespace(send=ws.send_text, recv=ws.receive_text), samples, 16000, turns=True)
        whole = client.post("/v1/audio/transcriptions", files=dict(file=("a.wav", wav_bytes(samples)))).json()["text"]
        pairs.append((whole, streamed))
    assert wer(*map(list, zip(*pairs))) < .1, pairs
    assert wer([t for t, _ in clips], [s for _, s in pairs]) < .35, pairs


def test_vosk_client(url, clips):
    "A client written for vosk-server: its way of talking, its default rate, its answers."
    heard, expected = [], []
    for text, samples in clips[:4]:
        with connect(url.replace("http", "ws") + "/vosk") as ws:
            ws.send(json.dumps(dict(config=dict(sample_rate=16000))))
            texts = []
            for p in pieces(samples, 16000, 250):
                ws.send(p)
                answer = json.loads(ws.recv())
                assert ("partial" in answer) != ("text" in answer)
                if answer.get("text"):
                    texts.append(answer["text"])
                    assert [w["word"] for w in answer["result"]] == answer["text"].split() and all(0 < w["start"] <= w["end"] and 0 <= w["conf"] <= 1 for w in answer["result"])
            ws.send('{"eof" : 1}')
            texts.append(json.loads(ws.recv())["text"])
        heard.append(" ".join(t for t in texts if t))
        expected.append(posted(url, samples))
    assert wer(expected, heard) < .15, (expected, heard)
    with connect(url.replace("http", "ws") + "/vosk") as ws:                       # nobody speaks: empty texts, no failure
        ws.send(bytes(16000))
        assert json.loads(ws.recv()) == dict(partial="")
        ws.send('{"eof" : 1}')
        assert json.loads(ws.recv()) == dict(text="")


def test_vosk_alternatives_and_receipts(url, clips, base_home, monkeypatch):
    "With max_alternatives, several readings that differ, best first; with consent, the request's id and a receipt that takes the recording back."
    monkeypatch.setenv("VOICELAB_HOME", str(base_home))
    before = len(RequestLog().rows())
    with connect(url.replace("http", "ws") + "/vosk") as ws:
        ws.send(json.dumps(dict(config=dict(sample_rate=16000, max_alternatives=5, voicelab=dict(consent="transcript,audio")))))
        ws.send(raw(clips[0][1]))
        first = json.loads(ws.recv())
        ws.send('{"eof" : 1}')
        finals = [r for r in (first, json.loads(ws.recv())) if r.get("voicelab")]
    best = finals[0]["alternatives"]
    assert len(best) == 5 == len({a["text"] for a in best}) and [a["confidence"] for a in best] == sorted((a["confidence"] for a in best), reverse=True)
    assert [w["word"] for w in best[0]["result"]] == best[0]["text"].split() and not any("result" in a for a in best[1:])
    rows = RequestLog().rows().set_index("request_id")
    kept = [k for f in finals for k in f["voicelab"]["requests"]]
    assert {k["logged"] for k in kept} == {"audio"} and rows.text[kept[0]["request_id"]] == best[0]["text"] and len(rows) == before + len(kept)
    for k in kept: assert httpx.delete(f"{url}/v1/subjects/{k['receipt']}", timeout=60).json()["rows"] == 1


def test_consent_decides_what_is_kept_of_live_speech(url, clips, base_home, monkeypatch):
    monkeypatch.setenv("VOICELAB_HOME", str(base_home))
    before = len(RequestLog().rows())
    quiet = realtime(url, clips[0][1], turns=False)[-1].to_dict()["voicelab"]
    assert quiet["logged"] == "none" and len(RequestLog().rows()) == before
    kept = realtime(url, clips[0][1], turns=False, consent="transcript,audio", region="NO")[-1].to_dict()["voicelab"]
    row = RequestLog().rows().set_index("request_id").loc[kept["request_id"]]
    assert (kept["logged"], row.region, row.text != "") == ("audio", "NO", True)
    assert httpx.delete(f"{url}/v1/subjects/{kept['receipt']}", timeout=60).json()["rows"] == 1
    assert len(RequestLog().rows()) == before


def test_many_streams_one_vanishes(url, clips):
    "Eight people speak at once, and two connections break in the middle of a word: the eight get their texts, and the places are free again."
    def vanish():
        ws = connect(url.replace("http", "ws") + "/vosk")
        ws.send(raw(clips[0][1])[:20000])
        ws.socket.close()                                                                 # no goodbye
    texts = {}
    def speak(i): texts[i] = realtime(url, clips[i][1])[-1].transcript
    threads = [threading.Thread(target=speak, args=(i,)) for i in range(8)] + [threading.Thread(target=vanish) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert sorted(texts) == list(range(8))
    assert wer([posted(url, clips[i][1]) for i in range(8)], [texts[i] for i in range(8)]) < .15
    end = time.time() + 30
    while "voicelab_streams 0.0" not in httpx.get(f"{url}/metrics", timeout=60).text and time.time() < end: time.sleep(.5)
    assert "voicelab_streams 0.0" in httpx.get(f"{url}/metrics", timeout=60).text


@pytest.fixture(scope="module")
def recording(clips):
    "Two minutes: the clips one after the other with pauses, as FLAC, and what was said."
    hush = np.random.default_rng(1).normal(0, 3e-4, 24000).astype(np.float32)
    samples = np.concatenate([p for _, c in clips * 4 for p in (c, hush)])[:130 * 16000]
    return wav_bytes(samples, format="FLAC"), samples


def test_long_recording_is_cut_into_utterances(url, clips, recording):
    "As good as its parts, with times in the recording."
    flac, samples = recording
    r = httpx.post(f"{url}/v1/audio/transcriptions", files=dict(file=("a.flac", flac)), data=dict(response_format="verbose_json"), timeout=120).json()
    assert abs(r["duration"] - len(samples) / 16000) < .01
    starts = [w["start"] for w in r["words"]]
    assert starts == sorted(starts) and starts[-1] > 100 and r["text"].split() == [w["word"] for w in r["words"]]
    said, n = [], 0
    for text, c in clips * 4:
        n += len(c) + 24000
        if n > len(samples): break
        said.append((text, posted(url, c)) if len(said) < len(clips) else (text, said[len(said) - len(clips)][1]))
    heard = " ".join(w["word"] for w in r["words"] if w["end"] <= (n - len(c)) / 16000 + .3 or n <= len(samples))
    assert wer([" ".join(p for _, p in said)], [heard]) < .15


def test_long_recording_is_streamed_as_it_is_done(url, recording):
    "OpenAI's client gets the first words long before the last; the sum of the deltas is the transcript."
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    times, text, start = [], "", time.time()
    for e in client.audio.transcriptions.create(model="whisper-1", file=("a.flac", recording[0]), stream=True):
        times.append(time.time() - start)
        if e.type == "transcript.text.delta": text += e.delta
        else: done = e
    assert text == done.text and len(times) > 10 and times[0] < .6 * times[-1], times
    assert done.to_dict()["voicelab"]["logged"] == "none"


def test_bad_frames_do_not_end_the_server(url):
    "Random texts, huge numbers, wrong types: an error event or a closed connection, and the next one is served."
    rng = np.random.default_rng(0)
    bad = ["", "null", "[]", "{", '{"type": 1}', '{"type": "session.update", "session": []}', '{"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 1e99}}}}}',
           '{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": "x"}}}}}', '{"type": "input_audio_buffer.append"}',
           '{"type": "input_audio_buffer.append", "audio": 7}', '{"type": "session.update", "session": {"voicelab": {"consent": ["audio"]}}}', '{"type": "session.update", "session": {"include": 7}}', '{"type": "session.update", "session": {"audio": {"input": {"transcription": {"language": 7}}}}}', "[" * 5000, bytes(rng.integers(0, 256, 999, np.uint8).tolist())]
    with connect(url.replace("http", "ws") + "/v1/realtime") as ws:
        assert json.loads(ws.recv())["type"] == "session.created"
        for b in bad:
            ws.send(b)
            assert json.loads(ws.recv())["type"] == "error", b
    for b in bad[:6] + ['{"config": {"sample_rate": "x"}}', '{"config": {"phrase_list": [7]}}', '{"config": {"max_alternatives": true}}', '{"config": {"model": 7}}', '{"config": {"words": "yes"}}', b"odd"]:
        with connect(url.replace("http", "ws") + "/vosk") as ws:
            ws.send(b)
            assert "error" in json.loads(ws.recv()), b
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


# ---- the page

def test_words_appear_while_somebody_speaks(chromiums, url, tmp_path):
    "On the page: words are on the page before the button is let go."
    row = make_voicesearch(tmp_path / "clips", dict(test=1), seed=3).query("split == 'test'").iloc[0]
    spoken = chromium(chromiums, write_wav(tmp_path / "spoken.wav", np.r_[np.zeros(8000), read_audio(row.audio_filepath), np.zeros(48000)].astype(np.float32)))
    page = spoken.new_context(permissions=["microphone"]).new_page()
    page.goto(url)
    page.keyboard.down("Space")
    page.wait_for_selector("#partial:not(:empty)", timeout=30_000)
    assert page.get_attribute("body", "data-state") == "recording"
    page.wait_for_timeout(round(1000 * row.duration))
    page.keyboard.up("Space")
    page.wait_for_selector("#transcript .w, #transcript em")
    assert page.inner_text("#partial") == ""
    spoken.close()


# ---- recordings of people, through OpenAI's client

def test_an4_dev_through_openai_client(url, base_home, corpora, monkeypatch):
    "AN4's dev speakers: what the endpoint answers is what the recogniser says in process, so the word error rate is the same."
    monkeypatch.setenv("VOICELAB_HOME", str(base_home))
    df = import_corpus("an4").query("split == 'dev'").reset_index(drop=True)
    assert len(df) == 102
    recognizer = load_recognizer()
    inside = [recognizer.transcribe([read_audio(f)])[0]["text"] for f in df.audio_filepath]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    with ThreadPoolExecutor(4) as pool:
        outside = list(pool.map(lambda f: client.audio.transcriptions.create(file=Path(f), model="voicesearch").text, df.audio_filepath))
    one, other = wer(df.text, inside), wer(df.text, outside)
    print(f"AN4 dev WER in process {one:.4f}, through the endpoint {other:.4f}, texts that differ {sum(a != b for a, b in zip(inside, outside))}")
    assert abs(one - other) < .003
    assert other < .22

