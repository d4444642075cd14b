"""Records what other people's code answers to the inputs of tests/test_extract_*.py, into tests/data/.

That code cannot stand in this project's environment: open_clip, timm and dataset2metadata want torchvision.  So this is
run by hand, in an environment of its own, and only its numbers are committed:

    python -m venv /tmp/references
    /tmp/references/bin/pip install torch torchvision open_clip_torch timm transformers ftfy imagehash \\
        simplejpeg xxhash orjson onnxruntime opencv-python-headless nudenet rapidocr
    git clone https://github.com/mlfoundations/dataset2metadata /tmp/dataset2metadata
    git clone https://github.com/unitaryai/detoxify /tmp/detoxify
    PYTHONPATH=. /tmp/references/bin/python tests/backends/extractor_references.py /tmp/dataset2metadata /tmp/detoxify
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.backends import tiny_extractors as tiny

TARGET = Path(__file__).resolve().parents[1] / "data" / "extractor_references.json"
PICTURES = ((1, 300, 200), (2, 101, 333), (3, 640, 480), (4, 50, 700), (5, 224, 224))
TOXICITY_TEXTS = ("a photo of the cat", "", "you are 17 of \u00e9 things", "long " * 100)
ROUNDED = 9  # digits behind the point


def main() -> None:
    torch.set_num_threads(1)
    dataset2metadata, detoxify = sys.argv[1:]
    found = {
        "made_with": {
            name: importlib.metadata.version(name)
            for name in (
                "pillow",
                "torch",
                "torchvision",
                "open_clip_torch",
                "timm",
                "imagehash",
                "nudenet",
                "rapidocr",
            )
        },
        "crops": crops(),
        "tokens": tokens(),
        "clip": clip(),
        "openclip": openclip(),
        "isc": isc(),
        "sscd": sscd(),
        "scrfd": scrfd(Path(dataset2metadata)),
        "toxicity": toxicity(Path(detoxify)),
        "hashes": hashes(),
        "nudenet": nudenet(),
        "pp_ocr": pp_ocr(),
    }
    TARGET.write_text(json.dumps(found, separators=(",", ":")) + "\n", "utf-8")


def openai_transform() -> Any:
    """openai/CLIP's, clip.py, _transform."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    rgb = lambda image: image.convert("RGB")  # noqa: E731
    resize = Resize(224, interpolation=InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(224), rgb, ToTensor(), Normalize(mean, deviation)])


