"""The bundle: a folder that is exported, verified, moved and served as one, every byte of it under a checksum."""

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
"""The graphs that serve: a picture's features and a prompt's kernel make a mask."""
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
MANIFEST_BYTES, TOKENIZER_BYTES, RECORD_BYTES = 16 * 2**20, 32 * 2**20, 64 * 2**20
"""The largest files of each kind that are read; records are calibrations and layer tables."""
OPEN_ATTEMPTS, OPEN_PAUSE_S = 5, 0.01
LOADED_FOLDERS = ("graphs", "engines")
"""What lies here is given to runtimes, some of which open neighbors of a file, so nothing may lie here unlisted."""


class Bundle:
    """A bundle opened for reading, as it was at that moment.

    SHA256SUMS is read once. Every later read gives the bytes that it lists or is a BundleError, so what a program loads
    early and late, or loads again, is of one bundle, even where another one has taken its place meanwhile.
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
        """Read and check SHA256SUMS and the manifest; BundleError says what is wrong and what to do.

        While a bundle is replaced, its name is missing for a moment, or the two files are of two bundles; then it is
        tried again.
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
        """A bundle that is being made; never for one that was found on a disk.

        Files are checked against the manifest's hashes and, where it has none, against `sums`, those of the bundle that
        they were linked from. A file with neither is taken as it is.
        """
        bundle = Bundle(folder, manifest, {**(sums or {}), **dict(file_hashes(manifest))})
        bundle._is_unsealed = True
        return bundle

    @property
    def identity(self) -> str:
        """SHA-256 over all of the bundle: that of its SHA256SUMS."""
        return hash_bytes(format_sums(self.sums).encode())

    def read(self, name: str, most_bytes: int = FILE_BYTES) -> bytes:
        """The content of a file, its checksum verified on these bytes.

        Raises:
            BundleError: it has no checksum or another content, is missing, or has more than `most_bytes` bytes.
        """
        ahead = self._ahead.pop(name, None)
        return self._read(name, most_bytes) if ahead is None else ahead.result()

    def read_ahead(self, precision: str, *graphs: str) -> None:
        """Begin to read graphs, one after the other, beside the caller's own work.

        The bytes are kept until `read` takes them, which raises what went wrong. A graph that the bundle lacks is
        passed over: whoever needs it gets the error.
        """
        keys = [graph_key(name, parse_precision(precision).of_graph(name)) for name in graphs]
        thread = ThreadPoolExecutor(1, "cclip-reads")
        for file in (self.manifest.graphs[key].file for key in keys if key in self.manifest.graphs):
            if file not in self._ahead:
                self._ahead[file] = thread.submit(self._read, file, FILE_BYTES)
        thread.shutdown(wait=False)

    def check(self, name: str) -> int:
        """Verify a file's checksum once, without keeping its content; returns its size in bytes."""
        if name not in self._sizes:
            with self._explained(name):
                digest, size = hash_file(self.path / name)
                require_equal(self.path / name, digest, self.sums.get(name, digest))
            self._sizes[name] = size
        return self._sizes[name]

    def check_all(self) -> tuple[str, ...]:
        """Verify every checksum; returns the names of files that lie in the folder without one, as `strays` does."""
        for name in self.sums:
            self._sizes.pop(name, None)
            self.check(name)
        return self.strays()

    def strays(self) -> tuple[str, ...]:
        """The names of files that lie in the folder without a checksum.

        BundleError where one of those is among the graphs or engines.
        """
        _refuse_unlisted(self.path, self.sums)
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}
        return tuple(sorted(present - set(self.sums) - {SUMS}))

    def require_in_place(self) -> None:
        """BundleError where another bundle, or none, lies in this one's place."""
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
        """Refuse a file without a checksum, and say of any other failure whether the bundle was replaced."""
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
        """The entry of a graph; UsageError lists what there is."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            have = ", ".join(self.manifest.graphs)
            raise UsageError(f"{self.path} has no graph {name!r}; it has {have}. Build or export it first.") from None

    def graph_in(self, name: str, precision: str) -> GraphEntry:
        """The entry of a graph in a precision; a prompt encoder or mask decoder is never quantized, so in the rest's.

        UsageError, where the bundle does not have it, names the command that makes it: no other precision stands in.
        """
        held = parse_precision(precision).of_graph(name)
        key = graph_key(name, held)
        if key in self.manifest.graphs or held == "fp32":
            return self.graph(key)
        made_by = parse_precision(precision).build_command(*(() if name in CHAIN else (f"--graph {name}",)))
        have = ", ".join(self.manifest.graphs)
        raise UsageError(f"{self.path} has no graph {key!r}; it has {have}. Make it: {made_by}")

    def chain(self, precision: str) -> dict[str, GraphEntry]:
        """Every graph that serves, in a precision; raises as `graph_in` does where one is missing."""
        return {name: self.graph_in(name, precision) for name in CHAIN}

    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer that the prompts of this bundle go through."""
        if self._tokenizer is None:
            content = self.read(TOKENIZER, TOKENIZER_BYTES)
            self._tokenizer = PromptTokenizer.parse(content, self.path / TOKENIZER)
        return self._tokenizer

    def precisions(self) -> tuple[str, ...]:
        """The precisions that every graph of this bundle exists in."""
        return tuple(dict.fromkeys(entry.precision for entry in self.manifest.graphs.values()))


