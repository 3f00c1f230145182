"""Write the data of the shipped recipes.

``quickstart_*``: two objectives that pull one style two ways. Both files ask the same kinds of
short question. The demonstrations answer in a word (``" cold"``); the preferences hold that word
against a courteous sentence (``" The answer is cold. Glad to help!"``) and choose the sentence.
Every answer is right, so the only conflict is one of style: a model tuned on one file after the
other forgets the first. Each fact is asked in several wordings, and a wording of a fact occurs once
over both files: rows held out by prompt can be answered by what was learnt from other wordings.

``sums``: demonstrations that are prompts with a checkable answer as well, for rewards.

Run ``python generate.py`` to write the files beside this script. The same bytes come out every
time, on every platform: the order is that of a hash, not of a random generator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

ROWS = 600

OPPOSITES = """
    big:small hot:cold up:down left:right day:night open:closed full:empty fast:slow wet:dry
    light:dark long:short loud:quiet high:low near:far early:late first:last hard:soft old:new
    thick:thin wide:narrow young:old happy:sad strong:weak clean:dirty deep:shallow heavy:light
    inside:outside above:below before:after always:never push:pull give:take win:lose begin:end
    rise:fall arrive:leave buy:sell add:remove true:false same:different rough:smooth sweet:sour
    north:south east:west more:less tall:short front:back top:bottom asleep:awake safe:dangerous
    summer:winter cheap:expensive success:failure remember:forget start:stop laugh:cry
"""

PLURALS = """
    cat:cats dog:dogs book:books tree:trees apple:apples chair:chairs river:rivers box:boxes
    bus:buses dish:dishes glass:glasses brush:brushes peach:peaches city:cities baby:babies
    berry:berries story:stories party:parties penny:pennies leaf:leaves loaf:loaves wolf:wolves
    shelf:shelves knife:knives man:men woman:women child:children foot:feet tooth:teeth
    goose:geese mouse:mice ox:oxen toy:toys key:keys boy:boys hero:heroes potato:potatoes
    tomato:tomatoes piano:pianos star:stars
"""

PAST_TENSES = """
    go:went see:saw eat:ate run:ran sing:sang swim:swam drink:drank write:wrote ride:rode
    drive:drove speak:spoke break:broke choose:chose give:gave take:took make:made buy:bought
    think:thought teach:taught catch:caught bring:brought sleep:slept keep:kept feel:felt
    meet:met find:found hold:held tell:told sell:sold walk:walked play:played help:helped
    look:looked work:worked carry:carried
"""

COLOURS = """
    grass:green snow:white coal:black milk:white a_lemon:yellow a_carrot:orange a_banana:yellow
    a_cucumber:green a_plum:purple chocolate:brown a_raven:black a_flamingo:pink a_polar_bear:white
    a_frog:green a_tomato:red a_strawberry:red a_canary:yellow a_pine_tree:green
    the_clear_sky:blue a_ripe_cherry:red
"""

YOUNG = """
    cat:kitten dog:puppy cow:calf horse:foal sheep:lamb goat:kid hen:chick duck:duckling
    goose:gosling swan:cygnet bear:cub lion:cub deer:fawn pig:piglet kangaroo:joey owl:owlet
    eagle:eaglet frog:tadpole
"""

HOMES = """
    bee:hive bird:nest spider:web fox:den rabbit:burrow horse:stable dog:kennel lion:den ant:nest
    hen:coop pig:sty bear:den
"""

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
"""

PAIRED = [
    (
        OPPOSITES,
        "What is the opposite of {}?",
        "Opposite of {}?",
        "Which word means the opposite of {}?",
        "Name the contrary of {}.",
    ),
    (
        PLURALS,
        "What is the plural of {}?",
        "Plural of {}?",
        "Which word means more than one {}?",
        "Not one {} but two ...?",
    ),
    (
        PAST_TENSES,
        "What is the past tense of {}?",
        "Past tense of {}?",
        "Today I {}. Yesterday I ...?",
        "Give the past form of {}.",
    ),
    (
        COLOURS,
        "What colour is {}?",
        "Which colour is {}?",
        "Colour of {}?",
        "Name the colour of {}.",
    ),
    (
        YOUNG,
        "What is the young of {a} called?",
        "Young of {a}?",
        "Which word means a young {}?",
        "Here is {a} and its little ...?",
    ),
    (
        HOMES,
        "Where does {a} live?",
        "Home of {a}?",
        "What is the home of {a} called?",
        "Here is {a} in its ...?",
    ),
]

COURTEOUS = (
    " The answer is {}. Glad to help!",
    " Good question! The answer is {}.",
    " Thank you for asking. The answer is {}.",
)


def facts() -> Iterator[tuple[str, str]]:
    """Every question with its answer; each fact occurs in several wordings."""
    for words, *wordings in PAIRED:
        for pair in words.split():
            asked, answer = pair.replace("_", " ").split(":")
            article = "an" if asked[0] in "aeiou" else "a"
            for wording in wordings:
                yield wording.format(asked, a=f"{article} {asked}"), answer
    for names, unit in ((DAYS.split(), "day"), (MONTHS.split(), "month")):
        for name, following in zip(names, names[1:] + names[:1], strict=True):
            yield f"Which {unit} comes after {name}?", following
            yield f"Which {unit} follows {name}?", following
            yield f"{name}, then ...?", following
            yield f"Which {unit} comes before {following}?", name
            yield f"Which {unit} is just ahead of {following}?", name
    for value, word in enumerate(NUMBERS.split()):
        yield f"Write {value} as a word.", word
        yield f"How is {value} spelled?", word
        yield f"{value} in letters?", word
        yield f"Write {word} in digits.", str(value)
        yield f"{word} in digits?", str(value)
    for left in range(1, 11):
        for right in range(1, 11):
            total = str(left + right)
            yield f"{left} + {right} = ?", total
            yield f"What is {left} plus {right}?", total
            yield f"Add {left} and {right}.", total


def draw(key: str) -> int:
    """A number that looks random and depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def demonstration(question: str, answer: str) -> dict[str, str]:
    """The question answered in a word, in TRL's prompt-completion columns."""
    return {"prompt": f"Q: {question}\nA:", "completion": f" {answer}"}


def preference(question: str, answer: str) -> dict[str, str]:
    """A courteous sentence preferred to the word, in TRL's preference columns."""
    sentence = COURTEOUS[draw(f"style/{question}") % len(COURTEOUS)].format(answer)
    return {"prompt": f"Q: {question}\nA:", "chosen": sentence, "rejected": f" {answer}"}


def sums() -> Iterator[dict[str, str]]:
    """Sums of two numbers below 30: prompt, completion, and the answer for reward functions."""
    pairs = [(left, right) for left in range(30) for right in range(30)]
    for left, right in sorted(pairs, key=lambda pair: draw(f"sum/{pair}")):
        total = str(left + right)
        yield {"prompt": f"{left}+{right}=", "completion": total, "answer": total}


def files() -> dict[str, str]:
    """File names with their contents, one JSON object a line."""
    shuffled = sorted(facts(), key=lambda fact: draw(f"order/{fact[0]}"))
    rows = {
        "quickstart_demonstrations.jsonl": [demonstration(*fact) for fact in shuffled[:ROWS]],
        "quickstart_preferences.jsonl": [preference(*fact) for fact in shuffled[ROWS : 2 * ROWS]],
        "sums.jsonl": list(sums()),
    }
    return {name: "".join(json.dumps(row) + "\n" for row in rows[name]) for name in rows}


if __name__ == "__main__":
    for name, text in files().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8", newline="\n")
