"""A spy on calls, for tests that watch what a command does."""


def spy(monkeypatch, owner, name, note):
    """Call `note` with the arguments of each call of `owner.name`, before the call."""
    original = getattr(owner, name)

    def noted(*args, **kwargs):
        note(*args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
