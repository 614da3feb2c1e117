"""A source of any kind to a bundle, perhaps with more ids, and from there to a format again."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vlm.bundle import check_finite, is_bundle, load_bundle, save_bundle
from vlm.checkpoints import chinese_clip, hugging_face, m2_encoder, open_clip
from vlm.checkpoints.accounting import to_ours
from vlm.checkpoints.config import ConversionConfig, Extension
from vlm.checkpoints.export import Format, export
from vlm.checkpoints.reading import in_float32, read_tensors
from vlm.checkpoints.recipe import Recipe
from vlm.errors import CheckpointError
from vlm.models.build import build_encoder
from vlm.models.dual_encoder import DualEncoder
from vlm.text.tokenizer import load_tokenizer
from vlm.vocabulary_transfer import grow_bundle

_KINDS = (
    (chinese_clip.is_chinese_clip, chinese_clip.read_chinese_clip, ()),
    (m2_encoder.is_m2_encoder, m2_encoder.read_m2_encoder, ("image_size", "heads")),
    (open_clip.is_open_clip, open_clip.read_open_clip_file, ("model", "hf_config")),
)
"""What a weights file can be, by the names in it, and which options only that kind has."""

_SPECIFIC = ("model", "hf_config", "image_size", "heads")


def convert(
    source: Path,
    out: Path,
    config: ConversionConfig,
    *,
    extension: Extension | None = None,
    target: Format | None = None,
) -> list[str]:
    """Write a checkpoint or a bundle as a bundle, or in another project's format.

    The source is a bundle, a weights file, or a folder of open_clip or transformers; the result is
    a folder, or a file where the format is one.

    Returns:
        Sentences on what was done: what the source was, and what was left out on purpose.

    Raises:
        CheckpointError: the source is unknown, not whole, or needs further options; or
            the model cannot be extended or expressed as asked.
        TokenizerError: a tokenizer cannot be read, or is no extension.
    """
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out} is the source itself; expected another place")
    if is_bundle(source) and config != ConversionConfig():
        raise CheckpointError(f"{source} is already a bundle; options on the source do not apply")
    if is_bundle(source) and extension is None and target is None:
        raise CheckpointError(f"{source} is already a bundle; expected --extend or --format")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror}") from error
    notes: list[str] = []
    # On the same disk as the result, because these are as large.
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        bundle = source
        if not is_bundle(source):
            bundle = Path(scratch, "bundle") if extension or target else out
            notes += to_bundle(source, bundle, config)
        if extension is not None:
            grown = Path(scratch, "grown") if target else out
            _extend(bundle, grown, extension)
            bundle = grown
        if target is not None:
            notes += export(load_bundle(bundle), out, target)
    return notes


def to_bundle(source: Path, out: Path, config: ConversionConfig) -> list[str]:
    """Write the bundle of another project's checkpoint, as `convert` does."""
    recipe = understand(source, config)
    # Without storage for weights that would be replaced at once.
    with torch.device("meta"):
        model = build_encoder(recipe.model_cfg)
    ours, dropped = to_ours(
        in_float32(recipe.tensors),
        model.state_dict(),
        recipe.origin_of,
        allowed=recipe.allowed,
    )
    check_finite(ours, str(source))
    model.load_state_dict(ours, assign=True)
    save_bundle(
        out,
        model=model,
        model_cfg=recipe.model_cfg,
        preprocess_cfg=recipe.preprocess_cfg,
        tokenizer=recipe.tokenizer,
        languages=recipe.languages,
    )
    left_out = f"left out {len(dropped)} tensors on purpose: {', '.join(dropped)}"
    return [f"{source} is {recipe.kind}", *([left_out] if dropped else [])]


def understand(source: Path, config: ConversionConfig) -> Recipe:
    """Find out what a source is, by what it holds."""
    if source.is_dir():
        if (source / open_clip.CONFIG).is_file():
            _check_options(config, ("hf_config",), source)
            return open_clip.read_open_clip_folder(source, config)
        if hugging_face.is_hugging_face(source):
            _check_options(config, (), source)
            return hugging_face.read_hugging_face(source, config)
        raise CheckpointError(
            f"{source} is an unknown kind of folder; expected a bundle, one of open_clip (with "
            f"{open_clip.CONFIG}), or one of transformers' CLIPModel or ChineseCLIPModel"
        )
    tensors = read_tensors(source)
    for is_one, read, options in _KINDS:
        if is_one(tensors):
            _check_options(config, options, source)
            return read(tensors, config)
    raise CheckpointError(
        f"the tensors in {source} are of an unknown model ({', '.join(list(tensors)[:3])}, "
        "...); expected those of open_clip, Chinese-CLIP or M2-Encoder"
    )


def _check_options(config: ConversionConfig, known: Sequence[str], source: Path) -> None:
    """Refuse what would be passed over in silence."""
    unused = [n for n in _SPECIFIC if n not in known and getattr(config, n) is not None]
    if unused:
        raise CheckpointError(f"{source} does not take --{' or --'.join(unused)}")


def _extend(folder: Path, out: Path, extension: Extension) -> None:
    bundle = load_bundle(folder)
    if not isinstance(bundle.model, DualEncoder) or "hf_config" in bundle.model_cfg["text_cfg"]:
        raise CheckpointError(
            "the model cannot be extended; expected a text transformer of open_clip's kind"
        )
    rows, ids = bundle.model.token_embedding.num_embeddings, bundle.tokenizer.vocab_size
    if rows != ids:
        raise CheckpointError(
            f"the model has {rows} rows and its tokenizer {ids} ids; expected as many, so that "
            "new ids follow"
        )
    grow_bundle(bundle, load_tokenizer(extension.tokenizer), extension.growth, out)
