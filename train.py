"""Train LHSC.

    python train.py --data_name f30k_precomp
    python train.py --data_name coco_precomp --lr_update 20

writes to ./runs/LHSC/checkpoint: model_best.pth.tar (best rsum on dev), the newest
checkpoint_STEP.pth.tar (all that is needed to continue) and metrics.jsonl (one JSON object per
line, the run's arguments first). TensorBoard scalars go to ./runs/LHSC/log. An earlier run in these
folders is moved aside.

    python train.py --resume                            # continue ./runs/LHSC
    python train.py --resume runs/mine/checkpoint       # or another run, or one checkpoint_STEP

    # on small data sets: first SCAN, then LHSC's layers and similarity on SCAN's encoders
    python train.py --recipe modern --similarity scan --graph_layers 0 --text_layers 0 \\
        --model_name runs/SCAN/checkpoint --logger_name runs/SCAN/log
    python train.py --recipe modern --encoders runs/SCAN/checkpoint/model_best.pth.tar

    torchrun --nproc_per_node 4 train.py …              # on several GPUs: distributed.py
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import distributed
from baselines import SIMILARITIES, build_model
from checkpoint import MAX_LAYERS, MODEL_OPTIONS, load_checkpoint, model_from
from data import Batch, PrecompDataset, find_files, size_augmentation, train_loader
from distributed import all_gather_with_grad, is_main_process, print_on_main
from evaluation import PRECISIONS, evaluate
from model import LHSC, contrastive_loss, triplet_loss
from run import (
    RunState,
    StopSignal,
    batches,
    earlier_runs,
    open_run,
    restore,
    resume_options,
    save_best,
    save_latest,
    seed_rank,
)
from utils import (
    InputError,
    at_least,
    choose_matmul,
    number,
    one_line,
    reuse_freed_memory,
    select_device,
)
from vocab import Vocabulary, build_from_data, read_word_vectors, vocab_file

# The options that --recipe sets; results/README.md shows what they gain.
RECIPES = {
    "official": {},
    "modern": {
        "loss": "contrastive", "size_augmentation": 0.2, "feature_dropout": 0.5, "ema": 0.999,
        "learning_rate": 1e-3, "lr_update": 0, "lr_warmup": 200,
    },
}  # fmt: skip

# The options that --encoders does not change: those of its checkpoint have to be the same.
ENCODER_OPTIONS = (
    "img_dim", "embed_size", "word_dim", "num_layers", "bi_gru", "no_imgnorm", "no_txtnorm",
    "padding",
)  # fmt: skip


def options() -> argparse.ArgumentParser:
    """The official flags keep their names; the defaults are those of the paper's F30K run."""
    switch, form = argparse.BooleanOptionalAction, argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description="Train LHSC.", allow_abbrev=False, formatter_class=form
    )
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="f30k_precomp", help="the data set's folder in data_path")
    add("--vocab_path", default="./vocab", help="folder of the vocabularies")
    add("--workers", default=min(4, os.cpu_count() or 1), type=at_least(0), help="loader processes")
    add("--val_captions", default=0, type=at_least(0), help="of dev; 0 = all (official: 5000)")

    add = parser.add_argument_group("model").add_argument
    add("--img_dim", default=None, type=at_least(1), help="region feature size; None = the file's")
    add("--num_regions", default=None, type=at_least(1), help="per image; None = the file's")
    add("--word_dim", default=300, type=at_least(1), help="word embedding size")
    add("--word_vectors", default="", metavar="FILE",
        help="initial word embeddings: a text file in GloVe's format")
    add("--embed_size", default=1024, type=at_least(1), help="joint size D")
    add("--sim_dim", default=256, type=at_least(1), help="similarity size S")
    add("--num_layers", default=1, type=at_least(1, MAX_LAYERS), help="GRU layers")
    add("--graph_layers", default=4, type=at_least(0, MAX_LAYERS), help="region graph layers")
    add("--text_layers", default=4, type=at_least(0, MAX_LAYERS), help="word self-attention layers")
    add("--similarity", default="lhsc", choices=[*SIMILARITIES], help="baselines.py has the others")
    add("--bi_gru", default=True, action=switch, help="bidirectional GRU")
    add("--no_imgnorm", default=False, action=switch, help="regions are not l2-normalised")
    add("--no_txtnorm", default=False, action=switch, help="words are not l2-normalised")
    add("--drop_out", default=0.0, type=number(0, 1), help="dropout in word self-attention")
    add("--embed_dropout", default=0.4, type=number(0, 1), help="dropout of word embeddings")
    add("--pool_dropout", default=0.4, type=number(0, 1), help="dropout in global pooling")
    add("--padding", default="masked", choices=["masked", "official"],
        help="official: <pad> words take part in self-attention, as in the authors' code")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=128, type=at_least(2), help="captions (and images) per step")
    add("--num_epochs", default=50, type=at_least(1), help="passes over the captions")
    add("--patience", default=0, type=at_least(0), help="epochs without a dev gain before stopping")
    add("--learning_rate", default=2e-4, type=number(1e-12, 1e3), help="of Adam")
    add("--lr_update", default=30, type=at_least(0), help="epochs between lr decays ×0.1; 0 = off")
    add("--lr_warmup", default=0, type=at_least(0), help="steps of linear lr warm-up from 0")
    add("--ema", default=0.0, type=number(0, 1), help="decay of the averaged weights, e.g. 0.999")
    add("--precision", default="fp32", choices=[*PRECISIONS], help="of the large matrix products")
    add("--grad_clip", default=2.0, type=number(0), help="gradient norm; 0 = no clipping")
    add("--loss", default="triplet", choices=["triplet", "contrastive"], help="model.py has both")
    add("--encoders", default="", metavar="CKPT",
        help="keep this model_best.pth.tar's encoders; train graph, word layers and similarity")
    add("--size_augmentation", default=0.0, type=number(0, 1),
        help="fraction of regions and words that each step drops at random")
    add("--feature_dropout", default=0.0, type=number(0, 1), help="dropout of region features")
    add("--margin", default=0.2, type=number(0), help="of the triplet loss")
    add("--max_violation", default=True, action=switch, help="only the hardest negative counts")
    add("--warmup_epochs", default=0, type=at_least(0),
        help="first epochs, in which all negatives count, to prevent collapse (official: 0)")
    add("--recipe", default="official", choices=[*RECIPES],
        help="modern: other defaults for the options above; options that are given win")

    add = parser.add_argument_group("run").add_argument
    add("--model_name", default="./runs/LHSC/checkpoint", help="folder for checkpoints, metrics")
    add("--logger_name", default="./runs/LHSC/log", help="folder for TensorBoard")
    add("--log_step", default=10, type=at_least(1), help="steps between log lines")
    add("--val_step", default=1000, type=at_least(1), help="steps between validations")
    add("--save_step", default=500, type=at_least(1), help="steps between checkpoints")
    add("--keep", default=2, type=at_least(1), help="number of checkpoints kept")
    add("--resume", default=None, nargs="?", const="", metavar="PATH",
        help="continue the run in --model_name, or the one at PATH (folder or checkpoint)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--matmul", default="auto", choices=["auto", "default", "onednn"],
        help="library for float32 matmul on the CPU; auto: oneDNN where it is exact and faster")
    add("--seed", default=0, type=at_least(0, 2**32), help="of weights, dropout and batches")
    add("--deterministic", default=False, action=switch,
        help="bitwise reproducible on CUDA too, but slower; on a CPU it always is")
    return parser  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; --recipe changes the defaults of some."""
    parser = options()
    parser.set_defaults(**RECIPES[parser.parse_args(arguments).recipe])
    return parser.parse_args(arguments)


def given_options(arguments: list[str] | None = None) -> dict:
    """The options that are given on the command line."""
    absent = argparse.Namespace(**dict.fromkeys(vars(options().parse_args([]))))  # all None
    given = vars(options().parse_args(arguments, absent))
    return {name: value for name, value in given.items() if value is not None}


# -- the training ---------------------------------------------------------------------------------


def train_step(
    model: LHSC,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    margin: float = 0.2,
    max_violation: bool = True,
    grad_clip: float = 2.0,
    dtype: torch.dtype | None = None,
    contrastive: bool = False,
) -> float:
    """One optimizer step; returns the loss, summed over the batch.

    dtype: used for the large matrix products; None keeps the weights' dtype.
    contrastive: contrastive_loss instead of triplet_loss.

    Raises InputError if the loss or the gradient is not finite, before the weights change.
    """
    sims = model(batch.images, batch.captions, batch.lengths, dtype)
    sims = all_gather_with_grad(sims, replicated=True)
    if contrastive:
        loss = contrastive_loss(sims, all_gather_with_grad(batch.image_index, replicated=True))
    else:
        loss = triplet_loss(sims, margin, max_violation)
    optimizer.zero_grad()
    loss.backward()
    distributed.sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    if not torch.isfinite(loss + norm):
        raise InputError(
            f"loss {loss.item()}, gradient norm {norm.item()}: this step was not taken. Continue "
            "from the last checkpoint with --resume, or start again with a smaller --learning_rate"
        )
    optimizer.step()
    return loss.item()


def set_learning_rate(
    optimizer: torch.optim.Optimizer, opt: argparse.Namespace, epoch: int, step: int
) -> float:
    """×0.1 every lr_update epochs; over the first lr_warmup steps it rises linearly."""
    lr = opt.learning_rate * 0.1 ** (epoch // opt.lr_update if opt.lr_update else 0)
    lr *= min(1, (step + 1) / (opt.lr_warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def augment(batch: Batch, size: float, dropout: float) -> Batch:
    """size_augmentation, then dropout of the region features."""
    if size:
        batch = size_augmentation(batch, size)
    return batch._replace(images=F.dropout(batch.images, dropout)) if dropout else batch


@torch.no_grad()
def update_ema(ema_model: LHSC, model: LHSC, decay: float, step: int) -> None:
    """ema_model ← decay · ema_model + (1 − decay) · model, buffers too.

    step: optimizer steps, from 1. The decay is at most (1 + step) / (10 + step), so that the random
    initial weights are soon forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    states = ema_model.state_dict().values(), model.state_dict().values()
    for old, new in zip(*states, strict=True):
        if old.is_floating_point():
            old.lerp_(new, weight)
        else:
            old.copy_(new)


