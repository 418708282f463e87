"""A seed in, training sentences out: what voice agents say, dictionary prose, free word sequences.

Six sorts: filled templates (templates.txt), sentences with digits, WordNet usage examples, WordNet definitions, free
sequences over the most common words and WordNet's (each as often as any other), two short sentences in one utterance.
Sentences of held_out.tsv and the rare words of its group "unseen" never appear. Needs Debian's `wordnet-base` and
`wordfreq`; knows no audio.
"""

import argparse
import os
import random
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
WORDNET = Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet"))
"""WordNet's files; the variable is the one that WordNet's own programs read."""

FREE_WORDS, PROSE_WORDS, KNOWN_WORDS, LEXICON_WORDS = 120_000, 20_000, 12_000, 80_000
"""Ranks by frequency: words of free sequences, of dictionary prose, those that an unseen word must not be among, and
those whose pronunciation is looked up."""

MIX = {"template": 0.12, "digits": 0.25, "example": 0.05, "definition": 0.04, "free": 0.48, "pair": 0.06}
FUNCTION_WORDS = (
    "the a to of and in is for on with at from by it this that as are was be or not but we you they".split()  # noqa: SIM905
)
SHORT_WORDS = set("a i of to in is it on be as at by he or an we my me so if do up no us go oh hi am".split())  # noqa: SIM905
LEFT_OUT = re.compile(
    r"fuck|shit|nigg|cunt|bitch|slut|whor|porn|rap(e|ed|es|ing|ist)s?$|penis|vagin|sex|nazi|jew|homo|fag|dick|cock|tits"
    r"|boob|nud|erot|semen|genit|puss|orgas|tranny|shemale|muslim|islam|negro|terroris|suicid|murder|incest|hitler|trump|lynch"
)
CLASSES = {
    "03": "artifact", "04": "event", "05": "animal", "06": "artifact", "08": "body", "11": "event", "12": "feeling",
    "13": "food", "14": "group", "18": "person", "20": "plant", "27": "substance",
}  # fmt: skip
TITLES = ("Mr.", "Mrs.", "Ms.", "Dr.", "Miss", "Professor", "Doctor")


def spoken_words(text: str) -> str:
    """Lower-case words of a text, without punctuation: to compare sentences."""
    return " ".join(re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("’", "'")).split())


