"""In place of the package wandb: the calls that are made of it, and what they would have sent."""

import types


class FakeRun:
    """A run that goes on where one of the same id ended; like the real one it takes no values of
    steps before its last.
    """

    def __init__(self, sent: list, settings: dict):
        self.sent, self.settings = sent, settings
        self.step = sent[-1][0] + 1 if sent else 0
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        assert step >= self.step and not self.finished
        self.step = step
        self.sent += [(step, name, value) for name, value in values.items()]

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """The module. `sent` has (step, name, value) of each run by id, `runs` every call of `init`."""

    def __init__(self):
        super().__init__("wandb")
        self.sent: dict[str, list] = {}
        self.runs: list[FakeRun] = []
        self.logged_in = True

    def login(self) -> bool:
        if not self.logged_in:
            raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")
        return True

    def Settings(self, **settings) -> dict:
        return settings

    def Image(self, pixels):
        return pixels

    def init(self, *, project: str, id: str, resume: str, dir, settings: dict) -> FakeRun:
        assert resume == "allow"
        run = FakeRun(self.sent.setdefault(id, []), {"project": project, "dir": dir} | settings)
        self.runs.append(run)
        return run