def train(opt: argparse.Namespace, device: torch.device, saved: dict | None = None) -> float:
    """A whole run, or the rest of one from `saved`; returns the best rsum on dev.

    Raises:
        InputError: for anything wrong with the files or the options, before anything is written.
        SystemExit: 130 after SIGINT, 143 after SIGTERM, after the step is done and saved.
    """
    trainset, devset, vocab = load_data(opt)
    model, ema_model, optimizer = build(opt, device, None if saved else vocab)
    loader = train_loader(trainset, opt.batch_size, opt.workers, opt.seed, device.type == "cuda")
    if not len(loader):
        raise InputError(f"{opt.data_path}/{opt.data_name}: {len(trainset)} captions make no batch")
    state = restore(saved, model, ema_model, optimizer, vocab, opt) if saved else RunState()
    folder, dtype = Path(opt.model_name), None if opt.precision == "fp32" else torch.bfloat16
    contrastive = opt.loss == "contrastive"
    if state.epoch >= opt.num_epochs:
        print_on_main(f"{folder}: all {state.epoch} epochs are done, nothing is left to do")

    with open_run(opt, state, resumed=saved is not None) as log, StopSignal() as stop:
        log.header(opt, model, device)
        for epoch in range(state.epoch, opt.num_epochs):
            if opt.patience and epoch - state.best_epoch > opt.patience:
                print_on_main(f"no better dev rsum in {opt.patience} epochs: stopped")
                break
            loader.batch_sampler.set_epoch(epoch, state.batch)
            hardest = opt.max_violation and epoch >= opt.warmup_epochs and not contrastive
            for batch in batches(loader, log):
                model.train()
                batch = augment(batch.to(device), opt.size_augmentation, opt.feature_dropout)
                lr = set_learning_rate(optimizer, opt, epoch, state.step)
                loss = train_step(
                    model, optimizer, batch, opt.margin, hardest, opt.grad_clip, dtype, contrastive
                )
                state.step += 1
                state.batch += 1
                state.loss_sum += loss
                if ema_model is not None:
                    update_ema(ema_model, model, opt.ema, state.step)

                is_last = state.batch == len(loader)
                if state.step % opt.log_step == 0 or is_last:
                    log.train(state, lr, len(loader), 2 * opt.margin * opt.batch_size * hardest)
                if state.step % opt.val_step == 0 or is_last:
                    best_model = ema_model or model
                    metrics, _ = evaluate([best_model.eval()], devset, device)
                    is_best = metrics["rsum"] > state.best_rsum
                    log.dev(state, metrics, is_best)
                    if is_best:
                        state.best_rsum, state.best_epoch = metrics["rsum"], epoch
                        save_best(folder, opt, vocab, state, best_model)
                if is_last:
                    state.epoch, state.batch = epoch + 1, 0
                stopping = stop.agreed(device)
                if stopping or is_last or state.step % opt.save_step == 0:
                    save_latest(folder, opt, vocab, state, model, ema_model, optimizer)
                if stopping:
                    print_on_main(f"stopped at step {state.step}; to continue: --resume {folder}")
                    sys.exit(128 + stopping)
    print_on_main(f"best dev rsum {state.best_rsum:.1f}: {folder / 'model_best.pth.tar'}")
    return state.best_rsum


