"""Kill and interrupt whole commands at their file operations: `python tests/attacks/long/kill.py [--seed N]`.

Each command is run once to count its file operations below its output; then again and again, with SIGKILL, SIGTERM,
SIGHUP or SIGINT sent at one of them: at every rename, and at others that the seed draws. After each, the output has to
be the old one or the new one, whole; the next run has to succeed; and nothing else may lie there after it. The
processes are forked from one that has imported everything. Not collected by pytest; exit code 1 where something fails.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", ORT_DISABLE_TELEMETRY="1", CUDA_VISIBLE_DEVICES="")

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.link", "os.scandir"})
HIDDEN = re.compile(r"\..*(cclip-lock|\.unfinished|\.old|\.part|-of-\d+)")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
RECIPE = """
epochs = 2
image_size = 32
images_per_batch = 2
threads = 1
[devices]
accelerator = "cpu"
"""


class Wrong(Exception):
    """What a kill must not have done."""


@dataclass(frozen=True)
class Program:
    """A command whose output is `out` in a folder of its own.

    Attributes:
        arguments: of the command line; "OUT" is the output.
        kills: how many.
        check: raises Wrong unless the output is the old or the new one, whole.
        old: a copy of it is the output at the start; None is none.
        again: arguments of the next run, if others.
        codes: exit codes of the next run.
    """

    name: str
    arguments: tuple[str, ...]
    kills: int
    check: Callable[[Path], None]
    old: Path | None = None
    again: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)


def forked(work: Callable[[], int], log: Path) -> int:
    """The exit code of a forked child, minus the signal that ended it; its output is appended to a file."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(arguments: tuple[str, ...], out: Path) -> int:
    """Run the command line in this process; its exit code."""
    from cclip_deploy.cli.app import main

    sys.argv = ["cclip-deploy", *(str(out) if word == "OUT" else word for word in arguments)]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def watched(work: Callable[[], int], place: Path, on_event: Callable[[int, str], None]) -> int:
    """Run, and give every file operation below a folder its number."""
    count, root = 0, str(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS and any(
            isinstance(a, str | os.PathLike) and os.fspath(a).startswith(root) for a in arguments
        ):
            count += 1
            on_event(count, event)

    sys.addaudithook(hook)
    return work()


def events_of(program: Program, place: Path, log: Path) -> list[str]:
    """The file operations of an undisturbed run, which has to succeed."""
    listed = place.with_suffix(".events")
    out = prepare(program, place)

    def run() -> int:
        found: list[str] = []
        code = watched(lambda: command(program.arguments, out), place, lambda number, event: found.append(event))
        listed.write_text("\n".join(found))
        return code

    if code := forked(run, log):
        raise Wrong(f"{program.name} ends with {code} undisturbed: {log.read_text()[-2000:]}")
    program.check(out)
    return listed.read_text().splitlines()


def prepare(program: Program, place: Path) -> Path:
    """A fresh folder, with the old output in it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if program.old is not None:
        shutil.copytree(program.old, place / "out")
    return place / "out"


def kill(program: Program, place: Path, moment: int, number: signal.Signals) -> str:
    """Disturb one run, look, run again, look again; how the disturbed one ended."""
    log = place.with_suffix(".log")
    log.unlink(missing_ok=True)
    out = prepare(program, place)

    def strike(at: int, event: str) -> None:
        if at == moment:
            os.kill(os.getpid(), number)

    code = forked(lambda: watched(lambda: command(program.arguments, out), place, strike), log)
    ended = -number if number == signal.SIGKILL else 128 + number
    if code not in (ended, 0):
        raise Wrong(f"it ended with {code}, not {ended}: {log.read_text()[-600:]}")
    left = list(hidden(place))
    program.check(out)
    again = forked(lambda: command(program.again or program.arguments, out), log)
    if again not in program.codes:
        raise Wrong(f"the next run ended with {again}: {log.read_text()[-600:]}")
    program.check(out)
    if remaining := list(hidden(place)):
        raise Wrong(f"after the next run there is {remaining}")
    if code == 0:
        return "ended first"
    killed = "killed" if number == signal.SIGKILL else "signalled"
    return f"{killed}, left nothing" if not left else f"{killed}, left something for the next run"


def hidden(place: Path) -> Iterator[str]:
    """Locks and temporaries below a folder."""
    return (path.relative_to(place).as_posix() for path in place.rglob("*") if HIDDEN.fullmatch(path.name))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not HIDDEN.fullmatch(path.name)
    }


def need(holds: object, said: str) -> None:
    if not holds:
        raise Wrong(said)


def programs(shared: Path, share: float) -> list[Program]:
    """All commands that write folders, with what they need, made once."""
    log = shared / "log"

    def make(*arguments: str) -> None:
        if code := forked(lambda: command(arguments, shared), log):
            raise SystemExit(f"{arguments[0]} ended with {code}: {log.read_text()[-2000:]}")

    films, bundle, checkpoint = shared / "films", shared / "tiny.cclip", shared / "tiny.safetensors"
    make("synth", str(films), "--images", "8", "--size", "32", "--seed", "3")
    (shared / "tiny.toml").write_text(RECIPE)
    trained = shared / "trained"
    training = ("train", str(shared / "tiny.toml"), "--data", str(films), "--resume")
    make(*training, "-o", str(trained))
    shutil.copy(trained / "last.safetensors", checkpoint)
    exporting = ("export", str(checkpoint), "--threads", "1")
    make(*exporting, "-o", str(bundle))
    (shared / "pictures").mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 50)).astype(np.uint8)
        Image.fromarray(pixels).save(shared / "pictures" / f"{n}.png")
    predicting = ("predict", str(bundle), str(shared / "pictures"), "--prompt", "left lung", "--threads", "1")
    make(*predicting, "-o", str(shared / "low"), "--threshold", "0.2")
    make(*predicting, "-o", str(shared / "high"), "--threshold", "0.8")
    evaluating = ("evaluate", str(bundle), str(films), "--threads", "1", "--worst", "1")
    make(*evaluating, "-o", str(shared / "report"))
    drawn, low, high = digests(films), digests(shared / "low"), digests(shared / "high")
    last = digests(trained)["last.safetensors"]

    def is_drawn(out: Path) -> None:
        need(not out.exists() or digests(out) == drawn, "the data set is not whole")

    def is_answer(out: Path) -> None:
        from cclip_deploy.common.files import writing_into

        def settle() -> int:
            with writing_into(out):
                return 0

        need(forked(settle, log) == 0, "the output cannot be held")
        found = {name: value for name, value in digests(out).items() if name.endswith(".png")}
        if (out / "predictions.json").exists():
            json.loads((out / "predictions.json").read_text())
        for stem in {name.rsplit("-", 1)[0] for name in found}:
            mine = {name: value for name, value in found.items() if name.startswith(stem)}
            wholes = ({name: value for name, value in of.items() if name.startswith(stem)} for of in (low, high))
            need(mine in wholes, f"the files of {stem} are of two runs")

    def is_report(out: Path) -> None:
        names = sorted(digests(out))
        need(names == ["evaluation.json", "index.html", "rows.csv"], f"the report is {names}")
        json.loads((out / "evaluation.json").read_text())
        need((out / "index.html").read_text().rstrip().endswith("</html>"), "the page is cut")

    def is_bundle(out: Path) -> None:
        from cclip_deploy.bundle.bundle import Bundle

        need(Bundle.open(out).check_all() == (), "the bundle has strays")

    def is_training(out: Path) -> None:
        import torch
        from safetensors.numpy import load_file

        for path in out.rglob("*.safetensors"):
            load_file(path)
        for path in out.rglob("state.pt"):
            torch.load(path, weights_only=True)
        for path in out.rglob("run.json"):
            json.loads(path.read_text())
        if (out / "run.json").exists() and "result" in json.loads((out / "run.json").read_text()):
            need(digests(out)["last.safetensors"] == last, "the weights are not those of an undisturbed training")

    def count(kills: int) -> int:
        return max(1, round(share * kills))

    drawing = ("synth", "OUT", "--images", "8", "--size", "32", "--seed", "3")
    building = ("build-engine", "OUT", "--fp32", "--graph", "prompt_encoder", "--threads", "1")
    listed = [
        Program("synth", drawing, count(84), is_drawn, codes=(0, 2)),
        Program("predict", (*predicting, "-o", "OUT", "--threshold", "0.8"), count(56), is_answer, shared / "low"),
        Program("evaluate", (*evaluating, "-o", "OUT", "--force"), count(32), is_report, shared / "report"),
        Program("export", (*exporting, "-o", "OUT", "--force"), count(6), is_bundle, bundle),
        Program("train", (*training, "-o", "OUT"), count(28), is_training),
    ]  # fmt: skip
    try:
        import tensorrt_rtx  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        print("build-engine is left out: tensorrt_rtx is not installed")
        return listed
    return [*listed, Program("build-engine", building, count(20), is_bundle, bundle)]


def moments(events: list[str], kills: int, chance: random.Random) -> list[int]:
    """Every rename, as often as there are kills for it, and others drawn."""
    renames = [number for number, event in enumerate(events, 1) if event == "os.rename"][: kills // 2]
    return renames + [chance.randint(1, len(events)) for _ in range(kills - len(renames))]


def warm_up() -> None:
    """Import what the commands import, and compute nothing: threads do not live through a fork."""
    import lightning.fabric  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import monai  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import open_clip  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import cclip_deploy.cli.commands  # noqa: F401


def main() -> None:
    """Run everything, print a line a command, and end with 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of kills")
    parser.add_argument("--only", help="one command")
    chosen = parser.parse_args()
    chance, started, failed, total = random.Random(chosen.seed), time.monotonic(), 0, 0
    warm_up()
    with tempfile.TemporaryDirectory(prefix="cclip-kill-") as name:
        shared = Path(name) / "shared"
        shared.mkdir()
        planned = programs(shared, chosen.share)
        print(f"Warm after {time.monotonic() - started:.0f} s", flush=True)
        for program in planned:
            if chosen.only not in (None, program.name):
                continue
            ends: Counter[str] = Counter()
            began = time.monotonic()
            events = events_of(program, Path(name) / "counted", Path(name) / "counted.log")
            for turn, moment in enumerate(moments(events, program.kills, chance)):
                number = SIGNALS[turn % len(SIGNALS)]
                try:
                    ends[kill(program, Path(name) / "killed", moment, number)] += 1
                except Exception as error:
                    failed += 1
                    event = events[min(moment, len(events)) - 1]
                    print(f"FAILED {program.name}, {number.name} at {moment} ({event}): {error}", flush=True)
            total += program.kills
            summary = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
            summary += f"; {time.monotonic() - began:.0f} s"
            print(f"{program.name}: {program.kills} kills at {len(events)} operations: {summary}", flush=True)
    print(f"{total} kills, {failed} failed, seed {chosen.seed}, {time.monotonic() - started:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
