"""Every error a user can meet, one tree, with the exit code the command line ends with."""

from __future__ import annotations


class CclipError(Exception):
    """Base of all errors that cclip-deploy raises on purpose; the message says what to do."""

    exit_code = 1


class UsageError(CclipError):
    """The command or call cannot mean anything: an option, a size, a prompt is wrong."""

    exit_code = 2


class PrecisionNotSupported(UsageError):
    """A backend cannot run graphs of the requested precision."""


class EnvironmentIssue(CclipError):
    """This machine lacks something that was asked for: a package, a driver, disk space."""

    exit_code = 3


class TargetInUse(EnvironmentIssue):
    """Another run is writing the same file or folder; the message names its process, host and start."""


class ParityError(CclipError):
    """A graph or an engine does not compute what the reference computed, or is not what was asked."""

    exit_code = 4


class LatencyRegression(CclipError):
    """A latency gate was broken."""

    exit_code = 5


class DataError(CclipError):
    """A file that was read is not what it should be."""

    exit_code = 6


class CheckpointError(DataError):
    """A checkpoint is truncated, of another network, or lacks tensors."""


class BundleError(DataError):
    """A bundle is incomplete, altered, or of a schema that this version does not read."""


class ImageError(DataError):
    """A picture cannot be decoded or used."""


class PromptError(UsageError):
    """A prompt is empty or does not fit the graph."""


class RewriteRefused(CclipError):
    """An exact rewrite does not apply to the module it was given; the message is the reason."""