# -- what a run starts from -----------------------------------------------------------------------


def load_data(opt: argparse.Namespace) -> tuple[PrecompDataset, PrecompDataset, Vocabulary]:
    """Train and dev split, and the vocabulary, which is built and saved if there is none.

    Sets in `opt` the sizes that the files have: img_dim, num_regions, vocab_size.
    """
    for split in ("train", "dev"):
        find_files(opt.data_path, opt.data_name, split)
    path = vocab_file(opt.vocab_path, opt.data_name)
    if path.is_file():
        vocab = Vocabulary.load(path)
    else:
        vocab = build_from_data(opt.data_path, opt.data_name)
    where = opt.data_path, opt.data_name
    trainset = PrecompDataset(*where, "train", vocab, opt.img_dim, opt.num_regions)
    opt.img_dim, opt.num_regions = trainset.regions.img_dim, trainset.regions.num_regions
    opt.vocab_size = len(vocab)
    devset = PrecompDataset(*where, "dev", vocab, opt.img_dim, opt.num_regions, opt.val_captions)
    if not path.is_file() and is_main_process():
        vocab.save(path)
        print(
            f"{path}: not found, built from the train and dev captions ({len(vocab)} words) and "
            "saved; an official checkpoint needs the official file instead"
        )
    print_on_main(
        f"{opt.data_name}: train {trainset.n_images:,} images, {len(trainset):,} captions; "
        f"dev {devset.n_images:,}, {len(devset):,}; {opt.num_regions} regions × {opt.img_dim}; "
        f"{len(vocab):,} words; {distributed.world_size()} process(es)"
    )
    return trainset, devset, vocab


