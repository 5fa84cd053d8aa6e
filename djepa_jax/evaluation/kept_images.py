"""The pictures that an evaluation judged, as files: `--keep_images`."""

import json

import jax
import numpy as np

from djepa_jax.config.convert import ConfigError
from djepa_jax.runtime.storage import PathError, as_path, check_ours, write_json
from djepa_jax.sampling.generator import Generator
from djepa_jax.sampling.grids import save_png
from djepa_jax.sampling.sample_to_npz import numbered

FOLDER_NAME, SETTINGS_NAME = "evaluation_images", "settings.json"


class KeptImages:
    """PNG files in a folder of the workdir, with the settings of the evaluation that they are of.

    Args:
        generator: of the samples.
        workdir: of the folder.
        of: what the evaluation is of.
        conditions: of the samples.

    Raises:
        ConfigError: no pictures are made.
    """

    def __init__(self, generator: Generator, workdir, of: dict, conditions):
        experiment, network = generator.experiment, generator.experiment.network
        tokens = jax.ShapeDtypeStruct((1, network.num_tokens, network.token_dim), np.float32)
        made = jax.eval_shape(experiment.modality.export, tokens)
        if "images" not in made and not generator.decodes:
            raise ConfigError(
                f"--keep_images is for models of pictures, and this one makes {', '.join(made)}; "
                "leave it out."
            )
        titles = enumerate(experiment.titles(conditions))
        self._names = [f"{numbered(index, title)}.png" for index, title in titles]
        self._folder, self._of = as_path(workdir) / FOLDER_NAME, json.loads(json.dumps(of))
        self._there: set[str] = set()

    def open(self, overwrite: bool) -> int:
        """Make the folder; how many pictures are in it, which are not written again.

        Raises:
            PathError: it holds something else, or pictures of another evaluation.
        """
        settings, remedy = self._folder / SETTINGS_NAME, "move it away"
        self._folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in self._folder.iterdir() if path.suffix != ".tmp"}
        check_ours(settings, "ema_norm", remedy)
        if found and not settings.exists():
            raise PathError(f'"{self._folder}" exists and holds something else; {remedy}.')
        if found and (stored := json.loads(settings.read_text())) != self._of:
            raise PathError(
                f'"{self._folder}" holds pictures of another evaluation, of step {stored["step"]}; '
                f"{remedy}."
            )
        write_json(settings, self._of)
        self._there = set() if overwrite else found & {*self._names}
        return len(self._there)

    def missing_below(self, count: int) -> bool:
        """Whether one of the first pictures is not there."""
        return not self._there.issuperset(self._names[:count])

    def write(self, first: int, images: np.ndarray) -> None:
        """Write those of a batch `[n, H, W, C]` that are not there, the first by its number."""
        names = self._names[first : first + len(images)]
        for name, image in zip(names, images, strict=True):
            if name not in self._there:
                image = image[..., 0] if image.shape[-1] == 1 else image
                save_png(self._folder / name, image, {})
