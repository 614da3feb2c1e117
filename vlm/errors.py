"""The errors a user can cause: each message says what was found and what was expected."""


class VlmError(Exception):
    """Base of every error that a user can mend; the command line prints it as one line."""


class ConfigError(VlmError):
    """A configuration file or flag is wrong."""


class DataError(VlmError):
    """A shard, manifest, caption or image is missing, damaged or not what it claims to be."""


class ShardError(DataError):
    """A shard is missing, damaged or changed: none of its samples can be trusted."""


class PlaceError(VlmError):
    """A place stays away or refuses, or its files cannot be kept here: no fault of a sample."""


class TokenizerError(VlmError):
    """A tokenizer cannot be trained, read or used as asked."""


class CheckpointError(VlmError):
    """A checkpoint or bundle is missing, damaged or belongs to something else."""


class SearchIndexError(VlmError):
    """A search index is missing, damaged or belongs to another model."""


class DistributedError(VlmError):
    """The processes of a run cannot be grouped as asked."""


class TrainingError(VlmError):
    """Training cannot go on, for example because the loss is no longer finite."""


class InterruptedRunError(VlmError):
    """A signal has ended a run; all that it has learnt is saved, and `--resume` goes on with it."""

    def __init__(self, message: str, exit_code: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
