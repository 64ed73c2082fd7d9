"""Exceptions raised by cclip-deploy, with the exit codes of the command line."""

from __future__ import annotations


class CclipError(Exception):
    """Base class of all exceptions of cclip-deploy; the message says how to fix the problem."""

    exit_code = 1


class UsageError(CclipError):
    """An option, an argument, a size or a prompt is invalid."""

    exit_code = 2


class PrecisionNotSupported(UsageError):
    """The backend cannot run graphs of the requested precision."""


class EnvironmentIssue(CclipError):
    """The machine lacks a package, a driver, a device or disk space."""

    exit_code = 3


class TargetInUse(EnvironmentIssue):
    """Another process is writing the same file or folder; the message names it."""


class ParityError(CclipError):
    """The outputs of a graph or an engine exceed a parity limit, or an engine has another precision than requested."""

    exit_code = 4


class DataError(CclipError):
    """An input file is missing, invalid or unreadable, whatever it is: image, bundle, checkpoint, recipe or profile."""

    exit_code = 6


class CheckpointError(DataError):
    """A checkpoint is truncated, belongs to another network, or lacks tensors."""


class BundleError(DataError):
    """A bundle is incomplete, was altered, or has an unsupported schema version."""


class ImageError(DataError):
    """An image cannot be decoded or used."""


class PromptError(UsageError):
    """A prompt is empty or too long."""


class RewriteRefused(CclipError):
    """An exact rewrite does not apply to a module; the message is the reason."""
