"""The page's server over loopback, with samples that take no time: streams, lines, refusals."""

import base64
import concurrent.futures
import io
import json
import re
import socket
import struct
import threading

import numpy as np
import pytest
from growing import Gate, GrowingModel, events, grow, make_studio, send, serving
from PIL import Image
from tiny import TINY

from djepa_jax.main import main
from djepa_jax.serving import server as server_module
from djepa_jax.serving.server import MAX_BODY, Line, Server, run_serve

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
ALL = "1" * 64


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


def address(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))))


@pytest.fixture
def server(monkeypatch):
    with serving(make_studio(monkeypatch)) as server:
        yield server


def test_the_page_is_whole_and_allows_nothing_else(server):
    page = send(server, "GET", "/?x=1")
    policy, html = page.headers["Content-Security-Policy"], page.read().decode()
    nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", policy)[1]
    assert html.count(f'nonce="{nonce}"') == 2 and "{{" not in html
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(?!data:,|#)|url\(|https?:|\son\w+=", html)
    assert f"'{nonce}'" not in send(server, "GET", "/").headers["Content-Security-Policy"]
    told = json.loads(send(server, "GET", "/model").read())
    assert told["name"] == "digits" and told["step"] == 7 and told["painted"] == [8, 8]
    assert told["classes"][:2] == [["all", "each in turn"], ["0", "0"]] and told["asks_for"]
    assert told["choices"]["num_ar_steps"] == [1, 2, 3, 4, 8, 16], "tokens are 16"
    assert "temperature" not in told["choices"], "it plays no part in flow matching"
    assert all(told["defaults"][key] in values for key, values in told["choices"].items())


def test_samples_are_seen_while_they_grow(monkeypatch):
    with serving(make_studio(monkeypatch, "--config.sample.num_ar_steps=16")) as server:
        settings = {"labels": "3", "seed": 5, "count": 4, "cfg_scale": 2.0}
        compiling, *steps, last = events(send(server, "POST", "/samples", {"settings": settings}))
        again, *_ = events(send(server, "POST", "/samples", {"settings": settings}))
    assert "compiling" in compiling and "step" in again, "it is told once"
    assert [event["step"] for event in steps] == [*range(1, 17)] and steps[0]["of"] == 16
    seen = [event for event in steps if "pictures" in event]
    assert len(seen) >= 8 and all(len(event["pictures"]) == 4 for event in seen)
    shares = [(pixels(event["pictures"][1]) != 128).mean() for event in seen]
    assert shares == sorted(shares) and shares[0] < 0.2 < 0.8 < shares[-1], "it grows"
    wanted = GrowingModel("--config.sample.num_ar_steps=16").drawn([3] * 4, seed=5, cfg_scale=2.0)
    for sample, picture in zip(last["done"], wanted, strict=True):
        assert sample["title"] == "3" and sample["files"].keys() == {"png"}
        np.testing.assert_array_equal(pixels(sample["files"]["png"]), picture[..., 0])
        np.testing.assert_array_equal(pixels(sample["picture"]), picture[..., 0])
    assert last["seconds"] > 0


def test_painted_places_are_drawn_anew_and_others_stay(server):
    mask = np.zeros((8, 8), int)
    mask[2:4, 3:7] = 1
    text = "".join(map(str, mask.ravel()))
    request = {"settings": {"seed": 2}, "picture": address(encoded(PICTURE)), "mask": text}
    *_, last = events(send(server, "POST", "/samples", request))
    results = np.stack([pixels(sample["files"]["png"]) for sample in last["done"]])
    assert (results[:, mask == 0] == PICTURE[mask == 0]).all()
    assert (results[:, mask == 1] != PICTURE[mask == 1]).any(axis=1).all()
    assert "--mode=edit" in last["command"] and "model.edit(picture, mask, " in last["python"]


def test_a_picture_is_cut_as_training_pictures_are(server):
    wide = np.full((20, 60, 3), 255, np.uint8)
    wide[:, :20] = 0
    how = {"Content_Type": "application/octet-stream"}
    for kind in ("PNG", "JPEG", "WEBP"):
        answer = send(server, "POST", "/picture", encoded(wide, kind), **how)
        assert pixels(json.loads(answer.read())["picture"]).shape == (8, 8)
    bomb = bytearray(encoded(PICTURE))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    for data in (b"", b"GIF89a", encoded(wide)[:90], bytes(bomb)):
        answer = send(server, "POST", "/picture", data, **how)
        text = answer.read().decode()
        assert answer.status == 400 and "cannot be read" in text and text.count("\n") == 1


REFUSED = [
    ("GET", "/../secret", None, {}, 404, "page is at /"),
    ("GET", "/samples", None, {}, 404, "page is at /"),
    ("POST", "/", {}, {}, 404, "page is at /"),
    ("PUT", "/samples", {}, {}, 501, "Unsupported"),
    ("GET", "/", None, {"Host": "evil.example:80"}, 403, "is at http://127.0.0.1"),
    ("GET", "/model", None, {"Host": "localhost.evil.example"}, 403, "alone"),
    ("POST", "/samples", {}, {"Origin": "http://evil.example"}, 403, "other pages"),
    ("POST", "/samples", {}, {"Origin": "null"}, 403, "other pages"),
    ("POST", "/samples", {}, {"Content_Type": "text/plain"}, 415, "application/json"),
    ("POST", "/picture", b"x", {"Content_Type": "image/png"}, 415, "octet-stream"),
    ("POST", "/samples", {}, {"Content_Length": "-1"}, 411, "how long"),
    ("POST", "/samples", {}, {"Content_Length": "9" * 5000}, 413, "at most"),
    ("POST", "/samples", b" " * (MAX_BODY + 1), {"Content_Type": "application/json"}, 413, "most"),
    ("POST", "/samples", b"{", {"Content_Type": "application/json"}, 400, "not JSON"),
    ("POST", "/samples", b"[" * 99999, {"Content_Type": "application/json"}, 400, "not JSON"),
    ("POST", "/samples", b"9" * 9999, {"Content_Type": "application/json"}, 400, "not JSON"),
    ("POST", "/samples", b"[]", {"Content_Type": "application/json"}, 400, "has settings"),
]
WRONG = [
    ({"settings": []}, "has settings"),
    ({"settings": {"batch_size": 1}}, "batch_size"),
    ({"settings": {"count": 17}}, "one of 1, 4, 9, 16"),
    ({"settings": {"count": True}}, "whole number"),
    ({"settings": {"order": "up"}}, "one of random"),
    ({"settings": {"num_denoise_steps": 10**6}}, "one of"),
    ({"settings": {"seed": -1}}, "between 0 and"),
    ({"settings": {"seed": "1"}}, "whole number"),
    ({"settings": {"cfg_scale": float("nan")}}, "from 0 to a million"),
    ({"settings": {"labels": "ten"}}, "not a class"),
    ({"settings": {"labels": "x" * 10**6}}, "not long"),
    ({"settings": {"labels": ["3"]}}, "not long"),
    ({"picture": address(b"GIF89a"), "mask": ALL}, "cannot be read"),
    ({"picture": "file:///etc/passwd", "mask": ALL}, "cannot be read"),
    ({"picture": 3, "mask": ALL}, "data: address"),
    ({"picture": address(encoded(PICTURE)), "mask": "0" * 64}, "nothing is painted"),
    ({"picture": address(encoded(PICTURE)), "mask": "1" * 63}, "64 characters"),
    ({"picture": address(encoded(PICTURE))}, "64 characters"),
]


def test_other_requests_are_refused_in_a_line(server):
    cases = REFUSED + [("POST", "/samples", body, {}, 400, text) for body, text in WRONG]
    for method, path, body, headers, status, text in cases:
        answer = send(server, method, path, body, **headers)
        said = answer.read().decode()
        assert (answer.status, said.count("\n")) == (status, 1) and text in said, (path, said)
    for host in ("localhost:99", "127.0.0.1", f"localhost:{server.server_port}"):
        origin = f"http://{host}"
        assert send(server, "POST", "/samples", {}, Host=host, Origin=origin).status == 200


def test_a_server_for_others_answers_to_any_name(monkeypatch):
    with serving(make_studio(monkeypatch)) as server:
        server.host = "0.0.0.0"
        assert send(server, "GET", "/", Host="machine.example").status == 200
        answer = send(server, "POST", "/samples", {}, Host="a", Origin="http://b")
        assert answer.status == 403


def test_a_browser_that_goes_away_ends_its_samples(monkeypatch):
    gate = Gate()
    with serving(make_studio(monkeypatch, steps=gate)) as server:
        response = send(server, "POST", "/samples", {})
        assert "compiling" in next(events(response))
        response.close()
        gate.open.set()
        assert gate.closed.wait(60)
        *_, last = events(send(server, "POST", "/samples", {}))
        assert len(last["done"]) == 4, "others are served"


def test_the_line_is_short_and_whoever_comes_later_is_told(monkeypatch):
    gate = Gate()
    with serving(make_studio(monkeypatch, steps=gate), max_waiting=1) as server:
        first = events(send(server, "POST", "/samples", {"settings": {"seed": 1}}))
        assert "compiling" in next(first)
        second = events(send(server, "POST", "/samples", {"settings": {"seed": 2}}))
        assert next(second) == {"ahead": 1}
        full = send(server, "POST", "/samples", {})
        assert full.status == 503 and int(full.headers["Retry-After"]) > 0
        assert b"too many are waiting" in full.read()
        gate.open.set()
        seeds = [list(stream)[-1]["command"] for stream in (first, second)]
        assert ["seed=1" in seeds[0], "seed=2" in seeds[1]] == [True, True]


def test_fifty_at_once_get_what_each_asked_for(monkeypatch):
    studio = make_studio(monkeypatch)
    model = GrowingModel()

    def ask(seed: int) -> np.ndarray:
        request = {"settings": {"seed": seed, "count": 1, "labels": "3"}}
        *_, last = events(send(server, "POST", "/samples", request))
        return pixels(last["done"][0]["files"]["png"])

    threads = concurrent.futures.ThreadPoolExecutor(50)
    with serving(studio, max_waiting=50) as server, threads as pool:
        found = list(pool.map(ask, range(50), timeout=100))
    assert len(np.unique(found, axis=0)) == 50
    for seed in range(0, 50, 7):
        np.testing.assert_array_equal(found[seed], model.drawn(3, seed=seed)[0, ..., 0])


@pytest.mark.parametrize("error", [ValueError("says why."), KeyError(1)])
def test_what_fails_is_told_and_others_are_served(error, monkeypatch, capsys):
    def fail(config, params, inputs):
        yield next(grow(config, params, inputs))
        raise error

    with serving(make_studio(monkeypatch, steps=fail)) as server:
        *_, last = events(send(server, "POST", "/samples", {}))
        assert "says why" in last["error"]
        assert ("KeyError" in capsys.readouterr().err) == isinstance(error, KeyError)
        assert send(server, "GET", "/").status == 200


def test_ctrl_c_waits_for_the_step_that_is_made(monkeypatch, capsys):
    gate, serve, end, left = Gate(), Server.serve_forever, Line.wait_for_end, []
    studio = make_studio(monkeypatch, steps=gate)
    job = studio.make
    monkeypatch.setattr(server_module, "load_model", lambda *arguments: (None, None))
    monkeypatch.setattr(server_module, "Studio", lambda *arguments: studio)
    monkeypatch.setattr(studio, "make", lambda job, send: None)  # at the start

    def interrupted(server):
        studio.make = job
        server.host = "127.0.0.1"
        threading.Thread(target=serve, args=(server, 0.02)).start()
        left.append((server, events(send(server, "POST", "/samples", {}))))
        assert "compiling" in next(left[0][1])
        raise KeyboardInterrupt

    def open_and_end(line):
        gate.open.set()
        end(line)
        left[0][0].shutdown()

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    monkeypatch.setattr(Line, "wait_for_end", open_and_end)
    run_serve(GrowingModel().config, "runs/digits", "0.0.0.0", 0)
    assert gate.closed.is_set() and not any("done" in event for event in left[0][1])
    said = capsys.readouterr().out
    assert "WARNING: whoever reaches 0.0.0.0" in said and "open http://0.0.0.0:" in said


def test_what_cannot_be_served_is_one_line(tmp_path, capsys):
    words = ["djepa", "--mode=serve", f"--workdir={tmp_path}", "--config=digits", *TINY]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port, text in ((taken.getsockname()[1], "in use"), (70_000, "cannot be had")):
            assert main([*words, f"--port={port}"]) == 2
            assert text in capsys.readouterr().err
    assert main([*words, "--port=0"]) == 2
    assert "checkpoint" in capsys.readouterr().err
    assert main([*words, "--out=x"]) == 2 and "--out is for" in capsys.readouterr().err
    assert main(["djepa", "--mode=sample", "--port=1", *words[2:]]) == 2
    assert "--port is for --mode=serve" in capsys.readouterr().err
