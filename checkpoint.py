"""Checkpoints: ours, and those of the official code, read without trusting them.

A checkpoint of ours is a plain dict of tensors, numbers and strings:
    epoch, Eiters (optimizer steps), best_rsum, opt (train.py's options, with vocab_size, img_dim
    and num_regions filled in), vocab (fingerprint), model (state dict)
and, to continue from there (train.py --resume): run (train.py's RunState), optimizer, ema_model
(the averaged weights, with --ema) and random (the random states of all processes).

The official code (Python 2) stores `model` as three state dicts [image, text, similarity] and
`opt` as an argparse.Namespace; OFFICIAL_NAMES turns them into ours.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from baselines import SIMILARITIES, build_model
from model import LHSC
from utils import InputError, atomic_write

# The options that shape the model: build_model's arguments, under the names train.py gives them.
MODEL_OPTIONS = {
    "vocab_size": int, "img_dim": int, "num_regions": int, "embed_size": int, "word_dim": int,
    "sim_dim": int, "num_layers": int, "bi_gru": bool, "graph_layers": int, "text_layers": int,
    "drop_out": float, "embed_dropout": float, "pool_dropout": float, "no_imgnorm": bool,
    "no_txtnorm": bool, "padding": str, "similarity": str,
}  # fmt: skip

MAX_LAYERS = 1000
DATA_OPTIONS = {"data_path": str, "data_name": str, "vocab_path": str, "val_captions": int}

# Official name -> ours. {n} is a layer number, counted from 1 there and from 0 here. The four
# heads of θ and φ are joined into one linear layer; 1×1 convolutions lose their last axis.
OFFICIAL_NAMES = {
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
        "W_att{n}.embedding_global.0": "text_encoder.self_attention.{n}.global_",
        "W_att{n}.embedding_v.0": "text_encoder.self_attention.{n}.value",
        "cap_rnn": "text_encoder.gru",
    },
    "sim_enc": {
        "v_global_w.embedding_local.0": "similarity.region_pooling.local",
        "v_global_w.embedding_local.1": "similarity.region_pooling.local_bn",
        "v_global_w.embedding_global.0": "similarity.region_pooling.global_",
        "v_global_w.embedding_global.1": "similarity.region_pooling.global_bn",
        "v_global_w.embedding_common.0": "similarity.region_pooling.common",
        "t_global_w.embedding_local.0": "similarity.word_pooling.local",
        "t_global_w.embedding_global.0": "similarity.word_pooling.global_",
        "t_global_w.embedding_common.0": "similarity.word_pooling.common",
        "sim_tranloc_w": "similarity.local_fc",
        "sim_tranglo_w": "similarity.global_fc",
        "sim_eval_w": "similarity.score_fc",
        "cal_sim_base_atten.attn_sim_w": "similarity.gate_fc",
        "cal_sim_base_atten.bn": "similarity.gate_bn",
    },
}
_HEADS = ("", "1", "2", "3")

# -- reading --------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint, ours or an official one, onto the CPU; never runs code from the file.

    Our files are verified against the checksums that they contain.

    Raises InputError if the file is missing, damaged, or not an LHSC checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint here; train.py writes one, or name another file")
    try:
        if zipfile.is_zipfile(path):  # Python 2's files are not archives and have no checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise InputError(f"its part {damaged} does not fit its checksum")
        with torch.serialization.safe_globals([argparse.Namespace]):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # readers raise errors of many types on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        size = path.stat().st_size
        raise InputError(f"{path}: damaged, or no checkpoint ({size} bytes): {reason}") from error
    if not isinstance(raw, dict) or not {"model", "opt"} <= raw.keys():
        found = sorted(map(str, raw))[:6] if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"{path}: not an LHSC checkpoint: expected 'model' and 'opt', got {found}")
    opt = vars(raw["opt"]) if isinstance(raw["opt"], argparse.Namespace) else raw["opt"]
    if not isinstance(opt, dict):
        raise InputError(f"{path}: 'opt' should hold options, it is a {type(opt).__name__}")
    try:
        if isinstance(raw["model"], list | tuple):
            return raw | _translate_official(raw["model"], opt)
        return raw | {"opt": opt, "official": False}
    except KeyError as error:
        raise InputError(f"{path}: not an LHSC checkpoint: it lacks {error}") from error
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not an LHSC checkpoint: {error}") from error


def _translate_official(states: list[dict], opt: dict) -> dict:
    """An official checkpoint -> the contents of one of ours."""
    if len(states) != 3:
        raise InputError("'model' should be three state dicts [image, text, similarity]")
    state = rename_official(*states)

    def text(value: object) -> object:  # Python 2's strings are bytes
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    def count(layers: str) -> int:
        return len({name.removeprefix(layers).split(".")[0] for name in state if layers in name})

    opt = {text(name): text(value) for name, value in opt.items()} | {
        # sizes are read from the weights, which are always right
        "vocab_size": state["text_encoder.embed.weight"].shape[0],
        "img_dim": state["image_encoder.fc.weight"].shape[1],
        "num_regions": state["similarity.region_pooling.local_bn.weight"].shape[0],
        "graph_layers": count("image_encoder.graph.layers."),
        "text_layers": count("text_encoder.self_attention."),
        "embed_dropout": 0.4,
        "pool_dropout": 0.4,
        "padding": "official",
        "similarity": "lhsc",
    }
    return {"model": state, "opt": opt, "official": True}


def rename_official(image: dict, text: dict, similarity: dict) -> dict[str, Tensor]:
    """The three official state dicts -> one state dict of LHSC.

    Raises InputError if an official name is not in the table, KeyError if one is missing.
    """
    state: dict[str, Tensor] = {}
    states = {"img_enc": dict(image), "txt_enc": dict(text), "sim_enc": dict(similarity)}
    for part, official in states.items():
        head = re.compile(r"\.(theta|phi)\.")
        for name in [n for n in official if head.search(n)]:
            heads = [head.sub(rf".\g<1>{k}.", name) for k in _HEADS]
            official[name] = torch.cat([official.pop(h) for h in heads])
        for name, tensor in official.items():
            is_conv = tensor.dim() == 3 and tensor.shape[-1] == 1
            state[_our_name(part, name)] = tensor.squeeze(-1) if is_conv else tensor
    return state


def _our_name(part: str, name: str) -> str:
    module, _, parameter = name.rpartition(".")
    number = re.search(r"(?<=IM_GCN_)\d+|(?<=W_att)\d+", module)
    if number:
        module = module[: number.start()] + "{n}" + module[number.end() :]
    if module not in OFFICIAL_NAMES[part]:
        raise InputError(f"as an official checkpoint {part} has {name}, unknown to LHSC")
    ours = OFFICIAL_NAMES[part][module]
    return f"{ours.format(n=int(number[0]) - 1 if number else None)}.{parameter}"


def check_options(opt: dict, path: str | Path) -> None:
    """Raise InputError if an option of a checkpoint is missing, or has a wrong type or value."""
    if missing := MODEL_OPTIONS.keys() - opt.keys():
        raise InputError(f"{path}: its options lack {min(missing)}")
    for name, kind in (MODEL_OPTIONS | DATA_OPTIONS).items():
        if name in opt and not is_of_type(opt[name], kind):
            raise InputError(f"{path}: its option {name} is {opt[name]!r}, no {kind.__name__}")
        least = 0 if name in ("graph_layers", "text_layers", "val_captions") else 1
        most = MAX_LAYERS if name.endswith("_layers") else 2**63
        if kind is int and not least <= opt.get(name, least) <= most:
            raise InputError(f"{path}: its option {name} is {opt[name]}, not {least} to {most}")
    if opt["similarity"] not in SIMILARITIES or opt["padding"] not in ("masked", "official"):
        raise InputError(f"{path}: unknown similarity {opt['similarity']} or {opt['padding']}")


def model_from(checkpoint: dict, path: str | Path = "checkpoint") -> LHSC:
    """The model a checkpoint holds, in eval mode.

    Raises InputError if its options and its weights do not match.
    """
    opt, weights = checkpoint["opt"], checkpoint["model"]
    check_options(opt, path)
    try:
        with torch.device("meta"):  # takes no memory, whatever the options say
            model = build_model(**{name: opt[name] for name in MODEL_OPTIONS})
        for name, expected in model.state_dict().items():
            tensor = weights.get(name, expected)  # load_state_dict says what is missing
            is_dense = tensor.layout == torch.strided and not tensor.is_complex()
            if tensor.is_floating_point() != expected.is_floating_point() or not is_dense:
                raise ValueError(f"{name} holds {tensor.dtype}, {tensor.layout}")
        weights = {k: x.float() if x.is_floating_point() else x for k, x in weights.items()}
        model.load_state_dict(weights, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: weights do not fit its options: {reason}") from error
    return model.eval()


def is_of_type(value: object, kind: type) -> bool:
    """Whether an option has its type; an int counts as a float, but a bool not as an int."""
    return type(value) is kind or (kind is float and type(value) is int)


# -- writing, and the checkpoints of a run --------------------------------------------------------


def save_checkpoint(state: dict, path: str | Path) -> None:
    """Write `state` so that `path` holds either the old file or the whole new one.

    Raises OSError if the disk is full or the folder read-only; the old file then stays as it was.
    """
    try:
        atomic_write(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer on a full disk
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path}: could not be written ({reason}); earlier checkpoints are as they were"
        ) from error


def step_file(folder: Path, step: int) -> Path:
    """Where a run keeps its state after `step` optimizer steps."""
    return folder / f"checkpoint_{step}.pth.tar"


def step_files(folder: Path) -> list[Path]:
    """The states kept in a run's folder, newest first."""
    found = {int(m[1]): f for f in folder.glob("checkpoint_*.pth.tar")
             if (m := re.fullmatch(r"checkpoint_(\d+)\.pth\.tar", f.name))}  # fmt: skip
    return [found[step] for step in sorted(found, reverse=True)]


def load_latest(folder: Path) -> tuple[Path, dict]:
    """The newest intact state of a run; damaged ones are renamed, with a warning for each.

    Raises InputError if there is none.
    """
    damaged = []
    for file in step_files(folder):
        try:
            saved = load_checkpoint(file)
        except InputError as error:
            damaged.append(file)
            print(f"warning: {error}; going back to the one before", file=sys.stderr)
            continue
        for other in damaged:
            other.rename(other.with_name(other.name + ".damaged"))
        return file, saved
    raise InputError(f"{folder}: no whole checkpoint_N.pth.tar to resume from")


def random_states() -> dict:
    """The random states of PyTorch, on CPU and CUDA; training uses no other random numbers."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict) -> None:
    """Restore what random_states returned; CUDA's only if the number of devices is the same."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
