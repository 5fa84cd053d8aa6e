"""The Python interface: load, sample, stream, encode, and what wrong calls get."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from filled import save_model
from flax import nnx
from small_autoencoder import NAME, registered, write_weights
from tiny import CONFIG, TINY, tiny_config

import djepa_jax
from djepa_jax.checkpoints.export import run_export
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.schedules import reveal_counts
from djepa_jax.main import main

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BATCH_SIZE = 16  # stored as sample.batch_size: more pictures take several batches
PIXELS = np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1)
LATENTS = ("--config.data.modality=image_latents", "--config.evaluation.kind=none")
MANY = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> str:
    return save_model(
        tmp_path_factory.mktemp("filled"),
        tiny_config(),
        sample__batch_size=BATCH_SIZE,
        data__class_names=WORDS,
    )


@pytest.fixture(scope="module")
def model(workdir) -> djepa_jax.Model:
    return djepa_jax.load(workdir)


@pytest.fixture(scope="module")
def many(model) -> np.ndarray:
    """Two batches, the second one padded."""
    return model.sample(MANY, seed=5)


@pytest.fixture(scope="module")
def latents_model(tmp_path_factory) -> djepa_jax.Model:
    """A diffusion model of latents that draws everything in one step."""
    flags = (*LATENTS, "--config.data.channels=2", "--config.sample.num_ar_steps=1")
    config = tiny_config(*flags, variant="diffusion")
    return djepa_jax.load(save_model(tmp_path_factory.mktemp("latents"), config))


def assert_same_pictures(actual, expected):
    """Equal up to what rounding may do: nowhere more than one of 256 levels apart, nearly
    everywhere the same.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.uint8
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def differ(a, b) -> bool:
    return bool(np.abs(a.astype(int) - b).max() > 2)


def test_every_form_of_a_model_is_the_same_model(trained, tmp_path):
    export = run_export(None, trained, str(tmp_path / "export"), "orbax")
    places = [trained, pathlib.Path(trained) / "checkpoints", f"{trained}/checkpoints/3", export]
    features = []
    for place in places:
        model = djepa_jax.load(place)
        assert model.step == 3 and model.labels == tuple("0123456789")
        features.append(model.encode(PIXELS, "3"))
        np.testing.assert_array_equal(features[-1], features[0])


def test_a_model_says_what_it_is(model, workdir):
    assert model.step == 7 and model.labels == tuple(WORDS)
    assert model.config.sample.batch_size == BATCH_SIZE
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert (
        repr(model) == f"<D-JEPA model of {count:,} parameters, step 7, 10 classes, from "
        f"{workdir}/checkpoints/7>"
    )


def test_samples_are_those_of_the_command_line(workdir, many, tmp_path):
    out, count = tmp_path / "samples.npz", len(MANY)
    flags = [f"--config.sample.count={count}", "--config.sample.seed=5", f"--out={out}"]
    assert (
        main(
            [
                "djepa_jax",
                f"--config={CONFIG}",
                f"--workdir={workdir}",
                "--mode=sample",
                *TINY,
                *flags,
            ]
        )
        == 0
    )
    with np.load(out) as arrays:
        assert list(arrays["arr_1"]) == MANY
        assert_same_pictures(many, arrays["arr_0"])


def test_sample_i_does_not_depend_on_how_many_are_drawn(model, many):
    assert many.shape == (20, 8, 8, 1) and many.dtype == np.uint8
    for count in (1, 3, 17):
        assert_same_pictures(model.sample(MANY[:count], seed=5), many[:count])


def test_labels_may_be_said_in_many_ways(model, many):
    for labels in (
        [0, 1, 2],
        ["zero", "ONE", "tw"],
        ("0", np.int32(1), 2),
        range(3),
        np.arange(3),
        iter([0, 1, 2]),
    ):
        assert_same_pictures(model.sample(labels, seed=5), many[:3])
    for label in (0, "zero", "0", np.int64(0), np.array(0), ["zero"]):
        assert_same_pictures(model.sample(label, seed=5), many[:1])
    assert model.find_label("sev") == model.find_label(7) == 7 and model.find_label(None) == 10


def test_label_seed_and_settings_matter(model, many):
    first = many[:4]
    same_class = model.sample([1] * 4, seed=5)
    assert differ(same_class[0], first[0]) and differ(same_class[0], same_class[1])
    none = model.sample(None, seed=5)
    assert none.shape == (1, 8, 8, 1) and differ(none, first[:1])
    assert_same_pictures(model.sample([None, 1, None], seed=5)[:2], np.stack([none[0], first[1]]))
    for settings in ({"seed": 6}, {"cfg_scale": 8.0}):
        assert differ(model.sample(range(4), **{"seed": 5} | settings), first), settings
    assert_same_pictures(model.sample(range(4), seed=5, cfg_scale=np.float32(1.5)), first)
    strong = model.sample(range(4), seed=5, cfg_scale=8)
    assert differ(model.sample(range(4), seed=5, cfg_scale=8, cfg_schedule="constant"), strong)
    assert model.config.sample.cfg_scale == 1.5, "settings hold for one call"


