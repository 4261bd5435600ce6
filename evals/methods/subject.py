"""The model under test, from a folder of transformers: the package's own one, or any other."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attnlab.decoder_models import context_length
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Subject

TESTBED = Path(__file__).resolve().parent.parent / "testbed" / "data" / "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAMPLED = 256  # numbers of each weight that the fingerprint reads


def load(name: str, device: str = "auto", dtype: str = "auto") -> Subject:
    """The model `"testbed"`, or the one in a transformers folder; nothing is ever downloaded.

    Args:
        device: `"auto"` (CUDA where there is one) or torch's name of one.
        dtype: `"float32"`, `"float16"`, `"bfloat16"` or `"auto"`: float32 on a CPU, elsewhere the checkpoint's.

    Raises:
        UsageError: one line on what is missing or wrong.
    """
    place = _device(device)
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    folder = TESTBED if name == "testbed" else Path(name).expanduser()
    config = _config(name, folder)
    kind: Any = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    tokenizer, model = _tokenizer(name, folder), _model(name, folder, config, kind)
    model = model.to(place).eval().requires_grad_(False)
    _greedy(model, tokenizer)
    length = context_length(config.get_text_config())
    if length is None:
        raise UsageError(f"model {name!r}: its config.json does not say how many tokens a sequence may have")
    return Subject(name, model, tokenizer, length, fingerprint(model, tokenizer))


def fingerprint(model: Any, tokenizer: Any) -> str:
    """SHA-256 of the configuration, the tokenizer, and each weight's name, shape, dtype and a sample of its numbers."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(_rules(tokenizer).encode())
    for key, weight in model.state_dict().items():
        digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
        digest.update(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"device {name!r} is not to be had: {_line(e)}") from None
    return device


def _config(name: str, folder: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise UsageError("models need transformers: pip install attnlab[evals]") from None
    if not folder.is_dir():
        what = "is not part of this installation: its folder" if name == "testbed" else "must be a folder:"
        raise UsageError(f"model {name!r} {what} {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise UsageError(f"model {name!r} must be a folder of transformers, {folder} has no config.json")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(f"model {name!r}: its config.json cannot be read: {_line(e)}") from None


def _tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        raise UsageError(f"model {name!r}: {folder} has no tokenizer (tokenizer.json and tokenizer_config.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # tokenizers fail in ways of their own
        raise UsageError(f"model {name!r}: its tokenizer cannot be read: {_line(e)}") from None


def _model(name: str, folder: Path, config: Any, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options)
    except Exception as e:  # from missing files to damaged ones
        raise UsageError(f"model {name!r}: its weights cannot be read: {_line(e)}") from None
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"model {name!r}: its weights lack {missing[0]} and {len(missing) - 1} others")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars of transformers: a run has one of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _greedy(model: Any, tokenizer: Any) -> None:
    """Generation stops at the model's end of sequence, and takes over nothing else: no penalties, no sampling."""
    from transformers import GenerationConfig

    old = model.generation_config
    end = old.eos_token_id if old.eos_token_id is not None else tokenizer.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    pads = [x for x in (old.pad_token_id, tokenizer.pad_token_id, *ends, 0) if x is not None]
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=ends or None, pad_token_id=pads[0], do_sample=False
    )


def _rules(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return rules + json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)


def _line(e: BaseException) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