def build(
    opt: argparse.Namespace, device: torch.device, vocab: Vocabulary | None = None
) -> tuple[LHSC, LHSC | None, torch.optim.Optimizer]:
    """The model, initialised with --seed, its averaged copy (with --ema), and the optimizer.

    vocab: for --word_vectors and --encoders; None if weights will be restored.
    """
    if opt.batch_size < distributed.world_size():
        raise InputError(f"--batch_size {opt.batch_size}: fewer examples than processes")
    if opt.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(opt.seed)
    try:
        model = build_model(**{name: getattr(opt, name) for name in MODEL_OPTIONS}).to(device)
    except (RuntimeError, ValueError) as error:  # overflow, too little memory, dropout above 1
        raise InputError(f"a model of these sizes cannot be made: {error}") from error
    if vocab is not None and opt.encoders:
        load_encoders(model, opt, vocab)
    elif vocab is not None and opt.word_vectors:
        numbers, vectors = read_word_vectors(opt.word_vectors, vocab, opt.word_dim)
        weight = model.text_encoder.embed.weight.detach()
        scale = float(weight.std() / vectors.std())  # larger ones saturate the word self-attention
        weight[numbers] = scale * torch.from_numpy(vectors).to(device)
        print_on_main(f"{opt.word_vectors}: vectors of {len(numbers)} of {len(vocab)} words")
    if opt.encoders:
        for part in (model.image_encoder.fc, model.text_encoder.embed, model.text_encoder.gru):
            part.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(f"--encoders {opt.encoders}: leaves nothing to train in this model")
    ema_model = copy.deepcopy(model).requires_grad_(False) if opt.ema else None
    optimizer = torch.optim.Adam(model.parameters(), lr=opt.learning_rate, fused=True)
    seed_rank(opt.seed, 0)
    return model, ema_model, optimizer


def load_encoders(model: LHSC, opt: argparse.Namespace, vocab: Vocabulary) -> None:
    """Give the model the encoders of the checkpoint --encoders; layers only if it has as many.

    Raises InputError if they have other options or another vocabulary than the model.
    """
    checkpoint = load_checkpoint(opt.encoders)
    trained, theirs = model_from(checkpoint, opt.encoders), checkpoint["opt"]
    fingerprint = vocab.fingerprint()
    if theirs["vocab_size"] != len(vocab) or checkpoint.get("vocab", fingerprint) != fingerprint:
        file = vocab_file(opt.vocab_path, opt.data_name)
        raise InputError(f"--encoders {opt.encoders}: trained with another vocabulary than {file}")
    for name in (*ENCODER_OPTIONS, "graph_layers", "text_layers"):
        found, ours = theirs[name], getattr(opt, name)
        if found != ours and (found or name in ENCODER_OPTIONS):  # 0 layers fit any number
            raise InputError(f"--encoders {opt.encoders}: {name} is {found} there, {ours} here")
    model.image_encoder.load_state_dict(trained.image_encoder.state_dict(), strict=False)
    model.text_encoder.load_state_dict(trained.text_encoder.state_dict(), strict=False)
    print_on_main(f"{opt.encoders}: its encoders are kept")


@one_line
def main() -> None:
    opt, saved = parse(), None
    with distributed.process_group(select_device(opt.device)) as device:
        if opt.resume is not None:
            opt, saved = resume_options(opt, given_options())
        earlier_runs(opt)  # refuses folders that hold something else
        reuse_freed_memory()
        opt.matmul = choose_matmul(device, opt.matmul)  # a resumed run keeps its library
        if device.type == "cpu":
            print_on_main(f"float32 products: {opt.matmul}")
        train(opt, device, saved)


if __name__ == "__main__":
    main()
