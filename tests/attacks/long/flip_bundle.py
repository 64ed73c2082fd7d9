"""Flip bytes in the files of a bundle and use it: the result must be unchanged or an error of the project.

Half of the flips leave SHA256SUMS as it was, as an accident does: then the bundle is refused or answers as before. The
other half make the sums fit, as a stranger does, so that the parsers see the bytes: then a changed weight gives another
answer, and nothing but an error of the project may be raised.

    python -m tests.attacks.long.flip_bundle BUNDLE --flips 15000 --seed 0

Exits with 1 on any other exception or, without fitting sums, another answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.errors import CclipError
from cclip_deploy.inference.segmenter import Segmenter
from cclip_deploy.prompts.tokenizer import END, START, PromptTokenizer
from cclip_deploy.runtime.onnxruntime.cpu import OnnxRuntimeBackend
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend
from cclip_deploy.verify.inspect import describe_bundle
from tests.bundles import digests, linked_copy, replace_text, reseal

FILES = ("manifest.json", "tokenizer.json", "SHA256SUMS", "graphs/mask_decoder.onnx")
PROMPT, SECONDS_LIMIT = "ab", 60.0
BACKENDS = {"onnxruntime": OnnxRuntimeBackend, "openvino": OpenVinoBackend}


@dataclass
class Summary:
    """Outcomes by file, and each failure with what reproduces it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [f"{count:7} {name}" for name, count in sorted(self.outcomes.items())] + self.failures


def small_copy(bundle: Path, folder: Path) -> Path:
    """A copy without the fused graph, and with a tokenizer of few tokens, which is read in no time."""
    copy = linked_copy(bundle, folder)
    (copy / "graphs" / "fused.onnx").unlink(missing_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "ab", "ab</w>", START, END]
    tokenizer = PromptTokenizer({word: number for number, word in enumerate(words)}, [("a", "b"), ("a", "b</w>")])
    replace_text(copy / "tokenizer.json", tokenizer.to_json())

    def fit(manifest: dict) -> None:  # type: ignore[type-arg]
        manifest["graphs"].pop("fused", None)

    reseal(copy, fit)
    return copy


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One to three changes: a bit, a byte, a piece taken out, or a piece twice."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place, length = chance.randrange(len(changed)), chance.choice((1, 1, 2, 4, 16))
        kind = chance.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place] = chance.choice((0, 0x7F, 0x80, 0xFF, ord("9"), ord('"'), chance.randrange(256)))
        elif kind == 2 and len(changed) > 100:
            del changed[place : place + length]
        else:
            changed[place:place] = changed[place : place + length]
    return bytes(changed)


class Flipper:
    """Plants flips in one copy of a bundle, uses it and takes them back."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.path = small_copy(bundle, folder)
        self.contents = {name: (self.path / name).read_bytes() for name in FILES}
        self.hashes = digests(self.path)
        self.pixels = np.linspace(0, 1, 40 * 60, dtype=np.float32).reshape(40, 60)
        self.answers = {name: self._answer(name) for name in BACKENDS}

    def flip(self, name: str, content: bytes, fits: bool, backend: str) -> str:
        """The outcome of one flip: `refused`, `same answer` or `another answer`; raises what is no CclipError."""
        try:
            self._write(name, content)
            if fits:
                self._fit(name, content)
            describe_bundle(self.path)
            answer = self._answer(backend)
        except CclipError:
            return "refused"
        finally:
            for file in FILES:
                self._write(file, self.contents[file])
        expected = self.answers[backend]
        return "same answer" if np.array_equal(answer, expected, equal_nan=True) else "another answer"

    def _answer(self, backend: str) -> np.ndarray:
        bundle = Bundle.open(self.path)
        runs = BACKENDS[backend](bundle, threads=1, seconds_limit=SECONDS_LIMIT)
        return np.stack(list(Segmenter.of_bundle(bundle, runs).probabilities(self.pixels, [PROMPT])))

    def _fit(self, name: str, content: bytes) -> None:
        hashes = {**self.hashes, name: hashlib.sha256(content).hexdigest()}
        if name.startswith("graphs/"):
            old, new = (value[name].encode() for value in (self.hashes, hashes))
            manifest = self.contents["manifest.json"].replace(old, new)
            self._write("manifest.json", manifest)
            hashes["manifest.json"] = hashlib.sha256(manifest).hexdigest()
        lines = [f"{digest}  {file}\n" for file, digest in hashes.items() if file != "SHA256SUMS"]
        self._write("SHA256SUMS", "".join(lines).encode())

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def flip_bundle(bundle: Path, flips: int, seed: int, on_progress: Callable[[str], None] = lambda _: None) -> Summary:
    """So many flips, in turn over the files and over sums that fit and do not; every seed gives its own."""
    folder = Path(tempfile.mkdtemp(prefix="flips."))
    summary = Summary()
    try:
        flipper = Flipper(bundle, folder)
        for number in range(flips):
            chance = random.Random(f"{seed}/{number}")
            name = FILES[number % 4]
            fits = number // 4 % 2 == 0 and name != "SHA256SUMS"
            backend = "openvino" if number // 8 % 4 == 0 else "onnxruntime"
            content = flipped(flipper.contents[name], chance)
            how = f"{name}, sums {'fit' if fits else 'as before'}"
            try:
                outcome = flipper.flip(name, content, fits, backend)
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                summary.failures.append(f"FAILED flip {number} of seed {seed}: {how}, {backend}: {outcome}")
            if outcome == "another answer" and not fits:
                summary.failures.append(f"FAILED flip {number} of seed {seed}: {how}, {backend}: {outcome}")
            summary.outcomes[f"{how}: {outcome}"] += 1
            if number % 500 == 499:
                on_progress(f"{number + 1} of {flips}, {len(summary.failures)} failures")
    finally:
        shutil.rmtree(folder)
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle in deploy form; a tiny one is quick")
    parser.add_argument("--flips", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    summary = flip_bundle(options.bundle, options.flips, options.seed, lambda line: print(line, file=sys.stderr))
    print("\n".join(summary.lines()))
    print(json.dumps({"flips": options.flips, "seed": options.seed, "failures": len(summary.failures)}))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
