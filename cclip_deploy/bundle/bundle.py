"""Bundles: folders with the graphs, engines, tokenizer and references of a network, all files with checksums."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cclip_deploy.bundle.chain import check_chain, file_hashes, parse_manifest
from cclip_deploy.bundle.checksums import (
    FILE_BYTES,
    SUMS,
    SUMS_BYTES,
    format_sums,
    hash_bytes,
    hash_file,
    parse_sums,
    read_file,
    require_equal,
    require_listed,
)
from cclip_deploy.bundle.manifest import GraphEntry, Manifest, graph_key
from cclip_deploy.bundle.precision import parse_precision
from cclip_deploy.common.files import link_or_copy, restore_folder, whole_folder
from cclip_deploy.errors import BundleError, UsageError
from cclip_deploy.prompts.tokenizer import PromptTokenizer

CHAIN = ("image_encoder", "prompt_encoder", "mask_decoder")
"""The graphs that segmentation needs: image features and prompt kernels are combined into masks."""
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
MANIFEST_BYTES, TOKENIZER_BYTES, RECORD_BYTES = 16 * 2**20, 32 * 2**20, 64 * 2**20
"""Size limits in bytes; records are calibration records and layer tables."""
OPEN_ATTEMPTS, OPEN_PAUSE_S = 5, 0.01
LOADED_FOLDERS = ("graphs", "engines")
"""Folders without unlisted files, because some runtimes open files beside the one they are given."""


class Bundle:
    """A bundle opened for reading.

    SHA256SUMS is read once, when the bundle is opened. Every later read returns the bytes that it lists or raises
    BundleError, so a program never mixes files of two bundles, even if the folder is replaced meanwhile.
    """

    def __init__(self, path: Path, manifest: Manifest, sums: Mapping[str, str]) -> None:
        self.path = path
        self.manifest = manifest
        self.sums = sums
        self._ahead: dict[str, Future[bytes]] = {}
        self._sizes: dict[str, int] = {}
        self._tokenizer: PromptTokenizer | None = None
        self._is_unsealed = False

    @staticmethod
    def open(path: Path) -> Bundle:
        """Read and check SHA256SUMS and the manifest; raise BundleError if they are damaged or missing.

        While a bundle is being replaced, the folder can be missing for a moment, or the two files can belong to
        different bundles. Opening is then tried again.
        """
        path = Path(path)
        for _ in range(OPEN_ATTEMPTS - 1):
            listed = _sums_of(path)
            try:
                return _open(path)
            except BundleError:
                if listed is not None and listed == _sums_of(path):
                    raise
                time.sleep(OPEN_PAUSE_S)
        return _open(path)

    @staticmethod
    def unsealed(folder: Path, manifest: Manifest, sums: Mapping[str, str] | None = None) -> Bundle:
        """Return a bundle that is still being written by this process.

        Files are checked against the manifest's hashes or, if it has none, against `sums`: the checksums of the bundle
        that they were linked from. Files in neither are not checked.
        """
        bundle = Bundle(folder, manifest, {**(sums or {}), **dict(file_hashes(manifest))})
        bundle._is_unsealed = True
        return bundle

    @property
    def identity(self) -> str:
        """SHA-256 of SHA256SUMS, and thus of the whole bundle."""
        return hash_bytes(format_sums(self.sums).encode())

    def read(self, name: str, most_bytes: int = FILE_BYTES) -> bytes:
        """Return the content of a file after verifying its checksum.

        Raises:
            BundleError: the file is missing, has no or another checksum, or has more than `most_bytes` bytes.
        """
        ahead = self._ahead.pop(name, None)
        return self._read(name, most_bytes) if ahead is None else ahead.result()

    def read_ahead(self, precision: str, *graphs: str) -> None:
        """Start reading graphs in a background thread, in order.

        `read` returns the bytes, or raises the error that occurred. Graphs that the bundle lacks are skipped.
        """
        keys = [graph_key(name, parse_precision(precision).of_graph(name)) for name in graphs]
        thread = ThreadPoolExecutor(1, "cclip-reads")
        for file in (self.manifest.graphs[key].file for key in keys if key in self.manifest.graphs):
            if file not in self._ahead:
                self._ahead[file] = thread.submit(self._read, file, FILE_BYTES)
        thread.shutdown(wait=False)

    def check(self, name: str) -> int:
        """Verify a file's checksum, once, and return its size in bytes."""
        if name not in self._sizes:
            with self._explained(name):
                digest, size = hash_file(self.path / name)
                require_equal(self.path / name, digest, self.sums.get(name, digest))
            self._sizes[name] = size
        return self._sizes[name]

    def check_all(self) -> tuple[str, ...]:
        """Verify every checksum and return the names of files without one; see `strays`."""
        for name in self.sums:
            self._sizes.pop(name, None)
            self.check(name)
        return self.strays()

    def strays(self) -> tuple[str, ...]:
        """Return the names of files in the folder that have no checksum.

        Raises:
            BundleError: one of them is among the graphs or engines.
        """
        _refuse_unlisted(self.path, self.sums)
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}
        return tuple(sorted(present - set(self.sums) - {SUMS}))

    def require_in_place(self) -> None:
        """Raise BundleError if the folder holds another bundle now, or none."""
        if not self._is_unsealed and _sums_of(self.path) != format_sums(self.sums).encode():
            raise BundleError(
                f"{self.path} was replaced or changed since it was opened. Open it again; nothing else was loaded."
            )

    def _read(self, name: str, most_bytes: int) -> bytes:
        with self._explained(name):
            content = read_file(self.path / name, most_bytes)
            digest = hash_bytes(content)
            require_equal(self.path / name, digest, self.sums.get(name, digest))
        return content

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Raise BundleError for a file without a checksum, and report if the bundle was replaced in other failures."""
        if not self._is_unsealed:
            require_listed(self.path, name, self.sums)
        try:
            if not self._is_unsealed and name.split("/")[0] in LOADED_FOLDERS:
                _refuse_unlisted(self.path, self.sums)
            yield
        except BundleError:
            self.require_in_place()
            raise

    def graph(self, name: str) -> GraphEntry:
        """Return the manifest's entry of a graph; raise UsageError if there is none."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            have = ", ".join(self.manifest.graphs)
            raise UsageError(f"{self.path} has no graph {name!r}; it has {have}. Build or export it first.") from None

    def graph_in(self, name: str, precision: str) -> GraphEntry:
        """Return the manifest's entry of a graph in a network of a precision; see `Precision.of_graph`.

        Raises:
            UsageError: the bundle does not have it; the message names the command that builds it.
        """
        network = parse_precision(precision)
        key = graph_key(name, network.of_graph(name))
        if key in self.manifest.graphs or network.of_graph(name) == "fp32":
            return self.graph(key)
        command = network.build_command(*(() if name in CHAIN else (f"--graph {name}",)))
        have = ", ".join(self.manifest.graphs)
        raise UsageError(f"{self.path} has no graph {key!r}; it has {have}. Build it: {command}")

    def chain(self, precision: str) -> dict[str, GraphEntry]:
        """Return the entries of the graphs in `CHAIN`, in a precision; raise like `graph_in` if one is missing."""
        return {name: self.graph_in(name, precision) for name in CHAIN}

    def tokenizer(self) -> PromptTokenizer:
        """Return the bundle's tokenizer."""
        if self._tokenizer is None:
            content = self.read(TOKENIZER, TOKENIZER_BYTES)
            self._tokenizer = PromptTokenizer.parse(content, self.path / TOKENIZER)
        return self._tokenizer

    def precisions(self) -> tuple[str, ...]:
        """Return the precisions of this bundle's graphs."""
        return tuple(dict.fromkeys(entry.precision for entry in self.manifest.graphs.values()))


