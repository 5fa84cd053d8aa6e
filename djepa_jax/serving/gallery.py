"""`--mode=gallery`: samples as they grow in one HTML file, for people who have no Python."""

import html
import io
import pathlib
import secrets

import jax
import numpy as np
from etils import epath
from PIL import Image

from djepa_jax.config.experiment import Experiment
from djepa_jax.evaluation.report import check_out
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import as_path, write_bytes
from djepa_jax.sampling.sample_to_npz import check_pictures
from djepa_jax.serving.studio import data_address, files_of, is_shown, load_model, png_address

PAGE = pathlib.Path(__file__).with_name("assets") / "gallery.html"
MARK = '<meta name="generator" content="djepa_jax gallery">'  # what tells our files from others
MAX_SAMPLES, MAX_BYTES = 400, 32 * 2**20
SMALL = 64  # pixels up to which pictures are kept without loss, and enlarged without smoothing
STEP_MS, LAST_MS = 150, 3000  # how long a step, and the finished sample, are seen
TOLD = ("seed", "order", "cfg_scale", "cfg_schedule", "temperature", "num_ar_steps")
TOLD += ("num_denoise_steps", "sampler")


def run_gallery(
    experiment: Experiment, workdir: str, out: str = "", overwrite: bool = False
) -> epath.Path:
    """Draw the samples that a configuration asks for into an HTML file; its path.

    Raises:
        UserError: they are too many, or too large.
        CheckpointError, ConfigError: there is no such model, or no autoencoder for its latents.
        PathError: a file of others is in the way and not to be overwritten.
    """
    check_pictures(experiment, "", latents_only=False)
    if experiment.sample.count > MAX_SAMPLES:
        raise UserError(
            f"config.sample.count is {experiment.sample.count}; a gallery has at most "
            f"{MAX_SAMPLES}: lower it."
        )
    path = check_out(as_path(out or as_path(workdir) / "gallery.html"), overwrite, MARK)
    model, _ = load_model(experiment, workdir)
    config, grown = model.config, [[] for _ in range(model.config.sample.count)]

    def watch(settings, inputs, steps):
        for number, tokens in enumerate(steps, 1):
            if is_shown(number, settings.num_ar_steps):
                pictures = model.preview(tokens)
                for index, picture in zip(inputs.sample_ids, pictures, strict=True):
                    if index < len(grown):
                        grown[index].append(picture)
        return tokens

    how = {"conditions": config.sample_conditions, "seed": config.sample.seed}
    arrays = model.watched(watch).sample_arrays(**how)
    sections, size = {}, 0
    for index, title in enumerate(config.titles(config.sample_conditions)):
        figure = figure_of(config.modality, arrays, index, title, grown[index])
        sections.setdefault(title, []).append(figure)
        size += len(figure)
        if size > MAX_BYTES:
            raise UserError(
                f"after {index + 1} samples the gallery has more than {MAX_BYTES:,} bytes; lower "
                "config.sample.count."
            )
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    about = f"{count:,} parameters, after {model.step:,} steps of training"
    settings = {key: getattr(config.sample, key) for key in TOLD}
    write_bytes(path, page_of(as_path(workdir).name, about, settings, sections).encode())
    return path


def figure_of(modality, arrays: dict, index: int, title: str, grown: list[np.ndarray]) -> str:
    """A sample as it grows, what can be played of it, and its finished picture to keep."""
    files, word = files_of(modality, arrays, index), html.escape(title)
    last = modality.preview({name: array[index : index + 1] for name, array in arrays.items()})[0]
    still, moving = png_address(last), growing([*grown, last])
    style = ' class="small"' if last.shape[0] <= SMALL else ""
    parts = [
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
        f'<img{style} alt="Sample of {word}, as it grows" src="{moving}"></picture>'
    ]
    if "gif" in files:
        parts.append(f'<img class="small" alt="Sample of {word}, moving" src="{files["gif"]}">')
    if "wav" in files:
        parts.append(f'<audio controls src="{files["wav"]}" title="{word}"></audio>')
    link = f'<a download="{index}.png" href="{still}">{index}</a>'
    return f"<figure>{''.join(parts)}<figcaption>{link}</figcaption></figure>"


def growing(pictures: list[np.ndarray]) -> str:
    """Pictures `[H, W, 1 or 3]` as an animation in an address, which rests at the last one."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.broadcast_to(p, (*p.shape[:2], 3)).copy()) for p in pictures]
    times = [STEP_MS] * (len(frames) - 1) + [LAST_MS]
    how = {"lossless": pictures[0].shape[0] <= SMALL, "quality": 80, "loop": 0, "duration": times}
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], **how)
    return data_address(buffer.getvalue(), "webp")


def page_of(name: str, about: str, settings: dict, sections: dict[str, list[str]]) -> str:
    """The page; what was not made here is escaped."""
    texts = {
        "name": html.escape(name),
        "about": html.escape(about),
        "mark": MARK,
        "nonce": secrets.token_urlsafe(16),
        "settings": "".join(
            f"<div><dt>{key}</dt><dd>{html.escape(str(value))}</dd></div>"
            for key, value in settings.items()
        ),
        "sections": "\n".join(
            f'<section><h2>{html.escape(title)}</h2><div class="tiles">{"".join(figures)}</div>'
            "</section>"
            for title, figures in sections.items()
        ),
    }
    page = PAGE.read_text("utf-8")
    for key, text in texts.items():
        page = page.replace(f"{{{{{key}}}}}", text)
    return page
