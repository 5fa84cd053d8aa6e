"""A model without weights, whose samples grow in no time, and servers of its page."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator

import jax
import numpy as np
from dummy_sampler import PARAMS, DummySampler
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.sampling import model as model_module
from djepa_jax.sampling.model import Model
from djepa_jax.serving.server import Server
from djepa_jax.serving.studio import Studio


class GrowingModel(Model):
    """Of the tiny digits configuration; `grow` is in place of the sampler's steps."""

    def __init__(self, *flags: str):
        self.config, self.step, self.params = tiny_config(*flags), 7, PARAMS
        self.labels, self.path = self.config.class_names, "nowhere"
        self._mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:1])
        self._sampler = None

    def drawn(self, *arguments, **settings) -> np.ndarray:
        """As `sample`."""
        return self.watched(lambda config, inputs, steps: list(steps)[-1]).sample(
            *arguments, **settings
        )


def grow(config, params, inputs) -> Iterator[np.ndarray]:
    """Tokens that depend on seed, number and label, row by row."""
    tokens = DummySampler()(config, None)(params, inputs)  # [B, N, C]
    for number in range(1, config.num_ar_steps + 1):
        revealed = np.arange(tokens.shape[1]) < tokens.shape[1] * number / config.num_ar_steps
        yield np.where(revealed[:, None], tokens, 0).astype(np.float32)


class Gate:
    """Samples that stay at their second step until `open` is set."""

    def __init__(self):
        self.open, self.closed = threading.Event(), threading.Event()

    def __call__(self, config, params, inputs):
        try:
            for number, tokens in enumerate(grow(config, params, inputs), 1):
                if number == 2:
                    assert self.open.wait(60)
                yield tokens
        finally:
            self.closed.set()


def make_studio(monkeypatch, *flags: str, steps=grow, workdir: str = "runs/digits") -> Studio:
    monkeypatch.setattr(model_module, "grow", steps)
    model = GrowingModel(*flags)
    return Studio(model, model.config, workdir)


@contextlib.contextmanager
def serving(studio: Studio, **options) -> Iterator[Server]:
    with Server("127.0.0.1", 0, **options) as server:
        server.studio = studio
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()


def send(server: Server, method: str, path: str, body=None, **headers) -> http.client.HTTPResponse:
    """A request, and its answer as far as it has come; objects are sent as JSON."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    return connection.getresponse()


def events(response: http.client.HTTPResponse) -> Iterator[dict]:
    """Events as they come."""
    assert response.status == 200, response.read()
    for line in response:
        if line.strip():
            yield json.loads(line.removeprefix(b"data: "))
