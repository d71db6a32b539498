"""A static page that captions in the browser: the files of `web/`, an exported captioner, and onnxruntime-web."""

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from transformers.convert_slow_tokenizer import bytes_to_unicode

from system.errors import UserError

from .captioner import Captioner
from .processing import center_crop

PAGE = Path(__file__).parent.parent / "web"
PACKAGE = "onnxruntime-web@1.30.0"
# Of each device: the script, the loader of its WebAssembly, and that itself, in the package's folder dist.
RUNTIME = {
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
}
NUM_CHECKED = 200  # sequences of random tokens
SPACE_CARD = "---\ntitle: {title}\nemoji: 🖼\ncolorFrom: blue\ncolorTo: gray\nsdk: static\npinned: false\n---\n"


def write_page(
    captioner: Captioner, folder: Path, title: str, suffixes: Mapping[str, str], runtime: str | None
) -> None:
    """Write the page beside an export that has been written already.

    Args:
        title: Of the page.
        suffixes: Of the names of encoder and step of each data type.
        runtime: Folder of the npm package onnxruntime-web; None to install it with npm.

    Raises:
        UserError: The runtime is not there and cannot be installed, weights lie beside their files, or the tokens' texts do not
            add up to the tokenizer's.
    """
    if not (folder / "preprocess.onnx").exists():
        raise UserError("--web: the page needs preprocess.onnx, which this image processor does not have")
    if beside := next(folder.glob("*.data"), None):
        raise UserError(f"--web: the weights are too many for one file ({beside.name}): a browser cannot load them")
    try:
        pieces = token_pieces(captioner.tokenizer)
    except ValueError as error:
        raise UserError(f"--web: {error}") from error
    files = {
        dtype: {part: described(folder / f"{part}{suffix}.onnx") for part in ("encoder", "step")}
        for dtype, suffix in suffixes.items()
    }
    copy_runtime(folder / "runtime", runtime)
    of_device = {}
    for device, (script, loader, wasm) in RUNTIME.items():
        paths = {"script": f"runtime/{script}", "loader": f"runtime/{loader}"}
        of_device[device] = paths | {"wasm": described(folder / "runtime" / wasm) | {"name": f"runtime/{wasm}"}}
    inputs = onnx.load(folder / files[next(iter(files))]["step"]["name"]).graph.input
    model = {
        "title": title,
        "files": files,
        "preprocess": described(folder / "preprocess.onnx"),
        "runtime": of_device,
        "states": {value.name: dimensions(value) for value in inputs if value.name.startswith("state.")},
        "center_crop": center_crop(captioner.image_processor),
        "tokens": pieces,
    }
    (folder / "model.json").write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(SPACE_CARD.format(title=json.dumps(title)), encoding="utf-8")
    for path in PAGE.iterdir():
        if path.suffix in (".html", ".js", ".css"):
            shutil.copy(path, folder)


def described(path: Path) -> dict[str, str | int]:
    return {"name": path.name, "bytes": path.stat().st_size}


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def copy_runtime(target: Path, runtime: str | None) -> None:
    """Copy onnxruntime-web's files from the folder of its npm package, installed with npm where None is given."""
    names = [name for files in RUNTIME.values() for name in files]
    with tempfile.TemporaryDirectory() as beside:
        source = Path(runtime) if runtime else install_runtime(Path(beside))
        if missing := [name for name in names if not (source / "dist" / name).is_file()]:
            raise UserError(f"--onnxruntime_web {source} has no dist/{missing[0]}: give the folder of {PACKAGE}")
        target.mkdir()
        for name in names:
            shutil.copy(source / "dist" / name, target)


def install_runtime(folder: Path) -> Path:
    """Install onnxruntime-web with npm, and return its folder."""
    needed = f"--web needs {PACKAGE}: install Node, or give --onnxruntime_web the package's folder"
    if shutil.which("npm") is None:
        raise UserError(needed)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    done = subprocess.run(["npm", "install", *options, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{needed} (npm: {(done.stderr.strip() or 'no reason').splitlines()[-1]})")
    return folder / "node_modules" / "onnxruntime-web"


def token_pieces(tokenizer) -> list[str]:
    """What each token adds to a caption, its bytes as characters up to 255; special tokens add nothing.

    Raises:
        ValueError: Random sequences of tokens do not add up to the text that the tokenizer decodes.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = [number for number in range(len(tokenizer)) if number not in special]
    of_bytes = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    if of_bytes.get("type") == "ByteLevel":
        byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        pieces = [bytes(byte_of.get(letter, 63) for letter in name) for name in names]
    else:  # what a token adds behind another
        first = tokenizer.decode([ordinary[-1]])
        pieces = [tokenizer.decode([ordinary[-1], number])[len(first) :].encode() for number in range(len(tokenizer))]
    pieces = [b"" if number in special else piece for number, piece in enumerate(pieces)]
    chosen = random.Random(0)
    for _ in range(NUM_CHECKED):
        ids = [chosen.choice(ordinary) for _ in range(8)]
        decoded = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if b"".join(pieces[number] for number in ids).decode(errors="replace").strip() != decoded:
            raise ValueError(f"the tokenizer's texts depend on each other, as in {decoded!r}")
    return [piece.decode("latin-1") for piece in pieces]
