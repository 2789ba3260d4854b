"""The errors pikv_ds raises on purpose. Each message says what was given, what it conflicts with and what to do."""


class ConfigError(ValueError):
    """A "pikv" block that is not legal: unknown key, value out of range, impossible combination.

    rule: the name in blueprint/rules.py of the combination that was refused, a tuple of several; None = no combination is at fault.
    """

    def __init__(self, *said: object, rule: str | tuple[str, ...] | None = None) -> None:
        super().__init__(*said)
        self.rule = rule


class UnsupportedError(ValueError):
    """A model, a layer or a call argument that PiKV cannot honour exactly, refused instead of ignored."""


class CapacityError(RuntimeError):
    """A shard is full and `storage.overflow` is "error", or no shard has room left."""


class PeerError(RuntimeError):
    """A rank of the group died or did not answer within `timeout_s`."""


class DivergedError(RuntimeError):
    """Ranks declared to hold replicated requests saw different tokens."""


class MigrationError(RuntimeError):
    """Shards could not move to other ranks. Raised on all ranks; every shard is where it was."""


class PageFileError(RuntimeError):
    """A file of pages does not hold what was written to it: truncated, flipped, swapped, stale, another's. Nothing of it is served."""


class SessionError(ValueError):
    """A saved session that can't be read, or that does not fit the cache or the model. The cache is as before."""


class CorruptedError(RuntimeError):
    """Page tables and their allocator contradict each other (looked for with `storage.audit` only). Raised where it was found."""


class TrainingError(RuntimeError):
    """A fit that can't go on: a loss that is not finite, no data, a checkpoint of another fit. Nothing was exported."""


PIKV_ERRORS = (
    ConfigError, UnsupportedError, CapacityError, PeerError, DivergedError, MigrationError, PageFileError, SessionError, CorruptedError,
    TrainingError,
)  # fmt: skip