@cache
def held_out() -> tuple[tuple[str, str, str], ...]:
    """Rows (group, text, spoken words where the text has digits) of held_out.tsv."""
    lines = (HERE / "held_out.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return tuple((group, text, spoken) for group, text, spoken in (line.split("\t") for line in lines))


def _by_frequency(count: int) -> list[str]:
    from wordfreq import top_n_list  # type: ignore[import-not-found] # late: those who train need no texts

    return top_n_list("en", count)


@cache
def unseen_words() -> frozenset[str]:
    """Words of the held-out group "unseen" that are not common; they are kept out of all training text."""
    known = set(_by_frequency(KNOWN_WORDS))
    words = {w for group, text, _ in held_out() if group == "unseen" for w in spoken_words(text).split()}
    return frozenset(words - known)


def _pronounceable(word: str) -> bool:
    """Whether a word has letters that can be pronounced."""
    return (
        re.fullmatch(r"[a-z]+(?:'[a-z]+)?", word) is not None
        and re.search(r"[aeiouy]", word) is not None
        and (len(word) > 2 or word in SHORT_WORDS)
    )


def _speakable(word: str) -> bool:
    """Whether a word may stand in training text: decent, and not held out."""
    return _pronounceable(word) and not LEFT_OUT.search(word) and word not in unseen_words()


@cache
def common_words(count: int) -> tuple[str, ...]:
    """The `count` most frequent pronounceable English words, most frequent first."""
    return tuple(word for word in _by_frequency(2 * count) if _speakable(word))[:count]


@cache
def _lemmas() -> frozenset[str]:
    """The single words of WordNet but names that can be pronounced: the web's frequent words are half names."""
    lemmas: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(errors="ignore").splitlines():
            if not line.startswith("  "):
                fields = line.split()
                lemmas.update(fields[4 : 4 + 2 * int(fields[3], 16) : 2])
    return frozenset(filter(_pronounceable, lemmas))


@cache
def dictionary_words() -> tuple[str, ...]:
    """Words of WordNet that may stand in training text, common or not."""
    return tuple(sorted(filter(_speakable, _lemmas())))


@cache
def lexicon() -> dict[str, float]:
    """Words whose pronunciation is looked up, with how common each is on Zipf's scale (log10 of occurrences in 10^9).

    Common words and WordNet's, also those that are held out or not decent: no speech is made of them here, and a voice
    must be able to say them.
    """
    from wordfreq import zipf_frequency  # type: ignore[import-not-found] # late, as above

    common = filter(_pronounceable, _by_frequency(LEXICON_WORDS))
    return {word: zipf_frequency(word, "en") for word in sorted({*common, *_lemmas()})}


@cache
def _glosses() -> tuple[list[str], list[str]]:
    """(usage examples, definitions) of WordNet made of common words only."""
    known, examples, definitions = set(common_words(PROSE_WORDS)), [], []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(errors="ignore").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            gloss = line.split(" | ", 1)[1]
            examples += re.findall(r'"([^"]+)"', gloss)
            definitions.append(re.sub(r"\([^)]*\)", "", gloss.split('"')[0]).split(";")[0])

    def keep(texts: list[str], fewest: int) -> list[str]:
        kept = []
        for text in texts:
            text = re.sub(r"\s+([,?!])", r"\1", re.sub(r"\s+", " ", text.replace(";", ","))).strip(" .,:")
            words = re.findall(r"[a-z']+", text.lower())
            plain = re.fullmatch(r"[A-Za-z',? !-]+", text) and not re.search(r"(^|\s)['-]|['-](\s|$)", text)
            if plain and fewest <= len(words) <= 18 and all(w in known for w in words):
                kept.append(text)
        return sorted(set(kept))

    return keep(examples, 2), keep(definitions, 4)


@cache
def _names() -> dict[str, list[str]]:
    """Lists for template slots from WordNet: classes of nouns, adjectives, verbs; first, last and place names."""
    known = {w: rank for rank, w in enumerate(common_words(PROSE_WORDS))}
    found: dict[str, set[str]] = defaultdict(set)
    for part, slot in (("noun", None), ("adj", "adjective"), ("verb", "verb")):
        for line in (WORDNET / f"data.{part}").read_text(errors="ignore").splitlines():
            if line.startswith("  "):
                continue
            fields = line.split()
            lemmas = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            for lemma in lemmas:
                parts = re.sub(r"\(.*", "", lemma).split("_")
                if not all(p.lower() in known and p.isalpha() for p in parts):
                    continue
                if fields[1] == "18" and len(parts) == 2 and all(p[0].isupper() for p in parts):
                    found["first"].add(parts[0])
                    found["last"].add(parts[1])
                elif fields[1] == "15" and parts[0][0].isupper() and len(parts) < 3:
                    found["place"].add(" ".join(parts))
                elif len(parts) == 1 and lemma[0].islower() and (slot or fields[1] in CLASSES):
                    found[slot or CLASSES[fields[1]]].add(parts[0])
    return {slot: sorted(words) for slot, words in found.items()}


@cache
def _templates() -> tuple[list[str], dict[str, list[str]]]:
    templates, slots = [], {}
    for line in (HERE / "templates.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("@"):
            name, choices = line[1:].split(" = ")
            slots[name] = choices.split("|")
        elif line and not line.startswith("#"):
            templates.append(line)
    return templates, slots


def _number(rng: random.Random) -> str:
    return str(rng.choice((rng.randint(2, 12), rng.randint(2, 99), rng.randint(100, 999))))


def _time(rng: random.Random) -> str:
    hour = rng.randint(1, 12)
    minute = f":{rng.choice((rng.randint(0, 59), rng.choice((0, 15, 30, 45)))):02d}" if rng.random() < 0.6 else ""
    return f"{hour}{minute}" + rng.choice(
        ("", "", " a.m.", " p.m.", " AM", " PM") if minute else (" o'clock", " a.m.", " p.m.", " AM", " PM")
    )


def _date(rng: random.Random) -> str:
    month, day = rng.choice(_templates()[1]["month"]), rng.randint(1, 31)
    return f"{month} {day}{rng.choice(('', _suffix(day)))}" + (
        f", {rng.randint(1950, 2030)}" if rng.random() < 0.2 else ""
    )


def _suffix(number: int) -> str:
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _ordinal(rng: random.Random) -> str:
    words = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth twentieth last".split()  # noqa: SIM905
    number = rng.randint(1, 31)
    return rng.choice(words) if rng.random() < 0.6 else f"{number}{_suffix(number)}"


def _price(rng: random.Random) -> str:
    dollars = rng.choice((rng.randint(1, 20), rng.randint(20, 99), rng.randint(100, 999), rng.randint(1000, 9999)))
    cents = f".{rng.randint(1, 99):02d}" if rng.random() < 0.5 else ""
    return f"${dollars:,}{cents}" if rng.random() < 0.85 else f"{dollars} dollars"


def _code(rng: random.Random) -> str:
    count = rng.randint(3, 6)
    symbols = rng.choice(("0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
    joint = "" if symbols[-1] == "9" and symbols[0] == "0" and rng.random() < 0.4 else " "
    return joint.join(rng.choice(symbols) for _ in range(count))


def _spelled(rng: random.Random) -> str:
    return " ".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 6)))


def _phone(rng: random.Random) -> str:
    group = [f"{rng.randint(0, 10**n - 1):0{n}d}" for n in (3, 3, 4)]
    return "-".join(group[rng.choice((0, 1, 1)) :])


SLOTS = {
    "number": _number,
    "time": _time,
    "date": _date,
    "ordinal": _ordinal,
    "price": _price,
    "code": _code,
    "letters": _spelled,
    "phone": _phone,
    "digit": lambda rng: str(rng.randint(0, 9)),
    "year": lambda rng: str(rng.randint(1900, 2035)),
    "count": lambda rng: f"{rng.choice((rng.randint(100, 999), rng.randint(1000, 99999))):,}",
    "total": lambda rng: str(rng.randint(10, 200)),
    "percent": lambda rng: f"{rng.randint(1, 100)}" + rng.choice(("%", "%", " percent")),
    "temperature": lambda rng: f"{rng.randint(-9, 105)} degrees",
    "distance": lambda rng: (
        f"{rng.choice((str(rng.randint(2, 99)), f'{rng.randint(1, 9)}.{rng.randint(1, 9)}'))} "
        + rng.choice(("miles", "meters", "blocks", "feet", "kilometers"))
    ),
    "measure": lambda rng: (
        f"{rng.randint(2, 500)} " + rng.choice(("grams", "pounds", "cups", "ounces", "kilos", "liters"))
    ),
    "flight": lambda rng: "".join(rng.sample("ABCDEFKLMNQRSTUVX", 2)) + f" {rng.randint(10, 1999)}",
    "gate": lambda rng: (
        rng.choice("ABCDEF") + str(rng.randint(1, 40)) if rng.random() < 0.5 else str(rng.randint(1, 60))
    ),
    "title": lambda rng: rng.choice(TITLES),
    "street": lambda rng: rng.choice(("Street", "St.", "Avenue", "Ave.", "Road", "Lane", "Drive")),
    "side": lambda rng: rng.choice(("left", "right")),
    "onoff": lambda rng: rng.choice(("on", "off", "down", "up")),
    "part": lambda rng: rng.choice(("day", "evening", "weekend", "afternoon", "night", "trip")),
}


def template(rng: random.Random) -> str:
    """A filled template."""
    templates, lists = _templates()

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in SLOTS:
            return SLOTS[slot](rng)
        return rng.choice(lists.get(slot) or _names()[slot])

    text = rng.choice(templates)
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", fill, text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


WITH_DIGITS = [slot for slot in SLOTS if slot not in {"letters", "title", "street", "side", "onoff", "part"}]


def _capital(word: str) -> str:
    return word.capitalize() if word in capitalised() else word


@cache
def capitalised() -> frozenset[str]:
    """Words that are written with a capital within a sentence, too, in lower case."""
    lists = _templates()[1]
    names = {w.lower() for slot in ("first", "place") for name in _names()[slot] for w in name.split()}
    return frozenset(
        ({"i", "i'm", "i'll", "i've", "i'd"} | {w.lower() for w in lists["weekday"]}) | names - set(common_words(1500))
    )


class Texts:
    """An endless source of sentences; remembers only how often it has used each word."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.used: Counter[str] = Counter()
        self.forbidden = {spoken_words(text) for _, text, _ in held_out()}
        self.examples, self.definitions = _glosses()

    def free(self) -> str:
        """Words in any order, common ones and the dictionary's, rarely used ones first, function words between."""
        rng, words, pools = self.rng, [], (common_words(FREE_WORDS), dictionary_words())
        for _ in range(rng.randint(1, 13)):
            if rng.random() < 0.3:
                words.append(rng.choice(FUNCTION_WORDS))
            else:
                words.append(min(rng.choices(rng.choice(pools), k=3), key=lambda w: self.used[w]))
        text = " ".join(_capital(w) for w in words)
        if len(words) > 4 and rng.random() < 0.25:
            cut = rng.randrange(2, len(words) - 1)
            text = " ".join(text.split()[:cut]) + ", " + " ".join(text.split()[cut:])
        return text

    def digits(self) -> str:
        """A template that has digits, or a free sequence with a number among its words."""
        if self.rng.random() < 0.5:
            while not re.search(r"\d", text := template(self.rng)):
                pass
            return text
        words = self.free().split()
        words.insert(self.rng.randint(0, len(words)), SLOTS[self.rng.choice(WITH_DIGITS)](self.rng))
        return " ".join(words)

    def _plain(self, sort: str) -> str:
        if sort == "template":
            return template(self.rng)
        if sort == "digits":
            return self.digits()
        if sort == "free":
            return self.free()
        return self.rng.choice(self.examples if sort == "example" else self.definitions)

    def _ended(self, text: str, capital: float) -> str:
        rng = self.rng
        text = text[0].upper() + text[1:] if rng.random() < capital else text
        if text[-1] in "?!.":
            return text
        return text + rng.choices((".", "!", "?", ""), (0.82, 0.05, 0.05, 0.08))[0]

    def _draw(self) -> str:
        rng = self.rng
        sort = rng.choices(list(MIX), list(MIX.values()))[0]
        if sort != "pair":
            return self._ended(self._plain(sort), 0.9)
        parts = []
        while len(parts) < 2:
            part = self._plain(rng.choices(("template", "digits", "example", "free"), (0.45, 0.15, 0.25, 0.15))[0])
            if len(part.split()) <= 10:
                parts.append(self._ended(part, 1.0))
        first, second = parts
        return (first if first[-1] in ".!?" else first + ".") + " " + second

    def draw(self) -> str:
        """The next sentence: ASCII, at most 22 words, none of the held-out ones."""
        while True:
            text = self._draw()
            words = spoken_words(text).split()
            if (
                len(words) > 22
                or not text.isascii()
                or " ".join(words) in self.forbidden
                or unseen_words() & set(words)
            ):
                continue
            self.used.update(words)
            return text


def main() -> None:
    """Print generated sentences, one a line."""
    from training import needs

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    needs.check()
    source = Texts(options.seed)
    for _ in range(options.count):
        print(source.draw())


if __name__ == "__main__":
    main()
