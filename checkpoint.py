"""Checkpoints: ours, and those of the released code, read without trusting them.

A checkpoint of ours is a plain dict of tensors, numbers and strings:
    epoch, Eiters (optimizer steps), best_rsum, opt (train.py's options, with vocab_size, img_dim
    and num_regions filled in), vocab (fingerprint), model (state dict)
and, to go on from there (train.py --resume): optimizer, average (the averaged weights, with --ema),
random, batch (how many of the epoch are done), validated (the step of the last validation),
loss_sum and logged (of the log line that is being averaged).

The released code (Python 2) stores `model` as three state dicts [image, text, similarity] and
`opt` as an argparse.Namespace; RELEASED_NAMES turns them into ours.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import InputError
from model import LHSC

# The options that shape the model: LHSC's keyword arguments, under the names train.py gives them.
MODEL_OPTIONS = (
    "vocab_size", "img_dim", "num_regions", "embed_size", "word_dim", "sim_dim", "num_layers",
    "bi_gru", "graph_layers", "text_layers", "drop_out", "embed_dropout", "pool_dropout",
    "no_imgnorm", "no_txtnorm", "padding", "similarity", "global_image", "alignment",
)  # fmt: skip
# Those that older checkpoints, and released ones, do not have.
SINCE_THEN = {"similarity": "lhsc", "global_image": "regions", "alignment": "both"}

# Released name -> ours. {n} is a layer number, counted from 1 there and from 0 here. The four
# heads of θ and φ are joined into one linear layer; 1×1 convolutions lose their last axis.
RELEASED_NAMES = {
    "img_enc": {
        "fc": "image_encoder.fc",
        "IM_GCN_{n}.theta": "image_encoder.graph.layers.{n}.theta",
        "IM_GCN_{n}.phi": "image_encoder.graph.layers.{n}.phi",
        "IM_GCN_{n}.fc1": "image_encoder.graph.layers.{n}.fc1",
        "IM_GCN_{n}.fc2": "image_encoder.graph.layers.{n}.fc2",
        "IM_GCN_{n}.g": "image_encoder.graph.layers.{n}.g",
        "IM_GCN_{n}.W.0": "image_encoder.graph.layers.{n}.w",
        "IM_GCN_{n}.W.1": "image_encoder.graph.layers.{n}.bn",
    },
    "txt_enc": {
        "embed": "text_encoder.embed",
        "W_att{n}.embedding_local.0": "text_encoder.self_attention.{n}.local",
        "W_att{n}.embedding_global.0": "text_encoder.self_attention.{n}.globl",
        "W_att{n}.embedding_v.0": "text_encoder.self_attention.{n}.value",
        "cap_rnn": "text_encoder.gru",
    },
    "sim_enc": {
        "v_global_w.embedding_local.0": "similarity.region_pooling.local",
        "v_global_w.embedding_local.1": "similarity.region_pooling.local_bn",
        "v_global_w.embedding_global.0": "similarity.region_pooling.globl",
        "v_global_w.embedding_global.1": "similarity.region_pooling.globl_bn",
        "v_global_w.embedding_common.0": "similarity.region_pooling.common",
        "t_global_w.embedding_local.0": "similarity.word_pooling.local",
        "t_global_w.embedding_global.0": "similarity.word_pooling.globl",
        "t_global_w.embedding_common.0": "similarity.word_pooling.common",
        "sim_tranloc_w": "similarity.local_fc",
        "sim_tranglo_w": "similarity.globl_fc",
        "sim_eval_w": "similarity.score_fc",
        "cal_sim_base_atten.attn_sim_w": "similarity.gate_fc",
        "cal_sim_base_atten.bn": "similarity.gate_bn",
    },
}
_HEADS = ("", "1", "2", "3")


def rename_released(image: dict, text: dict, similarity: dict) -> dict[str, Tensor]:
    """The three released state dicts -> one state dict of LHSC.

    Raises:
        InputError: if a released name is not in the table or a head of θ or φ is missing.
    """
    state: dict[str, Tensor] = {}
    states = {"img_enc": dict(image), "txt_enc": dict(text), "sim_enc": dict(similarity)}
    for part, released in states.items():
        for name in [n for n in released if re.search(r"\.(theta|phi)\.", n)]:
            head = re.compile(r"\.(theta|phi)\.")
            heads = [head.sub(rf".\g<1>{k}.", name) for k in _HEADS]
            missing = [h for h in heads if h not in released]
            if missing:
                raise InputError(f"as a released checkpoint {part} lacks {missing[0]}")
            released[name] = torch.cat([released.pop(h) for h in heads])
        for name, tensor in released.items():
            ours = _our_name(part, name)
            is_conv = tensor.dim() == 3 and tensor.shape[-1] == 1
            state[ours] = tensor.squeeze(-1) if is_conv else tensor
    return state


def _our_name(part: str, name: str) -> str:
    module, _, parameter = name.rpartition(".")
    number = re.search(r"(?<=IM_GCN_)\d+|(?<=W_att)\d+", module)
    if number:
        module = module[: number.start()] + "{n}" + module[number.end() :]
    if module not in RELEASED_NAMES[part]:
        raise InputError(f"as a released checkpoint {part} has {name}, unknown to LHSC")
    ours = RELEASED_NAMES[part][module]
    return f"{ours.format(n=int(number[0]) - 1 if number else None)}.{parameter}"


def _translate_released(raw: dict, path: Path) -> dict:
    """A released checkpoint -> the dict a checkpoint of ours holds."""
    if len(raw["model"]) != 3 or not all(isinstance(s, dict) for s in raw["model"]):
        raise InputError(f"{path}: 'model' should be three state dicts [image, text, similarity]")
    try:
        state = rename_released(*raw["model"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    opt = vars(raw["opt"]) if isinstance(raw["opt"], argparse.Namespace) else dict(raw["opt"])
    opt = {_text(k): _text(v) for k, v in opt.items()}

    def count(pattern: str) -> int:
        return len({m[0] for m in (re.match(pattern, name) for name in state) if m})

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise InputError(f"{path}: a released checkpoint without {name} cannot be LHSC's")
        return state[name].shape

    opt |= {  # sizes are read from the weights, which cannot lie
        "vocab_size": shape("text_encoder.embed.weight")[0],
        "img_dim": shape("image_encoder.fc.weight")[1],
        "num_regions": shape("similarity.region_pooling.local_bn.weight")[0],
        "graph_layers": count(r"image_encoder\.graph\.layers\.\d+"),
        "text_layers": count(r"text_encoder\.self_attention\.\d+"),
        "embed_dropout": 0.4,
        "pool_dropout": 0.4,
        "padding": "released",
    }
    return raw | {"model": state, "opt": SINCE_THEN | opt, "released": True}


def _text(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint, ours or a released one, onto the CPU; never runs code from the file.

    Returns our dict; `released` tells which it was.

    Raises:
        InputError: if there is no such file, or it is no LHSC checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no checkpoint here; train one with train.py or name one with --model_path"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # whatever torch's reader says of bytes that are no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable checkpoint ({os.path.getsize(path)} bytes): {reason[:200]}"
        ) from error
    if not isinstance(raw, dict) or not {"model", "opt"} <= raw.keys():
        found = sorted(map(str, raw))[:6] if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"{path}: not an LHSC checkpoint: expected 'model' and 'opt', got {found}")
    if not isinstance(raw["opt"], dict | argparse.Namespace):
        raise InputError(f"{path}: 'opt' should hold options, it is a {type(raw['opt']).__name__}")
    if isinstance(raw["model"], list | tuple):
        return _translate_released(raw, path)
    opt = raw["opt"] if isinstance(raw["opt"], dict) else vars(raw["opt"])
    return raw | {"opt": SINCE_THEN | opt, "released": False}


def model_from(checkpoint: dict, path: str | Path = "checkpoint") -> LHSC:
    """The model a checkpoint holds, in eval mode.

    Raises:
        InputError: if its options and its weights do not fit each other.
    """
    opt = checkpoint["opt"]
    missing = [name for name in MODEL_OPTIONS if name not in opt]
    if missing:
        raise InputError(f"{path}: its options lack {', '.join(missing)}")
    try:
        model = LHSC(**{name: opt[name] for name in MODEL_OPTIONS})
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"{path}: weights do not fit its options: {lines[min(1, len(lines) - 1)][:200]}"
        ) from error
    return model.eval()


def save_checkpoint(state: dict, path: str | Path) -> None:
    """Write `state` so that `path` holds either the old file or the whole new one.

    Raises:
        OSError: if the disk is full or the folder read-only; what was there is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # RuntimeError: torch's writer on a full disk
            raise OSError(
                f"{path}: could not be written ({str(error).splitlines()[0]}); earlier checkpoints "
                "are as they were"
            ) from error
        raise


