"""What tests of evaluations share."""

import pytest
from rows import Rows

from djepa_jax.evaluation import features
from djepa_jax.evaluation.metrics import pictures


@pytest.fixture
def network(monkeypatch) -> Rows:
    """In place of the classifier and of EfficientNet."""
    rows = Rows()
    monkeypatch.setitem(features.TRAINED, "classifier", lambda images, labels, folder: rows)
    monkeypatch.setitem(features.INSTALLED, "efficientnet_lite0", lambda: rows)
    cached = (pictures._open, pictures._judge, pictures._read_reference)
    for function in cached:
        function.cache_clear()
    yield rows
    for function in cached:
        function.cache_clear()
