"""Text to speech, to prove the path: a few clips of LJ Speech are to be learnt by heart.

    djepa --config=speech --workdir=runs/speech --config.data.path=WAVS
    djepa --workdir=runs/speech --mode=sample --out=said.wav \\
        --config.sample.prompt="in being comparatively modern."

WAVS holds wav files and `captions.json`, {"LJ001-0002.wav": "in being comparatively modern.", ...}.
Of LJ Speech (Keith Ito and Linda Johnson, public domain; keithito.com/LJ-Speech-Dataset), copy some
of the first files of `wavs/` to WAVS, and make it of `metadata.csv` by

    import csv, json, pathlib
    rows = csv.reader(open("metadata.csv"), delimiter="|", quoting=csv.QUOTE_NONE)
    texts = {f"{name}.wav": text for name, _, text in rows}
    here = {path.name: texts[path.name] for path in pathlib.Path("WAVS").glob("*.wav")}
    pathlib.Path("WAVS/captions.json").write_text(json.dumps(here))

Its 6,000 steps take 72 minutes of one CPU core, after which more than half of the words are
understood.
A model that says new sentences takes hours of speech, a larger network and a GPU; docs/audio.md.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config() -> ConfigDict:
    """The spoken digits' networks and loss, with a reader of texts in place of classes."""
    config = builtin("spoken_digits").get_config()
    config.num_steps = 6000
    config.batch_size = 8
    config.checkpoint_every = 1000
    config.sample_every = 2000
    config.evaluation.kind = "speech"
    config.evaluation.count = 32
    config.log_every = 25
    config.model.num_prefix_tokens = 16
    config.model.condition = "text"
    config.model.condition_options = ConfigDict(
        {"length": 176, "width": 128, "depth": 2, "num_heads": 4}
    )
    # Ten of 80 tokens are shown on average: more of them tell the sentence without its text
    config.loss.mask_ratio_std = 0.15
    config.optimizer.ema_decay = 0.995
    _set_data(config.data)
    config.sample.count = 8
    config.sample.batch_size = 8
    config.sample.num_ar_steps = 20
    return config


def _set_data(data: ConfigDict) -> None:
    """Waves of 10.24 seconds at 16 kHz; windows of 32 bands and 16 frames: 80 tokens of 512."""
    data.labels = ""
    data.unconditional = False
    options = data.options
    options.rate, options.n_fft, options.hop = 16_000, 512, 256
    options.mels, options.frames = 64, 640
    options.patch_mels, options.patch_frames = 32, 16
    options.floor, options.mean, options.deviation = 100.0, 7.35, 2.56