@contextmanager
def new_bundle(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes its name only when the block ends well, else nothing is left of it.

    Raises:
        UsageError: something is at `path` already and `replace` is false, or it is no bundle.
        TargetInUse: another run is writing it.
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
    """A copy of a bundle by hard links, to add files to; it replaces the old one when the block ends well.

    No other run can edit the bundle meanwhile. Never write into an existing file of the copy: it is the old bundle's
    too. Write a new one, or unlink first.

    Raises:
        TargetInUse: another run is editing or replacing it.
        BundleError: it is no longer the bundle that was opened, or a file was altered, before the block or in it, or
            has no checksum: it must not get a new one that calls it right.
    """
    with whole_folder(bundle.path) as unfinished:
        bundle.require_in_place()
        if strays := bundle.strays():
            raise BundleError(
                f"{bundle.path} holds {', '.join(strays)}, which no checksum covers. Move that elsewhere and run it "
                "again."
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
    """UsageError where a new bundle cannot go; asked before any work is done."""
    path = Path(path)
    restore_folder(path)
    if not path.exists():
        return
    if not replace:
        raise UsageError(f"{path} exists already. Choose another output, or give --force to replace it.")
    if not (path / MANIFEST).is_file() or not (path / SUMS).is_file():
        raise UsageError(f"{path} is no bundle, so --force will not replace it. Choose another output.")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder that `new_bundle` or `edited_bundle` gave."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _seal(folder: Path, edited: Bundle | None = None) -> None:
    """Write SHA256SUMS; what is still a link to a file of the bundle that was edited has to have its checksum."""
    (folder / SUMS).unlink(missing_ok=True)
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        sums[name], _ = hash_file(path)
        if edited is not None and name in edited.sums and _is_link_to(edited.path / name, path):
            require_equal(edited.path / name, sums[name], edited.sums[name])
    (folder / SUMS).write_text(format_sums(sums), encoding="utf-8")


def _is_link_to(old: Path, new: Path) -> bool:
    return old.exists() and old.samefile(new)


def _sums_of(path: Path) -> bytes | None:
    """SHA256SUMS as it lies there now, None where there is none to read."""
    try:
        return read_file(path / SUMS, SUMS_BYTES)
    except BundleError:
        return None


def _open(path: Path) -> Bundle:
    if not path.is_dir():
        restore_folder(path)
    if not path.is_dir():
        raise BundleError(f"There is no bundle at {path}. Make one: cclip-deploy export CHECKPOINT -o {path}")
    if not (path / SUMS).is_file() or not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is no bundle: it lacks {MANIFEST} or {SUMS}. Give the folder that export wrote.")
    sums = parse_sums(read_file(path / SUMS, SUMS_BYTES), path / SUMS)
    content = read_file(path / MANIFEST, MANIFEST_BYTES)
    require_listed(path, MANIFEST, sums)
    require_equal(path / MANIFEST, hash_bytes(content), sums[MANIFEST])
    manifest = parse_manifest(content, path / MANIFEST)
    check_chain(path / MANIFEST, manifest, sums)
    return Bundle(path, manifest, sums)


def _refuse_unlisted(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise BundleError where anything that SHA256SUMS does not list lies among the graphs or engines."""
    for kind in LOADED_FOLDERS:
        if (folder / kind).is_symlink():
            raise BundleError(f"{folder / kind} is a link. Copy or export the bundle again.")
        for path in (folder / kind).rglob("*"):
            name = path.relative_to(folder).as_posix()
            if name not in sums and (path.is_symlink() or not path.is_dir()):
                raise BundleError(
                    f"{folder} holds {name}, which {SUMS} does not list: a runtime might load it. Move it elsewhere."
                )