@contextmanager
def new_bundle(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it is renamed to `path` if the block succeeds, and removed otherwise.

    Raises:
        UsageError: `path` exists, and `replace` is false or it is not a bundle.
        TargetInUse: another process is writing to `path`.
        EnvironmentIssue: the disk is full or not writable.
    """
    path = Path(path)
    check_output(path, replace)
    with whole_folder(path) as unfinished:
        check_output(path, replace)
        unfinished.mkdir()
        yield unfinished
        _seal(unfinished)
        check_output(path, replace)


@contextmanager
def edited_bundle(bundle: Bundle) -> Iterator[Path]:
    """Yield a hard-linked copy of a bundle to add files to; it replaces the bundle if the block succeeds.

    The bundle is locked meanwhile. Never write into an existing file of the copy, which is a file of the old bundle
    too: unlink it first.

    Raises:
        TargetInUse: another process is editing or replacing the bundle.
        BundleError: the bundle was replaced since it was opened, or a file was altered or has no checksum.
    """
    with whole_folder(bundle.path) as unfinished:
        bundle.require_in_place()
        if strays := bundle.strays():
            raise BundleError(
                f"{bundle.path} contains {', '.join(strays)} without a checksum. Move that elsewhere and run again."
            )
        for name in bundle.sums:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            if not (bundle.path / name).is_file():
                bundle.check(name)  # raises
            link_or_copy(bundle.path / name, unfinished / name)
            digest, _ = hash_file(unfinished / name)
            require_equal(bundle.path / name, digest, bundle.sums[name])
        yield unfinished
        _seal(unfinished, bundle)
        bundle.require_in_place()


def check_output(path: Path, replace: bool) -> None:
    """Raise UsageError if a new bundle cannot be written to `path`."""
    path = Path(path)
    restore_folder(path)
    if not path.exists():
        return
    if not replace:
        raise UsageError(f"{path} exists already. Choose another output, or give --force to replace it.")
    if not (path / MANIFEST).is_file() or not (path / SUMS).is_file():
        raise UsageError(f"{path} is not a bundle, so --force does not replace it. Choose another output.")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a folder from `new_bundle` or `edited_bundle`."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _seal(folder: Path, edited: Bundle | None = None) -> None:
    """Write SHA256SUMS; raise BundleError if a file that is linked from the edited bundle was altered."""
    (folder / SUMS).unlink(missing_ok=True)
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        sums[name], _ = hash_file(path)
        if edited is not None and name in edited.sums and _is_link_to(edited.path / name, path):
            require_equal(edited.path / name, sums[name], edited.sums[name])
    (folder / SUMS).write_text(format_sums(sums), encoding="utf-8")


CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")
"""File names that a command for bundles is given by mistake; a bundle is never proposed to be written there."""


def _is_link_to(old: Path, new: Path) -> bool:
    return old.exists() and old.samefile(new)


def _sums_of(path: Path) -> bytes | None:
    """Return the current content of SHA256SUMS; None if it cannot be read."""
    try:
        return read_file(path / SUMS, SUMS_BYTES)
    except BundleError:
        return None


def _open(path: Path) -> Bundle:
    if not path.is_dir():
        restore_folder(path)
    if path.is_file() or path.suffix in CHECKPOINT_SUFFIXES:
        reason = ": it is a file" if path.is_file() else ""
        raise BundleError(
            f"There is no bundle at {path}{reason}. Export one: cclip-deploy export CHECKPOINT -o {path.stem}.cclip"
        )
    if not path.is_dir():
        raise BundleError(f"There is no bundle at {path}. Export one: cclip-deploy export CHECKPOINT -o {path}")
    if not (path / SUMS).is_file() or not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is not a bundle: {MANIFEST} or {SUMS} is missing. Use a folder that export wrote.")
    sums = parse_sums(read_file(path / SUMS, SUMS_BYTES), path / SUMS)
    content = read_file(path / MANIFEST, MANIFEST_BYTES)
    require_listed(path, MANIFEST, sums)
    require_equal(path / MANIFEST, hash_bytes(content), sums[MANIFEST])
    manifest = parse_manifest(content, path / MANIFEST)
    check_chain(path / MANIFEST, manifest, sums)
    return Bundle(path, manifest, sums)


def _refuse_unlisted(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise BundleError if a file among the graphs or engines is not listed in SHA256SUMS."""
    for kind in LOADED_FOLDERS:
        if (folder / kind).is_symlink():
            raise BundleError(f"{folder / kind} is a symbolic link. Copy or export the bundle again.")
        for path in (folder / kind).rglob("*"):
            name = path.relative_to(folder).as_posix()
            if name not in sums and (path.is_symlink() or not path.is_dir()):
                raise BundleError(
                    f"{folder} contains {name}, which {SUMS} does not list; a runtime might load it. Move it elsewhere."
                )