def digest(numbers: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()[:16]


def crops() -> list[str]:
    """A digest of the float32 numbers for each of tiny.exact_pictures()."""
    transform = openai_transform()
    return [digest(transform(image).numpy()) for _, _, _, image in tiny.exact_pictures()]


def _tokenizer(folder: Path) -> Any:
    import gzip

    from open_clip.tokenizer import SimpleTokenizer

    path = folder / "merges.gz"
    path.write_bytes(gzip.compress(("header\n" + "\n".join(map(" ".join, tiny.MERGES))).encode()))
    return SimpleTokenizer(str(path))


def tokens() -> list[list[int]]:
    """OpenAI's tokenizer, as open_clip has it, over the tests' vocabulary: 77 for each of tiny.CAPTIONS."""
    with tempfile.TemporaryDirectory() as folder:
        return _tokenizer(Path(folder))(list(tiny.CAPTIONS)).tolist()


def clip() -> dict[str, Any]:
    """open_clip's features of length one, for the weights of tiny.save_clip."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_clip(folder)
        from safetensors.torch import load_file

        own = load_file(folder / "model.safetensors")
        tokenizer = _tokenizer(folder)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=32, image_size=224, mlp_ratio=2.0)
    text = CLIPTextCfg(
        context_length=77, vocab_size=len(tiny.clip_vocabulary()), width=32, heads=2, layers=2, mlp_ratio=2.0
    )
    model = CLIP(64, vision, text, quick_gelu=True).eval()
    model.load_state_dict(_as_open_clip(own))
    transform = openai_transform()
    pictures = torch.stack([transform(Image.fromarray(tiny.picture(*p))) for p in PICTURES])
    captions = tokenizer(list(tiny.CAPTIONS[: len(PICTURES)]))
    with torch.inference_mode():
        image, words = model.encode_image(pictures, normalize=True), model.encode_text(captions, normalize=True)
    return {"image": _rounded(image), "text": _rounded(words), "score": _rounded((image * words).sum(1))}


MARKS = ("<|endoftext|> a <end_of_text>", "<start_of_text>x<|startoftext|> the cat")


def openclip() -> dict[str, Any]:
    """What open_clip makes of the folders of tiny.save_openclip: tokens, and features of length one."""
    import open_clip

    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        tokenizer = _tokenizer(Path(name))
        for kind in tiny.OPENCLIP:
            folder = tiny.save_openclip(Path(name) / kind, kind)
            model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
            pictures = torch.stack([transform(Image.fromarray(tiny.picture(*p))) for p in PICTURES])
            captions = tokenizer(list(tiny.CAPTIONS[: len(PICTURES)]), model.context_length)
            with torch.inference_mode():
                image = model.eval().encode_image(pictures, normalize=True)
                words = model.encode_text(captions, normalize=True)
            made[kind] = {"image": _rounded(image), "text": _rounded(words), "score": _rounded((image * words).sum(1))}
        made["marks"] = [row[: int(row.argmax()) + 1].tolist() for row in tokenizer(list(MARKS))]
    return made


def _as_open_clip(own: dict[str, Any]) -> dict[str, Any]:
    """The same tensors under open_clip's names."""
    made = {
        "positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        "text_projection": own["text_projection.weight"].T.contiguous(),
        "logit_scale": own["logit_scale"],
        "visual.class_embedding": own["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": own["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": own["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": own["visual_projection.weight"].T.contiguous(),
    }
    pairs = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for side, theirs in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(2):
            a, b = f"{theirs}.resblocks.{layer}", f"{side}.encoder.layers.{layer}"
            pairs |= {
                f"{a}.ln_1": f"{b}.layer_norm1",
                f"{a}.ln_2": f"{b}.layer_norm2",
                f"{a}.mlp.c_fc": f"{b}.mlp.fc1",
                f"{a}.mlp.c_proj": f"{b}.mlp.fc2",
                f"{a}.attn.out_proj": f"{b}.self_attn.out_proj",
            }
            for part in ("weight", "bias"):
                made[f"{a}.attn.in_proj_{part}"] = torch.cat([own[f"{b}.self_attn.{n}_proj.{part}"] for n in "qkv"])
    for theirs, ours in pairs.items():
        made |= {f"{theirs}.{part}": own[f"{ours}.{part}"] for part in ("weight", "bias")}
    return made


def isc() -> dict[str, Any]:
    """timm's EfficientNetV2-M with the head of isc_feature_extractor's ISCNet (p = 1), for tiny.filled weights."""
    import timm
    from torch.nn import functional

    backbone = timm.create_model("tf_efficientnetv2_m.in21k_ft_in1k", features_only=True)
    names = {f"backbone.{n}": tuple(t.shape) for n, t in backbone.state_dict().items()}
    weights = tiny.filled(tiny.isc_shapes(), 6)
    backbone.load_state_dict({n.removeprefix("backbone."): t for n, t in weights.items() if n in names})
    head, norm = torch.nn.Linear(512, 256, bias=False), torch.nn.BatchNorm1d(256)
    head.load_state_dict({"weight": weights["fc.weight"]})
    norm.load_state_dict({n.removeprefix("bn."): t for n, t in weights.items() if n.startswith("bn.")})
    backbone.eval()
    norm.eval()
    with torch.inference_mode():
        x = backbone(isc_input())[-1].clamp(min=1e-6)
        found = functional.normalize(norm(head(functional.avg_pool2d(x, x.shape[2:]).flatten(1))))
    listed = [f"{n} {s}" for n, s in sorted(names.items())]
    return {"names": hashlib.sha256("\n".join(listed).encode()).hexdigest(), "descriptors": _rounded(found[:, :32])}


def isc_input() -> Any:
    """Two pictures of 97 × 97, an odd size, from −1 to 1."""
    pictures = np.stack([tiny.picture(seed, 97, 97) for seed in (1, 2)]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pictures.astype(np.float32) / 127.5 - 1)


def sscd() -> dict[str, Any]:
    """Names and shapes of torchvision's ResNet50, and descriptors of a smaller one with SSCD's pooling and pictures."""
    from torchvision.models.resnet import Bottleneck, ResNet, resnet50
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    class Pooling(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.flatten(2).clamp(min=1e-6).pow(3.0).mean(dim=2).pow(1.0 / 3.0)[:, :, None, None]

    real = resnet50(num_classes=512).state_dict()
    listed = [f"backbone.{name} {tuple(tensor.shape)}" for name, tensor in sorted(real.items())]
    model = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=32).eval()
    model.avgpool = Pooling()
    tensors = tiny.filled(tiny.sscd_shapes(), 9)
    model.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in tensors.items()})
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transform = Compose([Resize([320, 320]), ToTensor(), normalize])
    pictures = torch.stack([transform(Image.fromarray(tiny.picture(*p))) for p in PICTURES])
    with torch.inference_mode():
        found = torch.nn.functional.normalize(model(pictures))
    names = hashlib.sha256("\n".join(listed).encode()).hexdigest()
    return {"names": names, "descriptors": _rounded(found)}


def scrfd(checkout: Path) -> list[list[list[float]]]:
    """dataset2metadata's own boxes, for the weights of tiny.scrfd_tensors."""
    import torchvision

    package = types.ModuleType("dataset2metadata")  # its __init__ wants all of its requirements
    package.__path__ = [str(checkout / "dataset2metadata")]
    sys.modules["dataset2metadata"] = package
    from dataset2metadata.augmentations import SquarePadResizeNorm
    from dataset2metadata.face_detection import head, scrfd_wrapper

    if not torch.cuda.is_available():  # it makes its anchors on a GPU unless told
        grid = head.AnchorGenerator.grid_anchors
        head.AnchorGenerator.grid_anchors = lambda self, sizes, device="cpu": grid(self, sizes, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        detector = scrfd_wrapper.FaceDetector(str(tiny.save_scrfd(Path(folder) / "scrfd.pt")), device=-1)
    torchvision.ops.nms = _nms
    shown = [SquarePadResizeNorm(img_size=224)(Image.fromarray(tiny.picture(*p))) for p in PICTURES]
    boxes = detector.detect_faces(torch.cat([s[0] for s in shown]), torch.cat([s[1] for s in shown]))
    return [np.round(b, ROUNDED).tolist() for b in boxes]


def _nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """torchvision.ops.nms in plain torch, for an environment whose torchvision was built for another torch."""
    order, kept = scores.argsort(descending=True, stable=True).tolist(), []
    while order:
        best = order.pop(0)
        kept.append(best)
        order = [i for i in order if _overlap(boxes[best].tolist(), boxes[i].tolist()) <= iou_threshold]
    return torch.tensor(kept, dtype=torch.long)


def _overlap(a: list[float], b: list[float]) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def toxicity(checkout: Path) -> list[float]:
    """detoxify's own predict, and dataset2metadata's largest of it, for the classifier of tiny.save_toxicity."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sys.path.insert(0, str(checkout))
    from detoxify.detoxify import Detoxify

    with tempfile.TemporaryDirectory() as name:
        tiny.save_toxicity(Path(name))
        detector = Detoxify.__new__(Detoxify)  # its constructor wants its own checkpoint from the internet
        detector.model = AutoModelForSequenceClassification.from_pretrained(name)
        detector.tokenizer = AutoTokenizer.from_pretrained(name)
        detector.class_names, detector.device = tiny.TOXICITY_LABELS[:7], "cpu"
    predicted = detector.predict(list(TOXICITY_TEXTS))
    return _rounded(torch.tensor(list(predicted.values())).T.max(1).values)


def pp_ocr() -> dict[str, Any]:
    """What rapidocr finds in tiny.text_picture(): boxes of all lines, and boxes and texts of those that it could read.
    And what Clipper, which grows its boxes, makes of a few quadrilaterals."""
    import pyclipper
    from rapidocr import RapidOCR

    shown = tiny.text_picture()
    height, width = shown.shape[:2]
    engine = RapidOCR()
    bgr = np.ascontiguousarray(shown[:, :, ::-1])
    lines = engine(bgr, use_cls=False, use_rec=False)
    read = engine(bgr, use_cls=True, use_rec=True)

    def boxes(quads: Any) -> list[list[float]]:
        shares = np.asarray(quads, np.float64) / [width, height]
        return _rounded(torch.from_numpy(np.concatenate([shares.min(1), shares.max(1)], 1)))

    grown = []
    for quad, distance in tiny.QUADS:
        offset = pyclipper.PyclipperOffset()
        offset.AddPath(quad, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
        grown.append(sorted(map(list, offset.Execute(distance)[0])))
    return {"boxes": boxes(lines.boxes), "read": boxes(read.boxes), "texts": list(read.txts), "grown": grown}


def hashes() -> list[list[str]]:
    import imagehash

    images = [Image.fromarray(tiny.picture(*p)) for p in PICTURES] + [Image.new("RGB", (9, 9), (1, 2, 3))]
    return [[str(imagehash.phash(image)), str(imagehash.dhash(image))] for image in images]


PHOTOS = tuple(f"0000000100{number}.jpg" for number in ("19", "22", "27", "28", "36", "38", "00", "03"))


def photos() -> list[Any]:
    """Some real ones of the second example shard."""
    shard = sorted((Path(__file__).resolve().parents[2] / "examples" / "shards").glob("*.tar"))[1]
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(name) for name in PHOTOS]
        return [np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")) for file in files if file]


def nudenet() -> list[list[Any]]:
    """What the package sees in real photos, best first."""
    from nudenet import NudeDetector

    detector = NudeDetector()
    seen = [detector.detect(np.ascontiguousarray(photo[:, :, ::-1])) for photo in photos()]
    return [sorted(([d["class"], round(d["score"], 4)] for d in found), key=lambda d: -d[1]) for found in seen]


def _rounded(tensor: Any) -> Any:
    return np.round(tensor.double().numpy(), ROUNDED).tolist()


if __name__ == "__main__":
    main()
