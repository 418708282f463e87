"""A model's name in; its voices and languages out, read from its JSON files alone."""

import json
from argparse import Namespace
from pathlib import Path

from pipecat_qwen3.cli_parser import nearest
from pipecat_qwen3.config import ModelConfig, read_model_config
from pipecat_qwen3.errors import UnknownNameError, choices


def run(args: Namespace) -> int:
    """The command `voices`."""
    config = read_model_config(_folder(args.model))
    listing = {
        "model": args.model,
        "variant": config.variant,
        "voices": list(config.speakers),
        "default": config.default_speaker,
        "languages": list(config.languages),
        "instruct": config.takes_instruct,
    }
    if args.json:
        print(json.dumps(listing))
        return 0
    for voice in config.speakers:
        notes = ["default"] if voice == config.default_speaker else []
        notes += [f"speaks {config.dialects[voice]}"] if voice in config.dialects else []
        print(f"{voice}  ({', '.join(notes)})" if notes else voice)
    if not config.speakers:
        print(f"{args.model} ({config.variant}) has no named voices")
    print(f"languages: {', '.join(config.languages)}")
    print(f"instructions (--instruct): {'yes' if config.takes_instruct else 'no'}")
    return 0


def check_names(model: str, voice: str | None, language: str | None) -> None:
    """Refuse unknown names of a model on this disk before anything heavy is imported. Raises TTSError.

    What the names mean to a model that is not on this disk is known after its download.
    """
    folder = _local_folder(model)
    if folder is None:
        return
    config = read_model_config(folder)
    check_name("voice", voice, config.speakers, config)
    check_name("language", language, ["auto", *config.languages], config)


def check_name(kind: str, name: str | None, names: object, config: ModelConfig | None = None) -> None:
    """Refuse a name that is none of `names`, and tell the nearest. None is no name. Raises UnknownNameError."""
    known = list(names)  # type: ignore[call-overload]
    if name is None or name.lower() in (n.lower() for n in known):
        return
    if not known and config is not None:
        raise UnknownNameError(
            f"no {kind} {name!r}: a {config.variant} checkpoint has no named {kind}s; leave --{kind} out"
        )
    raise UnknownNameError(f"no {kind} {name!r}{nearest(name, known)}; this model has {choices(known)}")


def _local_folder(model: str) -> Path | None:
    """The folder of a model that lies on this disk; None for a Hugging Face name. Raises UnknownNameError."""
    if model == "embedded":
        return Path(__file__).parent / "embedded"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise UnknownNameError(
            f"no model {model!r}{nearest(model, ['embedded'])}; expected embedded, a checkpoint folder, or OWNER/NAME "
            "on Hugging Face"
        )
    return None


def _folder(model: str) -> Path:
    folder = _local_folder(model)
    if folder is None:
        from pipecat_qwen3.checkpoint import find

        folder = find(model)
    return folder
