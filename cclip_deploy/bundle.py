"""The bundle: a folder that is exported, verified, moved and served as one, every byte of it under a checksum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from cclip_deploy.data.tokens import PromptTokenizer
from cclip_deploy.errors import BundleError, UsageError
from cclip_deploy.files import link_or_copy, restore_folder, sha256_file, whole_folder
from cclip_deploy.manifest import SCHEMA_VERSION, GraphEntry, Manifest, graph_key, inside
from cclip_deploy.precisions import build_command, is_quantised, precision_of

CHAIN = ("image_encoder", "prompt_encoder", "mask_decoder")
"""The graphs that serve: a picture's features and a prompt's kernel make a mask."""
MANIFEST, SUMS, TOKENIZER = "manifest.json", "SHA256SUMS", "tokenizer.json"


class Bundle:
    """A bundle opened for reading: its manifest is checked at once, every other file when it is first asked for."""

    def __init__(self, path: Path, manifest: Manifest, sums: Mapping[str, str]) -> None:
        self.path = path
        self.manifest = manifest
        self.sums = sums
        self._checked: set[str] = {MANIFEST}
        self._checking: dict[str, Future[None]] = {}
        self._tokenizer: PromptTokenizer | None = None

    @staticmethod
    def open(path: Path) -> Bundle:
        """Read and check SHA256SUMS and the manifest; BundleError says what is wrong and what to do."""
        path = Path(path)
        if not path.is_dir():
            restore_folder(path)
        if not path.is_dir():
            raise BundleError(f"There is no bundle at {path}. Make one: cclip-deploy export CHECKPOINT -o {path}")
        if not (path / SUMS).is_file() or not (path / MANIFEST).is_file():
            raise BundleError(f"{path} is no bundle: it lacks {MANIFEST} or {SUMS}. Give the folder that export wrote.")
        sums = _read_sums(path / SUMS)
        _check_sum(path, MANIFEST, sums)
        manifest = _read_manifest(path / MANIFEST)
        _check_chain(path / MANIFEST, manifest, sums)
        return Bundle(path, manifest, sums)

    @staticmethod
    def unsealed(folder: Path, manifest: Manifest) -> Bundle:
        """A bundle that is being made, its files taken as they lie there; never for one that was found on a disk."""
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        bundle = Bundle(folder, manifest, {})
        bundle._checked.update(files)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file of this bundle, its checksum verified."""
        if name not in self._checked:
            if name in self._checking:
                self._checking.pop(name).result()
            else:
                _check_sum(self.path, name, self.sums)
            self._checked.add(name)
        return self.path / name

    def check_ahead(self, *graphs: str) -> None:
        """Begin to verify graphs, one after the other, beside the caller's own work.

        `file` waits for the verdict and raises it. A graph that the bundle lacks is passed over: who needs it is told.
        """
        files = [self.manifest.graphs[name].file for name in graphs if name in self.manifest.graphs]
        thread = ThreadPoolExecutor(1, "cclip-checksums")
        for file in files:
            if file not in self._checked and file not in self._checking:
                self._checking[file] = thread.submit(_check_sum, self.path, file, self.sums)
        thread.shutdown(wait=False)

    def check_all(self) -> tuple[str, ...]:
        """Verify every checksum; returns the names of files that lie in the folder without one."""
        for name in self.sums:
            self.file(name)
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}
        return tuple(sorted(present - set(self.sums) - {SUMS}))

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
        held = precision_of(name, precision)
        key = graph_key(name, held)
        if key in self.manifest.graphs or held == "fp32":
            return self.graph(key)
        made_by = build_command(precision, *(() if name in CHAIN else (f"--graph {name}",)))
        have = ", ".join(self.manifest.graphs)
        raise UsageError(f"{self.path} has no graph {key!r}; it has {have}. Make it: {made_by}")

    def chain(self, precision: str) -> dict[str, GraphEntry]:
        """Every graph that serves, in a precision; raises as `graph_in` does where one is missing."""
        return {name: self.graph_in(name, precision) for name in CHAIN}

    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer that the prompts of this bundle go through."""
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer.load(self.file(TOKENIZER))
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
        EnvironmentProblem: the disk is full or not writable.
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
        BundleError: it is no longer the bundle that was opened, or a file was altered, or has no checksum: it must not
            get a new one that calls it right.
    """
    with whole_folder(bundle.path) as unfinished:
        if _read_sums(bundle.path / SUMS) != bundle.sums:
            raise BundleError(f"{bundle.path} was changed by another run since it was opened. Run it again.")
        if strays := bundle.check_all():
            raise BundleError(
                f"{bundle.path} holds {', '.join(strays)}, which no checksum covers. Move that elsewhere and run it "
                "again."
            )
        for name in bundle.sums:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.path / name, unfinished / name)
        yield unfinished
        _seal(unfinished)


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


def _seal(folder: Path) -> None:
    (folder / SUMS).unlink(missing_ok=True)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _read_sums(path: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            digest, name = line.split("  ", 1)
            sums[inside(name)] = digest
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is damaged: {error}. Export or copy the bundle again.") from error
    return sums


def _check_sum(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    path = folder / name
    if name not in sums:
        raise BundleError(
            f"{name} has no checksum in {folder / SUMS}, so it will not be loaded. Export the bundle again."
        )
    try:
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle. Copy or export the bundle again.")
        found = sha256_file(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.") from error
    if found != sums[name]:
        raise BundleError(
            f"{path} was altered: its SHA-256 begins {found[:12]}, {SUMS} says {sums[name][:12]}. "
            "Copy or export the bundle again; nothing of it was loaded."
        )


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path} is not a manifest of schema {SCHEMA_VERSION}: {place}: {first['msg']}. Export the bundle again."
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {manifest.schema_version}, this version reads {SCHEMA_VERSION}. Export it again."
        )
    return manifest


def _check_chain(path: Path, manifest: Manifest, sums: Mapping[str, str]) -> None:
    """Raise BundleError where the manifest speaks of other files, origins or sizes than the bundle has."""
    told = [(graph.file, graph.sha256) for graph in manifest.graphs.values()]
    told += [(engine.file, engine.sha256) for engine in manifest.engines]
    told += [
        (graph.calibration.file, graph.calibration.sha256) for graph in manifest.graphs.values() if graph.calibration
    ]
    for file, sha256 in told:
        if sums.get(file) != sha256:
            raise BundleError(
                f"{path} speaks of a {file} with SHA-256 {sha256[:12]}, {SUMS} of another. "
                "Copy or export the bundle again."
            )
    for name, graph in manifest.graphs.items():
        source = manifest.graphs.get(name.removesuffix(f".{graph.precision}"))
        origin = manifest.checkpoint.sha256 if graph.precision == "fp32" else source and source.sha256
        if is_quantised(graph.precision) and graph.calibration is None:
            raise BundleError(f"{path}: graph {name} does not say what it was calibrated with. Build it again.")
        if graph.made_from_sha256 != origin:
            raise BundleError(f"{path}: graph {name} was not made from what lies in this bundle. Build it again.")
        for tensor in graph.inputs:
            sides = {
                "image": (tensor.shape[2:], manifest.image_hw),
                "features": (tensor.shape[1:3], manifest.image_hw),  # channels last
                "tokens": (tensor.shape[1:], (manifest.prompt_length,)),
            }
            have, expected = sides.get(tensor.name, ((), ()))
            if have != expected:
                raise BundleError(f"{path}: input {tensor.name} of {name} is {tensor.shape}, not of size {expected}.")
