"""The conversation that a bot without a language model can have: what may be asked, and what it answers.

Knows no Pipecat: sentences for a speech recogniser and a function from a conversation to a reply.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

GREETING = "Hello, I am a script with a voice. Ask me for a capital."

HINT = (
    "It understands: hello; who are you; what is the capital of Germany (France, Italy, Spain, Japan); how many people "
    "live there; tell me a story; speak German; stop; goodbye."
)

_CAPITALS = {
    "germany": ("Berlin", "nearly four million"),
    "france": ("Paris", "two million"),
    "italy": ("Rome", "nearly three million"),
    "spain": ("Madrid", "more than three million"),
    "japan": ("Tokyo", "fourteen million"),
}

_STORY = (
    "Once there was a river that wanted to see the sea. It ran through the hills and through the fields. "
    "It ran past a little town, and the children waved. At night it was alone with the moon. "
    "Every morning it asked the birds how far it was. In the end it heard the waves and was home."
)

_LANGUAGES = {
    "english": "Good. I speak English.",
    "german": "Gerne. Ich spreche jetzt Deutsch.",
    "french": "Bien sûr. Je parle français.",
    "spanish": "Claro. Ahora hablo español.",
}

_ANSWERS = {
    "story": _STORY,
    "who": "I am a script, not a language model. I know a few answers by heart.",
    "hello": "Hello there. What would you like to know?",
    "goodbye": "Goodbye. It was nice to talk to you.",
    "stop": "All right.",
    "quiet": "All right.",
}
"""By a word that is in the question."""

_NO_PLACE = "Ask me for a capital first."
_NO_IDEA = "I am only a script and do not know that. Ask me for the capital of Germany, or for a story."

QUESTIONS = [
    *("hello", "hello there", "who are you", "how many people live there", "tell me a story"),
    *("stop", "be quiet", "goodbye"),
    *(f"what is the capital of {country}" for country in _CAPITALS),
    *(f"and of {country}" for country in _CAPITALS),
    *(f"please speak {language} please" for language in _LANGUAGES),
]
"""What the recogniser listens for: it hears nothing else, and so needs no large model."""


class Reply(NamedTuple):
    """What to say, and the language to say it in if that changes."""

    text: str
    language: str | None = None


def reply(said: Sequence[str], languages: Sequence[str]) -> Reply:
    """Answer the last of the things that the user said; nothing said yet is answered with the greeting.

    said       all user messages, oldest first; "there" is the last place that was asked for
    languages  what the voice speaks, as the checkpoints name it ("english")
    """
    if not said:
        return Reply(GREETING)
    words = words_of(said[-1])
    if wanted := next((word for word in words if word in _LANGUAGES), None):
        return _switch(wanted, languages)
    if country := _country(words):
        return Reply(_capital(country))
    if "people" in words:
        country = _country(words_of(" ".join(said)))
        return Reply(_people(country) if country else _NO_PLACE)
    return Reply(next((_ANSWERS[word] for word in words if word in _ANSWERS), _NO_IDEA))


def everything() -> list[str]:
    """All sentences, in small letters, that the script can say to a voice that speaks English alone."""
    places = [sentence for country in _CAPITALS for sentence in (_capital(country), _people(country))]
    switched = [_switch(language, ["english"]).text for language in _LANGUAGES]
    texts = [GREETING, *places, *switched, *_ANSWERS.values(), _NO_PLACE, _NO_IDEA]
    sentences = [" ".join(words_of(sentence)) for text in texts for sentence in re.split(r"[.?!]", text)]
    return sorted({sentence for sentence in sentences if sentence})


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def _country(words: Sequence[str]) -> str | None:
    return next((word for word in reversed(words) if word in _CAPITALS), None)


def _capital(country: str) -> str:
    return f"The capital of {country.title()} is {_CAPITALS[country][0]}."


def _people(country: str) -> str:
    city, number = _CAPITALS[country]
    return f"{number.capitalize()} people live in {city}."


def _switch(wanted: str, languages: Sequence[str]) -> Reply:
    if wanted in languages:
        return Reply(_LANGUAGES[wanted], wanted)
    return Reply(f"I am sorry. My voice speaks {' and '.join(languages).title() or 'one language'} only.")
