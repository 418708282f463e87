"""A model's name in; its voices and languages out, read from its JSON files alone."""

import json
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from pipecat_qwen3.cli_parser import nearest
from pipecat_qwen3.config import ModelConfig, read_model_config
from pipecat_qwen3.errors import UnknownNameError, choices
from pipecat_qwen3.hub import EMBEDDED, OFFICIAL, find


def run(args: Namespace) -> int:
    """The command `voices`."""
    config = read_model_config(find_model(args.model))
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

    What a model on Hugging Face knows is told by the backend, after its download.
    """
    if "/" in model and not os.path.isdir(os.path.expanduser(model)):
        return
    config = read_model_config(find_model(model))
    check_name("voice", voice, config.speakers, config)
    check_name("language", language, ["auto", *config.languages], config)


def find_model(model: str) -> Path:
    """The folder of a model, downloaded if need be; an unknown name tells the nearest. Raises TTSError."""
    try:
        return find(model)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}{nearest(model, (EMBEDDED, *OFFICIAL))}") from None


def check_name(kind: str, name: str | None, names: Iterable[str], config: ModelConfig | None = None) -> None:
    """Refuse a name that is none of `names`, and tell the nearest. None is no name. Raises UnknownNameError."""
    known = list(names)
    if name is None or name.lower() in (n.lower() for n in known):
        return
    if not known and config is not None:
        raise UnknownNameError(
            f"no {kind} {name!r}: a {config.variant} checkpoint has no named {kind}s; leave --{kind} out"
        )
    raise UnknownNameError(f"no {kind} {name!r}{nearest(name, known)}; this model has {choices(known)}")