def test_a_mixture_lies_between_its_classes(model, many):
    mixed = model.sample([None] * 3, seed=5, mix="zero:0.5,1:0.5")
    assert mixed.shape == (3, 8, 8, 1) and differ(mixed[:1], many[:1])
    assert_same_pictures(model.sample([None], seed=5, mix="zero:3,1:1e-9"), many[:1])
    for mix in ("zero", "zero:x", "zero:0.5,nothing:0.5", "zero:-1", ":1", "zero:0.5,"):
        with pytest.raises(ValueError, match="mix"):
            model.sample(None, mix=mix)


def test_places_have_classes_of_their_own(model, many):
    """Everywhere the same class is the class; the last of places that overlap holds."""
    assert_same_pictures(model.sample([None], seed=5, mix="zero@left,zero@right"), many[:1])
    assert_same_pictures(model.sample([None], seed=5, mix="one@left,zero@all"), many[:1])
    assert np.any(model.sample([None], seed=5, mix="zero@left,one@right") != many[:1])
    for mix in ("zero@left,one", "zero@nowhere,one@right", "zero@random:0.5,one@left", "@left"):
        with pytest.raises(ValueError, match="mix"):
            model.sample(None, mix=mix)


def test_only_new_shapes_are_compiled(model, many):
    list(model.stream(MANY, num_segments=2))
    with count_compilations() as compilations:
        model.sample(MANY, seed=5)
        model.sample(["two", None] * 10, seed=9, cfg_scale=4, cfg_schedule="constant")
        model.sample([3] * 20, temperature=1, cfg_scale=np.float64(0.7))
        list(
            model.stream(
                [3] * 20, seed=1, num_segments=2, cfg_scale=3.0, temperature=np.float32(0.9)
            )
        )
    assert compilations == []


def test_stream_shows_a_picture_grow_into_the_sample(model, many):
    steps = np.stack(list(model.stream(MANY, seed=5, num_segments=2)))
    assert steps.shape == (3, *many.shape) and steps.dtype == np.uint8
    patches = steps.reshape(3, 20, 4, 2, 4, 2).swapaxes(3, 4).reshape(3, 20, 16, 4)
    revealed = (patches != 128).any(-1)  # the others are grey
    assert (revealed.sum(-1) == np.cumsum(reveal_counts(16, 3))[:, None]).all()
    for before, after in ((0, 1), (1, 2)):
        shown = revealed[before]
        assert (patches[after][shown] == patches[before][shown]).all(), "what is drawn stays"
    assert_same_pictures(steps[-1], many)


def test_encode_gives_what_the_modules_give(model, many):
    features = model.encode(many, MANY)
    spec = model.config.train.model
    assert features.shape == (20, spec.num_tokens, spec.width) and features.dtype == np.float32
    modules = nnx.merge(split_model(spec)[0], jax.device_get(model.params))
    tokens = model.config.modality.tokenize(jnp.asarray(many))
    order = jnp.broadcast_to(jnp.arange(16), (20, 16))
    condition = modules.embed_condition(jnp.asarray(MANY))
    expected = modules.encode_all(tokens, order, condition)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_features_depend_on_the_picture_and_its_label_alone(model, many):
    unlabelled = model.encode(many)
    for start, stop in ((0, 1), (5, 8), (3, 20)):
        np.testing.assert_allclose(
            model.encode(many[start:stop]), unlabelled[start:stop], rtol=1e-4, atol=1e-4
        )
    threes = model.encode(many, "three")
    np.testing.assert_allclose(threes, model.encode(many, [3] * 20), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        model.encode(many[:2], [None, 3]),
        np.stack([unlabelled[0], threes[1]]),
        rtol=1e-4,
        atol=1e-4,
    )
    assert (
        np.abs(threes - unlabelled).max() > 0.01
        and np.abs(unlabelled[0] - unlabelled[1]).max() > 0.01
    )


def test_a_latents_model_gives_arrays(latents_model):
    arrays = latents_model.sample_arrays([3, 7])
    assert (
        arrays.keys() == {"latents"}
        and arrays["latents"].shape == (2, 8, 8, 2)
        and arrays["latents"].dtype == np.float32
    )
    assert latents_model.encode(arrays["latents"]).shape == (2, 16, 16)
    with count_compilations() as compilations:
        cold = latents_model.sample_arrays([3, 7], temperature=0.1)
        for call in (latents_model.sample, latents_model.stream):
            with pytest.raises(
                TypeError, match="this model makes latents, not pictures; name its autoencoder"
            ):
                call([3, 7], num_denoise_steps=4)
    assert compilations == [], (
        "temperature is an argument, and what cannot work is refused before the work"
    )
    assert np.abs(cold["latents"] - arrays["latents"]).max() > 0.01
    with pytest.raises(ValueError, match="uint8 examples of shape .* expects float32"):
        latents_model.encode(np.zeros((2, 8, 8, 2), np.uint8))


