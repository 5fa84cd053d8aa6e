"""A configuration that was read from a file: nested dicts with attribute access, needing no config
library.
"""

import copy
from collections.abc import Mapping
from typing import Any


class Settings(dict):
    """Nested settings, read as `settings.model.width` or `settings["model"]["width"]`; change a
    copy by `updated`.
    """

    def __init__(self, values: Mapping):
        super().__init__(
            {
                k: Settings(v) if isinstance(v, Mapping) else copy.deepcopy(v)
                for k, v in values.items()
            }
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f'no key "{name}"; there are {", ".join(self)}') from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings are read only; make changed ones with updated({name}=...)")

    def to_dict(self) -> dict:
        """Plain nested dicts."""
        return {k: v.to_dict() if isinstance(v, Settings) else v for k, v in self.items()}

    def updated(self, changes: Mapping[str, Any]) -> "Settings":
        """A copy with some values changed, by dotted name.

        Raises:
            KeyError: a name that these settings do not have.
        """
        result = Settings(self)
        for name, value in changes.items():
            *groups, key = name.split(".")
            group = result
            for part in groups:
                if not isinstance(group.get(part), Settings):
                    raise KeyError(name)
                group = group[part]
            if key not in group:
                raise KeyError(name)
            group[key] = value
        return result
