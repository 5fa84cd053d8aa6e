"""Pairs judged: what is given, who is asked, and which share is right."""

import types

import numpy as np
import pytest
from dummy_sampler import PARAMS, DummySampler, make_generator
from pairs import pairs_config, write_files

from djepa_jax.data.sources import open_data
from djepa_jax.evaluation import evaluate as evaluating
from djepa_jax.evaluation.metrics import METRICS, say_and_draw
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.say_and_draw import SayAndDraw
from djepa_jax.evaluation.metrics.several import Several


class Copies(DummySampler):
    """In place of the sampler: tokens that are given come back, and the others are zero."""

    def __call__(self, config, mesh):
        draw = super().__call__(config, mesh)

        def copied(params, inputs):
            tokens, known = draw(params, inputs) * 0, inputs.known
            if known is None:
                return tokens
            assert config.num_known == np.asarray(known.mask)[0].sum()
            return np.where(np.asarray(known.mask)[..., None], known.tokens, tokens)

        return copied


class Mean:
    """In place of a classifier: the class is 0 for dark pictures, 1 for others."""

    def __call__(self, pictures):
        bright = pictures.mean((1, 2, 3)) > 100
        return {"logits": np.eye(2)[bright.astype(int)]}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    def absent(grammar):
        raise MetricError("not installed")

    experiment = pairs_config(write_files(tmp_path))
    experiment = experiment.updated({"evaluation.kind": "say_and_draw", "evaluation.count": 12})
    monkeypatch.setattr(say_and_draw, "train_judges", lambda source: (Mean(), Mean()))
    monkeypatch.setattr(say_and_draw, "open_recogniser", absent)
    return experiment, open_data(experiment)


def test_an_evaluation_draws_beside_nothing_and_beside_each_of_both(opened, tmp_path):
    experiment, source = opened
    sampler = Copies()
    generator = make_generator(sampler, experiment=experiment)
    record = evaluating.evaluate(experiment, generator, PARAMS, source, 3, tmp_path)
    assert sampler.drawn == [0, 0, 0], "three times, all twelve in a batch"
    figures = record["metrics"]
    assert figures.keys() == {
        f"{name}{end}"
        for name in ("agree", "drawn", "said")
        for end in ("", "_low", "_high", "_real")
    }
    labels = source.held_out(12)[1]
    # Nothing drawn is grey: class 1 by the picture. Real pictures are dark.
    assert figures["drawn"] == pytest.approx((labels == 1).mean())
    assert figures["drawn_real"] == pytest.approx((labels == 0).mean())
    named = source.modality.named(source.held_out(12)[0])
    loud = source.modality.second.preview({"sound": named["sound"]}).mean((1, 2, 3)) > 100
    assert figures["said_real"] == pytest.approx((loud == labels).mean())
    assert figures["agree_real"] == pytest.approx((~loud).mean())
    assert 0 <= figures["agree"] <= 1


def test_a_recogniser_listens_if_it_is_there(opened, monkeypatch):
    _, source = opened
    monkeypatch.setattr(say_and_draw, "open_recogniser", lambda grammar: None)
    heard = lambda waves, labels, rate: np.arange(len(waves)) % 2 == 0  # noqa: E731
    monkeypatch.setattr(say_and_draw, "understood", heard)
    metric, other = (SayAndDraw.from_data(source) for _ in range(2))
    for each in (metric, other):
        (_, sound_known), (said, picture_known) = each.given(4)
        assert sound_known.mask[0].tolist() == [False] * 4 + [True] * 4
        assert (picture_known.mask == ~sound_known.mask).all()
        arrays = source.modality.export(picture_known.tokens)
        said.update({name: np.asarray(array) for name, array in arrays.items()}, None)
    metric.merge(other)
    figures = metric.result()
    assert figures["heard"] == figures["heard_real"] == 0.5 and "agree" not in figures


def test_several_judges_hand_on_what_is_to_be_given(opened):
    _, source = opened
    both = Several({"a": types.SimpleNamespace(), "b": SayAndDraw.from_data(source)})
    assert len(both.given(3)) == 2 and both.given(3)[0][1].tokens.shape[0] == 3


def test_other_data_are_refused():
    with pytest.raises(ValueError, match="judges pairs"):
        METRICS["say_and_draw"].from_data(types.SimpleNamespace())