def test_an_autoencoder_makes_pictures_of_latents(tmp_path_factory):
    flags = (*LATENTS, "--config.data.channels=4", "--config.sample.num_ar_steps=2")
    folder = tmp_path_factory.mktemp("pictures")
    with registered():
        workdir = save_model(folder, tiny_config(*flags, f"--config.autoencoder.name={NAME}"))
        weights = write_weights(folder / "vae.safetensors")
        model = djepa_jax.load(workdir, autoencoder=weights)
        images = model.sample([3, 7])
        assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
        *_, last = model.stream([3, 7])
        assert_same_pictures(last, images)


def test_samples_do_not_depend_on_the_devices(workdir, many):
    """`many` were drawn on (8, 1, 1)."""
    other = djepa_jax.load(workdir, mesh=(2, 2, 2))
    kernel = other.params["predictor"]["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and not kernel.sharding.is_fully_replicated
    assert_same_pictures(other.sample(MANY[:5], seed=5), many[:5])


WRONG = [  # a call, words of its error
    (lambda m: m.sample("ten"), '"ten" is not a class; the closest are'),
    (lambda m: m.sample("e"), '"e" may be any of 0 zero, 1 one'),
    (lambda m: m.sample([3, 10]), '"10" is not a class; classes are 0 to 9'),
    (lambda m: m.sample(3.5), "3.5 is not a class; give an index or a name"),
    (lambda m: m.sample([[1, 2]]), r"\[1, 2\] is not a class"),
    (lambda m: m.sample([]), "labels are empty"),
    (lambda m: m.sample(3, seed=-1), "seed is -1; it must be between 0 and"),
    (lambda m: m.sample(3, seed="1"), "seed is '1'"),
    (lambda m: m.sample(3, seed=True), "seed is True"),
    (lambda m: m.sample(3, cfg_scal=2.0), "unknown setting cfg_scal; there are cfg_d.*cfg_sch"),
    (lambda m: m.sample(3, count=5), "unknown setting count; there are"),
    (lambda m: m.sample(3, cfg_scale="x"), "cfg_scale is 'x'; it must be a number"),
    (lambda m: m.sample(3, sampler=1), "sampler is 1; it must be text"),
    (lambda m: m.sample(3, temperature=None), "temperature is None; it must be a number"),
    (lambda m: m.sample([3, 4], cfg_scale=[1.0, 2.0]), r"cfg_scale is \[1.0, 2.0\]"),
    (lambda m: m.sample(3, num_ar_steps=2.5), "num_ar_steps is 2.5; it must be a whole number"),
    (lambda m: m.sample(3, num_ar_steps=999), "num_ar_steps is 999; .* 16"),
    (lambda m: m.sample(3, cfg_scale=float("nan")), "cfg_scale is nan"),
    (lambda m: m.sample(3, sampler="ddpm"), "sampler is 'ddpm'; .*euler, heun"),
    (lambda m: m.sample(3, time_shift=-1.0), "time_shift is -1.0"),
    (lambda m: m.stream("ten", cfg_scale=2.0), '"ten" is not a class'),  # before it is read
    (lambda m: m.encode(PIXELS[0]), r"shape \(8, 8, 1\); expected \[n, 8, 8, 1\]"),
    (lambda m: m.encode(PIXELS[:0]), r"shape \(0, 8, 8, 1\)"),
    (lambda m: m.encode(PIXELS[:, :4]), r"\(4, 8, 1\).* uint8 .*\(8, 8, 1\)"),
    (lambda m: m.encode(PIXELS / 255), "float64 .* uint8"),
    (lambda m: m.encode(PIXELS, [1, 2, 3]), "2 examples and 3 labels"),
    (lambda m: djepa_jax.load(m.path, mesh=(3, 1, 1)), r"mesh \(3, 1, 1\) does not fit 8 devices"),
]


def test_a_wrong_call_is_one_clear_error_before_the_work(model):
    with count_compilations() as compilations:
        for call, message in WRONG:
            with pytest.raises(ValueError, match=message):
                call(model)
    assert compilations == []


def test_a_path_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f'"{tmp_path}/typo" does not exist; name a workdir'):
        djepa_jax.load(tmp_path / "typo")


def test_the_package_names_what_it_offers():
    assert {"load", "Model", "__version__"} <= set(dir(djepa_jax))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        djepa_jax.laod  # noqa: B018