# -- the checkpoints of a run ---------------------------------------------------------------------


def step_file(folder: Path, step: int) -> Path:
    """Where a run keeps its state after `step` optimizer steps."""
    return folder / f"checkpoint_{step}.pth.tar"


def step_files(folder: Path) -> list[Path]:
    """The states kept in a run's folder, newest first."""
    found = {int(m[1]): f for f in folder.glob("checkpoint_*.pth.tar")
             if (m := re.fullmatch(r"checkpoint_(\d+)\.pth\.tar", f.name))}  # fmt: skip
    return [found[step] for step in sorted(found, reverse=True)]


def keep_newest(folder: Path, n: int) -> None:
    """Remove all but the n newest states of a run."""
    for file in step_files(folder)[n:]:
        file.unlink()


def load_whole(path: Path) -> dict:
    """As load_checkpoint, after every byte has been compared with the file's checksums.

    Raises:
        InputError: if the file is no LHSC checkpoint, or is damaged.
    """
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise InputError(f"{path}: damaged or not a checkpoint ({error})") from error
        if damaged:
            raise InputError(f"{path}: damaged, its part {damaged} does not fit its checksum")
    return load_checkpoint(path)


def load_newest(folder: Path) -> tuple[Path, dict]:
    """The newest state of a run that is whole; damaged ones are set aside, with a line each.

    Raises:
        InputError: if there is none.
    """
    damaged = []
    for file in step_files(folder):
        try:
            saved = load_whole(file)
        except InputError as error:
            damaged.append(file)
            print(f"warning: {error}; going back to the one before", file=sys.stderr)
            continue
        for other in damaged:
            other.rename(other.with_name(other.name + ".damaged"))
        return file, saved
    raise InputError(f"{folder}: no whole checkpoint_N.pth.tar to resume from")


def random_states() -> dict:
    """Of Python, NumPy, torch and CUDA, as tensors and numbers."""
    _, python, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (list(python), gauss),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict) -> None:
    """What random_states returned; CUDA's only where there are as many devices."""
    python, gauss = states["python"]
    random.setstate((3, tuple(python), gauss))
    keys, *others = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
